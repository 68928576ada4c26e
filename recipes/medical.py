r"""Fine-tune a language model on medical questions while it loses half of its layers, and measure what that did.

    python recipes/medical.py --demo                      # no network, no download, two minutes on two CPU cores
    python recipes/medical.py --output_dir runs/medical   # SmolLM2-135M on PubMedQA, from the Hub
    torchrun --nproc_per_node 2 recipes/medical.py --target_layers 15 --num_train_epochs 3
    accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/medical.py --output_dir runs/medical \
        --dataset_name openlifescienceai/medmcqa --drop_overlap --bf16 --push_to_hub --hub_model_id you/model
    python recipes/medical.py --model_name_or_path path/to/model --target_layers 3 --train_file train.jsonl \
        --validation_file valid.jsonl --test_file test.jsonl --off_domain_file law_test.csv --max_steps 300
    python recipes/medical.py --do_eval --model_name_or_path runs/medical   # score a model, train nothing

All flags of `TrainingArguments` (`--resume_from_checkpoint`, `--push_to_hub`, …), of `TrimConfig` and of `DataArguments`
(questions/data.py) work, under every engine of `recipes/accelerate/`; without a target, half of the layers stay.
docs/recipes.md says which rows a file can have, how answers are ranked and how the splits are kept apart.

From the Hub, the data sets that TrimLLM (arXiv 2412.11242) trained and tested on:

    qiaojin/PubMedQA           pqa_labeled, 1,000 rows, of which a fifth is held out (MIT); the default
    openlifescienceai/medmcqa  182,822 to train, 4,183 to validate; the answers to the test split are not public (Apache-2.0)
    allenai/sciq               11,679 to train, 1,000 to validate, 1,000 to test (CC BY-NC 3.0: not for commercial use)

The demo makes its own domain and base model (questions/demo.py). **Its drugs, classes and facts are invented.** Beside the
model that goes from 12 to 6 layers it fine-tunes all 12 for the same steps (`--compare_full_depth`).
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

from trimllm_hf import TrimCardData, TrimConfig, TrimTrainer, measure_latency, slice_model, write_card

ASKS = "What is this about?"  # of a text with a label


def pubmedqa(row: dict[str, Any]) -> dict[str, Any]:
    """A row of qiaojin/PubMedQA."""
    return {**row, "context": " ".join(row["context"]["contexts"]), "label": row["final_decision"]}


def medmcqa(row: dict[str, Any]) -> dict[str, Any]:
    """A row of openlifescienceai/medmcqa."""
    return {"question": row["question"], "choices": [row[f"op{letter}"] for letter in "abcd"], "answer": row["cop"]}


def sciq(row: dict[str, Any]) -> dict[str, Any]:
    """A row of allenai/sciq; its paragraph of evidence, where there is one, is the context."""
    right = row["correct_answer"]
    choices = sorted([right, row["distractor1"], row["distractor2"], row["distractor3"]])
    return {"question": row["question"], "context": row["support"], "choices": choices, "answer": choices.index(right)}


HUB = {
    "qiaojin/PubMedQA": HubData("mit", "pqa_labeled", pubmedqa),
    "openlifescienceai/medmcqa": HubData("apache-2.0", to_row=medmcqa, unlabelled=("test",)),
    "allenai/sciq": HubData("cc-by-nc-3.0", to_row=sciq),
}
DEMO = Demo(
    member="ol",
    family="ides",
    belongs="{} belongs to the {}",
    relations=(
        ("act on the {}", "Which organ does {} act on?", "heart liver kidney lung brain skin stomach thyroid"),
        ("can cause {}", "Which side effect can {} cause?", "cough nausea rash dizziness fever anemia insomnia edema"),
        ("are not given in {}", "In which condition is {} not given?", "asthma gout pregnancy glaucoma epilepsy diabetes"),
        ("are reversed by {}", "What reverses {}?", "atropine glucagon calcium naloxone zinc bicarbonate charcoal insulin"),
        ("need a check of {}", "What has to be checked with {}?", "sodium potassium creatinine glucose platelets ferritin"),
    ),
)


@dataclass
class Arguments(DataArguments):
    """The flags of the data, and those of this recipe."""

    dataset_name: str = "qiaojin/PubMedQA"
    compare_full_depth: bool = field(default=False, metadata={"help": "Also fine-tune at full depth, for the same steps."})
    slice_ratio: float | None = field(default=None, metadata={"help": "Cut this share of the widths instead of layers."})


def parse(argv: Sequence[str]) -> tuple[Arguments, TrimConfig, TrainingArguments]:
    """The settings. A flag that is given wins over the demo's, a target over the default one."""
    flags = ["--output_dir", "runs/medical", "--target_ratio", "0.5"]
    if "--demo" in argv:
        flags = ["--output_dir", "runs/medical-demo", "--target_layers", "6", *DEMO_FLAGS]
    if any(flag.replace("_", "-").startswith("--target-") for flag in argv):
        del flags[2:4]
    return HfArgumentParser((Arguments, TrimConfig, TrainingArguments)).parse_args_into_dataclasses([*flags, *argv])


def main(argv: Sequence[str]) -> None:
    """Load, prompt, train and trim, evaluate, save, push."""
    recipe, trim, args = parse(argv)
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
        if recipe.slice_ratio is None:
            trainer: Any = TrimTrainer(load(recipe.model_name_or_path), args, trim=trim, train_dataset=train, **common)
        else:
            narrow = sliced(recipe.model_name_or_path, recipe.slice_ratio, train, encoder, not args.disable_tqdm)
            trainer = Trainer(narrow, args, train_dataset=train, **common)
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
        models["trimmed and fine-tuned" if recipe.slice_ratio is None else "sliced and fine-tuned"] = str(args.output_dir)

    # ---- evaluate: each model as anybody would load it, timed in turn with the base
    wait_for_everyone()  # the main process saves; all of them load
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    prompt_tokens = max(1, min(len(encoder.prompt(questions["test"][0])), longest - 32))
    rows, base = [], None
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
    if recipe.slice_ratio is not None:
        if args.process_index == 0:
            write_card(args.output_dir, TrimCardData(domain="medical questions"), base=recipe.model_name_or_path)
        return  # publish it by `trimllm push`

    # ---- card and push
    if rows:
        card, of = trainer.card_data, {"base": rows[0], "trimmed": rows[-1]}
        aside = "The calibration examples are of them" if trainer.calibration_dataset else None
        describe(card, of | ({"full": rows[1]} if recipe.compare_full_depth else {}), recipe, questions, aside)
        card.domain = f"{'an invented domain in place of ' * recipe.demo}medical questions"
        card.not_for = ["As a source of advice: no answer of it was checked by anybody who knows the subject."]
        card.not_for += ["For anything in earnest: every name and fact that it was taught is invented."] * recipe.demo
        asked = questions["test"][0]
        card.usage_prompt = f"{asked.context}\n{PROMPT.format(question=asked.text)}".lstrip("\n")
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()


def sliced(path: str, ratio: float, train: Sequence[Any], encoder: QuestionEncoder, progress: bool) -> Any:
    """A model to train whose layers are narrower, by their redundancy on the first training examples."""
    model = load(path)
    batches = [encoder.collate(list(train[start : start + 8])) for start in range(0, min(len(train), 256), 8)]
    slice_model(model, batches, ratio, progress=progress)
    return model


def load(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


if __name__ == "__main__":
    main(sys.argv[1:])
