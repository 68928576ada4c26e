r"""Fine-tune a language model on financial news while it loses half of its layers, and measure what that did.

    python recipes/finance.py --demo                      # no network, no download, two minutes on two CPU cores
    python recipes/finance.py --drop_overlap              # SmolLM2-135M on financial tweets, from the Hub
    torchrun --nproc_per_node 2 recipes/finance.py --drop_overlap --target_layers 15 --num_train_epochs 2
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/finance.py --output_dir runs/finance \
        --drop_overlap --target_ratio 0.5 --push_to_hub --hub_model_id you/model
    python recipes/finance.py --model_name_or_path path/to/model --target_layers 3 --train_file news/train.jsonl \
        --validation_file news/valid.jsonl --off_domain_file anatomy_test.csv law_test.csv --max_steps 300

From the Hub:

    zeroshot/twitter-financial-news-sentiment   9,543 texts to train, 2,388 to validate and test (MIT); the default. One
                                                stands in both, so it takes --drop_overlap
    gbharti/finance-alpaca                      68,912 instructions with answers, a thousand held out; what TrimLLM (arXiv
                                                2412.11242) trained on: rank the answer against three others (read its card
                                                for what it is made of and what that allows)

Two of three news texts are neutral: read an accuracy beside what always the same answer reaches, in the line below the
table.

Local files are of the same shape:

    {"text": "$BANK falls a tenth after its outlook is cut", "label": "bearish"}

The other shapes of rows, how answers are ranked, the splits and the flags are those of every recipe: docs/recipes.md.

**The demo's bonds, funds and facts are invented**: it shows trimming at work, not finance.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import wait_for_everyone
from questions.choice_accuracy import PROMPT, QuestionEncoder
from questions.data import DataArguments, HubData, load_questions
from questions.demo import DEMO_FLAGS, Demo, make_demo
from questions.table import answer, describe, score, show
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments
from transformers.utils import logging

from trimllm_hf import TrimConfig, TrimTrainer, measure_latency

ASKS = "Is this bearish, bullish or neutral?"  # of a text with a label


def news(row: dict[str, Any]) -> dict[str, Any]:
    """A row of zeroshot/twitter-financial-news-sentiment."""
    return {"text": row["text"], "label": ("bearish", "bullish", "neutral")[row["label"]]}


def alpaca(row: dict[str, Any]) -> dict[str, Any]:
    """A row of gbharti/finance-alpaca."""
    asked = " ".join(filter(None, (row["instruction"], row["input"])))
    return {"question": asked, "answer": row["output"], "qtype": "any", "focus": asked}


HUB = {
    "zeroshot/twitter-financial-news-sentiment": HubData("mit", to_row=news),
    "gbharti/finance-alpaca": HubData("unknown", to_row=alpaca),
}
DEMO = Demo(
    member="bond",
    family="fund",
    belongs="the {} is held by the {}",
    relations=(
        ("pays in {}", "In what does the {} pay?", "dollars euros yen pounds francs rupees won pesos"),
        ("is traded in {}", "Where is the {} traded?", "london tokyo zurich paris mumbai oslo toronto sydney"),
        ("rises with {}", "With what does the {} rise?", "inflation exports oil rates housing employment"),
        ("is backed by {}", "What backs the {}?", "mortgages gold wheat taxes copper patents rents timber"),
        ("is audited by a {}", "Who audits the {}?", "bank court ministry notary cooperative university"),
    ),
)


@dataclass
class Arguments(DataArguments):
    """The flags of the data, and those of this recipe."""

    dataset_name: str = "zeroshot/twitter-financial-news-sentiment"
    compare_full_depth: bool = field(default=False, metadata={"help": "Also fine-tune at full depth, for the same steps."})


def parse(argv: Sequence[str]) -> tuple[Arguments, TrimConfig, TrainingArguments]:
    """The settings. A flag that is given wins over the demo's, a target over the default one."""
    flags = ["--output_dir", "runs/finance", "--target_ratio", "0.5"]
    if "--demo" in argv:
        flags = ["--output_dir", "runs/finance-demo", "--target_layers", "6", *DEMO_FLAGS]
    if any(flag.replace("_", "-").startswith("--target-") for flag in argv):
        del flags[2:4]
    return HfArgumentParser((Arguments, TrimConfig, TrainingArguments)).parse_args_into_dataclasses([*flags, *argv])


def main(argv: Sequence[str]) -> None:
    """Load, prompt, train and trim, evaluate, save, push."""
    recipe, trim, args = parse(argv)
    # one process logs a line a drop, the others errors only
    logging.get_logger("transformers.trimllm_hf").setLevel(logging.INFO if args.process_index == 0 else logging.ERROR)
    if recipe.demo:
        make_demo(DEMO, recipe, args)

    # ---- load: tokenizer, and questions in splits that share nothing
    tokenizer = AutoTokenizer.from_pretrained(recipe.model_name_or_path)
    config = AutoConfig.from_pretrained(recipe.model_name_or_path).get_text_config()
    longest = min(recipe.max_length, getattr(config, "max_position_embeddings", recipe.max_length))
    encoder = QuestionEncoder(tokenizer, longest, PROMPT)  # PROMPT stands between context and answer
    questions = load_questions(recipe, HUB, ASKS, encoder, args.seed)
    models = {"base, before fine-tuning": recipe.model_name_or_path}

    trains = args.do_train or not args.do_eval or args.eval_strategy != "no"  # which sets do_eval by itself
    if trains:
        if "train" not in questions:
            raise ValueError("Expected training questions, got test questions only. Give --train_file, or --do_eval.")
        # ---- prompt: context, question and right answer, with loss on the answer alone
        train, validation = ([encoder.example(q, q.right) for q in questions[split]] for split in ("train", "validation"))

        # ---- train and trim
        common = {"eval_dataset": validation, "data_collator": encoder.collate, "processing_class": tokenizer}
        trainer = TrimTrainer(load(recipe.model_name_or_path), args, trim=trim, train_dataset=train, **common)
        resume = args.resume_from_checkpoint  # "true": the newest checkpoint in output_dir
        trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)

        # ---- save; it is pushed when it is scored, so that its card says how well it does
        trainer.save_model(_internal_call=True)
        if recipe.compare_full_depth:
            stock = copy.copy(args)
            stock.output_dir, stock.push_to_hub, stock.eval_strategy = f"{args.output_dir}-full", False, "no"
            # without the calibration examples here too: both train on the same questions
            full = Trainer(load(recipe.model_name_or_path), stock, train_dataset=trainer.train_dataset, **common)
            full.train()
            full.save_model()
            models["full depth, fine-tuned"] = str(stock.output_dir)
        models["trimmed and fine-tuned"] = str(args.output_dir)

    # ---- evaluate: each model as anybody would load it, timed in turn with the base
    wait_for_everyone()  # the main process saves; all of them load
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    prompt_tokens = max(1, min(len(encoder.prompt(questions["test"][0])), longest - 32))
    rows: list[dict[str, Any]] = []
    base = None
    for name, path in models.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(args.device)
        row = score(model, questions, encoder, args.per_device_eval_batch_size, recipe.general_file)
        if row:  # the main process
            latency = measure_latency(model, base, prompt_tokens=prompt_tokens, new_tokens=32, repeats=7)
            if base is not None:  # what it took in turn with this model
                rows[0]["ms_per_token"] = latency.base_runs[0].decode_ms_per_token.p50
            speed = latency.runs[0].decode_ms_per_token.p50
            depth = model.config.get_text_config().num_hidden_layers
            rows.append({"model": name, "layers": depth, "parameters": model.num_parameters(), "ms_per_token": speed, **row})
        base = model if base is None else base
    if rows:
        show(rows, questions["test"], str(args.output_dir))
        answer(model, questions["test"][0], encoder)
    if not trains:
        return

    # ---- card and push
    if rows:
        card, of = trainer.card_data, {"base": rows[0], "trimmed": rows[-1]}
        aside = "The calibration examples are of them" if trainer.calibration_dataset else None
        describe(card, of | ({"full": rows[1]} if recipe.compare_full_depth else {}), recipe, questions, aside)
        card.domain = f"{'an invented domain in place of ' * recipe.demo}financial news, bearish, bullish or neutral"
        card.not_for = [
            "For investment decisions: it tells the tone of a text, and was checked on tweets of one period only."
        ]
        card.not_for += ["For anything in earnest: every name and fact that it was taught is invented."] * recipe.demo
        asked = questions["test"][0]
        card.usage_prompt = f"{asked.context}\n{PROMPT.format(question=asked.text)}".lstrip("\n")
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()


def load(path: str) -> Any:
    """A model to train."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


if __name__ == "__main__":
    main(sys.argv[1:])
