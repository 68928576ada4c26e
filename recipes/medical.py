r"""Fine-tune a language model on medical questions while it loses half of its layers, and measure what that did.

    python recipes/medical.py --demo                      # no network, no download, two minutes on two CPU cores
    python recipes/medical.py --output_dir runs/medical   # SmolLM2-135M on PubMedQA, from the Hub
    torchrun --nproc_per_node 2 recipes/medical.py --target_layers 15 --num_train_epochs 3
    accelerate launch recipes/medical.py --model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --dataset_name qiaojin/PubMedQA --dataset_config_name pqa_labeled --target_ratio 0.5 --bf16
    python recipes/medical.py --model_name_or_path path/to/model --target_layers 3 \
        --train_file train.jsonl --validation_file valid.jsonl --learning_rate 1e-3 --max_steps 300
    python recipes/medical.py --do_eval --model_name_or_path runs/medical   # score a model, train nothing

All flags of `TrainingArguments` (`--resume_from_checkpoint`, `--push_to_hub`, …) and of `TrimConfig` work; without a
target, half of the layers stay. Rows of a JSON Lines file or of a data set on the Hub have one of three shapes:

    {"question", "context", "label"}           PubMedQA: yes, no or maybe (on the Hub the label is `final_decision`)
    {"question", "answer", "qtype", "focus"}   MedQuAD: rank the answer against three to the same type of question
    {"question", "choices", "answer"}          anything else; `answer` is the index of the right choice

Loss is taken on the answer alone. A context that is too long loses its beginning; a question whose answer does not fit
is left out and counted. A model answers with the choice to which it gives the highest log-likelihood (MedQuAD: per
token, as its choices differ in length). Without validation data a fifth of the training data is held out.

The demo makes its own domain and base model (medical_demo.py). **Its drugs, classes and facts are invented**: it shows
trimming at work, not medicine. Beside the model that goes from 12 to 6 layers, stock Trainer fine-tunes all 12 for the
same steps on the same questions (`--compare_full_depth`, which any run can have).

At its end the run writes a model card into its folder, with the figures of its own table, speed and memory measured, and
(`--general_file text.txt`) the loss on a text outside the domain.
"""

import copy
import json
import statistics
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import wait_for_everyone
from general_text import general_loss, read_pieces
from medical_demo import make_demo
from questions import load_questions
from recipe_card import write_card
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from trimllm_hf import TrimConfig, TrimTrainer
from trimllm_hf.choice_accuracy import Question, QuestionEncoder, log_likelihoods, score_questions

logger = logging.get_logger("transformers.trimllm_hf")

# ---- settings

DEMO_FLAGS = """--output_dir runs/medical-demo --compare_full_depth --max_steps 200 --warmup_steps 20
    --learning_rate 2e-3 --weight_decay 0.1 --per_device_train_batch_size 24 --per_device_eval_batch_size 128
    --logging_steps 50 --save_strategy no --eval_strategy steps --eval_steps 10""".split()


@dataclass
class RecipeArguments:
    """What this recipe takes besides `TrimConfig` and `TrainingArguments`."""

    model_name_or_path: str = "HuggingFaceTB/SmolLM2-135M"
    dataset_name: str = "qiaojin/PubMedQA"
    dataset_config_name: str | None = None  # of the default data set: pqa_labeled
    dataset_revision: str | None = None  # that was read; filled in by itself
    train_file: str | None = None
    validation_file: str | None = None
    general_file: str | None = None  # a text outside the domain
    domain: str = "medical questions"  # for the card
    max_length: int = 1024  # tokens of context, question and answer; the model's own context is a limit as well
    max_train_samples: int | None = None
    max_eval_samples: int = 500
    compare_full_depth: bool = False
    demo: bool = False


def parse(argv: list[str]) -> tuple[RecipeArguments, TrimConfig, TrainingArguments]:
    """The three groups of settings. A flag that is given wins over the demo's, a target over the default one."""
    demo = "--demo" in argv
    target = ["--target_layers", "6"] if demo else ["--target_ratio", "0.5"]
    if any(flag.replace("_", "-").startswith("--target-") for flag in argv):
        target = []
    parser = HfArgumentParser((RecipeArguments, TrimConfig, TrainingArguments))
    recipe, trim, args = parser.parse_args_into_dataclasses([*(DEMO_FLAGS if demo else []), *target, *argv])
    if recipe.dataset_name == RecipeArguments.dataset_name:
        recipe.dataset_config_name = recipe.dataset_config_name or "pqa_labeled"
    if args.resume_from_checkpoint in ("True", "true"):
        args.resume_from_checkpoint = True  # the newest checkpoint in output_dir
    return recipe, trim, args


# ---- training


def fine_tune(
    recipe: RecipeArguments,
    trim: TrimConfig,
    args: TrainingArguments,
    questions: dict[str, list[Question]],
    encoder: QuestionEncoder,
) -> tuple[TrimTrainer, dict[str, str]]:
    """Fine-tune and trim; if asked for, fine-tune at full depth as well. The Trainer; names of models, where they are."""
    if "train" not in questions:
        raise ValueError("Expected training questions, got validation questions only. Give --train_file, or --do_eval.")
    examples = {split: [encoder.example(q, q.right) for q in part] for split, part in questions.items()}
    common = {
        "eval_dataset": examples["validation"],
        "data_collator": encoder.collate,
        "processing_class": encoder.tokenizer,
    }
    trainer = TrimTrainer(load(recipe.model_name_or_path), args, trim=trim, train_dataset=examples["train"], **common)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()  # with --push_to_hub, onto the Hub as well; the card follows when the models are compared
    models = {"trimmed and fine-tuned": str(args.output_dir)}
    if recipe.compare_full_depth:
        stock = copy.copy(args)
        stock.output_dir, stock.push_to_hub, stock.eval_strategy = f"{args.output_dir}-full", False, "no"
        # without the calibration examples here too: both train on the same questions
        full = Trainer(load(recipe.model_name_or_path), stock, train_dataset=trainer.train_dataset, **common)
        full.train()
        full.save_model()
        models = {"full depth, fine-tuned": stock.output_dir, **models}
    wait_for_everyone()  # the main process saves; all of them load
    return trainer, models


# ---- what it did


def load(model: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model, by stock transformers."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


def ms_per_token(models: list[Any], prompt: list[int], new_tokens: int = 32, rounds: int = 7) -> list[float]:
    """Median time of a greedily generated token at batch size 1, the models in turn so that drift meets them all."""
    times: list[list[float]] = [[] for _ in models]
    for number in range(rounds + 1):
        for model, of_model in zip(models, times, strict=True):
            ids = torch.tensor([prompt], device=model.device)
            start = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
            ).tolist()  # waits for the device
            if number:  # the first round warms up
                of_model.append(1000 * (time.perf_counter() - start) / new_tokens)
    return [statistics.median(of_model) for of_model in times]


def report(
    models: dict[str, str], questions: list[Question], encoder: QuestionEncoder, args: TrainingArguments, general: str | None
) -> list[dict[str, Any]]:
    """Load each model as anybody would, score and time it, print the table, and let the last one answer a question."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    loaded = [load(path, dtype).to(args.device).eval() for path in models.values()]
    scores = [score_questions(model, questions, encoder, args.per_device_eval_batch_size) for model in loaded]
    rows: list[dict[str, Any]] = []
    if args.process_index == 0:
        prompt = encoder.prompt(questions[0])
        times = ms_per_token(loaded, prompt[-max(1, encoder.max_length - 32) :])
        rows = [
            {
                "model": name,
                "layers": model.config.get_text_config().num_hidden_layers,
                **score,
                "parameters": model.num_parameters(),
                "ms_per_token": ms,
            }
            for name, model, score, ms in zip(models, loaded, scores, times, strict=True)
        ]
        if general is not None:
            pieces = read_pieces(general, encoder)
            for row, model in zip(rows, loaded, strict=True):
                row |= general_loss(model, pieces, encoder, args.per_device_eval_batch_size) | {"pieces": len(pieces)}
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(args.output_dir) / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        show(rows)
        answer(loaded[-1], questions[0], encoder)
    wait_for_everyone()
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    lines = [("model", "layers", "accuracy", "parameters", "ms per token")]
    for row in rows:
        accuracy = f"{row['accuracy']:.3f} ± {row['standard_error']:.3f} (n={row['questions']})"
        lines.append((row["model"], row["layers"], accuracy, f"{row['parameters']:,}", f"{row['ms_per_token']:.2f}"))
    widths = [max(len(str(cell)) for cell in column) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    print()
    for line in lines:
        print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def answer(model: Any, question: Question, encoder: QuestionEncoder) -> None:
    """Print a question, the choice of the highest log-likelihood, and what the model writes by itself."""
    examples = [encoder.example(question, choice) for choice in question.choices]
    scores = [
        total / length if question.per_token else total
        for total, length in log_likelihoods(model, examples, encoder, len(examples))
    ]
    prompt = torch.tensor([encoder.prompt(question)], device=model.device)
    room = encoder.max_length - prompt.shape[1]
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=min(48, room))
    print(f"\nQuestion: {question.text}")
    for choice, score in zip(question.choices, scores, strict=True):
        marks = "  <- chosen" * (score == max(scores)) + "  (right)" * (choice == question.right)
        print(f"  {score:9.3f}  {textwrap.shorten(choice, 80)}{marks}")
    print("Generated:", encoder.tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True).strip())


def main(argv: list[str]) -> None:
    """Data, training, table."""
    recipe, trim, args = parse(argv)
    logger.setLevel(logging.INFO if args.process_index == 0 else logging.ERROR)  # a line a drop, once
    if recipe.demo:
        recipe.model_name_or_path, recipe.train_file, recipe.validation_file, recipe.general_file = make_demo(args)
        recipe.domain = "questions about invented drugs"
    config = AutoConfig.from_pretrained(recipe.model_name_or_path).get_text_config()
    tokenizer = AutoTokenizer.from_pretrained(recipe.model_name_or_path)
    context = getattr(config, "max_position_embeddings", recipe.max_length)
    encoder = QuestionEncoder(tokenizer, min(recipe.max_length, context))
    questions = load_questions(recipe, encoder, args.seed)
    trainer, models = None, {"as it is": recipe.model_name_or_path}
    if args.do_train or not args.do_eval or args.eval_strategy != "no":  # eval_strategy sets do_eval by itself
        models = {"base, before fine-tuning": recipe.model_name_or_path}
        trainer, tuned = fine_tune(recipe, trim, args, questions, encoder)
        models |= tuned
    rows = report(models, questions["validation"], encoder, args, recipe.general_file)
    if trainer is not None:
        write_card(trainer, rows, recipe, questions)


if __name__ == "__main__":
    main(sys.argv[1:])
