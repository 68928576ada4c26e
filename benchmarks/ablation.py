"""TrimLLM's ablation (arXiv 2412.11242, table 3) in miniature: the score by which layers go x the share that trains.

    python benchmarks/ablation.py                 # all cells, a quarter of an hour on one CPU core
    python benchmarks/ablation.py --seeds 0       # one seed; the table is of all cells that are there by then

For each seed, score and sparse-update ratio r the base is fine-tuned on MedQuAD by the medical recipe's own questions,
encoder and Trainer while it loses layers, saved, loaded by stock transformers, and tested on held-out questions: the loss
for each token of the right answer, and how often the right one of four answers has the highest log-likelihood. Runs of one
seed see the same questions in the same order; scores are taken on the same 32 questions, which are not trained on. Besides:
the base as it is, and fine-tuned at full depth.

A cell is a JSON file in --out, and is not made again; the table is printed, and written beside them.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, Trainer, set_seed
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

from medical import ASKS, HUB, load, parse  # noqa: E402
from questions.choice_accuracy import QuestionEncoder, score_questions  # noqa: E402
from questions.data import load_questions  # noqa: E402
from questions.table import general_loss  # noqa: E402

from trimllm_hf import LayerMap, TrimConfig, TrimTrainer  # noqa: E402

SCAN = {"importance": "sensitivity"}
SCORES: dict[str, dict[str, Any]] = {
    "scan by accuracy, ties by activation norm": {
        **SCAN,
        "scan_metric": "choice_accuracy",
        "tie_breaker": "activation_norm",
    },
    "scan by loss": SCAN,
    "activation norm": {"importance": "activation_norm"},
    "block influence": {"importance": "block_influence"},
    "random": {"importance": "random"},
}
RATIOS = {"1": None, "1/2": 0.5, "1/4": 0.25}
BASE, FULL = "base, as it is", "full depth, fine-tuned"
CALIBRATION = 32  # questions
_QUESTIONS: dict[int, Any] = {}  # of each seed


def prepare(args: argparse.Namespace, seed: int) -> tuple[Any, Any, dict[str, Any]]:
    """The Trainer's arguments, the encoder and the questions of a seed, as the recipe makes them."""
    files = {split: str(args.data / f"{name}.jsonl") for split, name in (("train", "train"), ("validation", "valid"))}
    flags = [
        *(
            "--model_name_or_path",
            str(args.base),
            "--output_dir",
            str(args.out / "run"),
            "--target_layers",
            str(args.layers),
        ),
        *("--train_file", files["train"], "--validation_file", files["validation"], "--drop_overlap"),
        *("--test_file", str(args.data / "test.jsonl"), "--max_length", str(args.max_length)),
        *("--max_eval_samples", str(args.questions), "--max_steps", str(args.steps), "--per_device_train_batch_size", "8"),
        *("--learning_rate", "1e-3", "--warmup_steps", "10", "--save_strategy", "no", "--eval_strategy", "no"),
        *("--logging_strategy", "no", "--report_to", "none", "--use_cpu", "--disable_tqdm", "true", "--seed", str(seed)),
    ]
    recipe, _, arguments = parse(flags)
    encoder = QuestionEncoder(AutoTokenizer.from_pretrained(args.base), args.max_length)
    if seed not in _QUESTIONS:
        _QUESTIONS[seed] = load_questions(recipe, HUB, ASKS, encoder, seed)
    return arguments, encoder, _QUESTIONS[seed]


def make_cell(args: argparse.Namespace, score: str, ratio: str, seed: int) -> dict[str, Any]:
    """Train and test one model."""
    arguments, encoder, questions = prepare(args, seed)
    held, train = questions["train"][:CALIBRATION], questions["train"][CALIBRATION:]
    examples = [encoder.example(question, question.right) for question in train]
    common = {"train_dataset": examples, "data_collator": encoder.collate, "processing_class": encoder.tokenizer}
    set_seed(seed)
    model, start = load(str(args.base)), time.process_time()
    if score == FULL:
        Trainer(model, arguments, **common).train()
    elif score != BASE:
        by_choices = SCORES[score].get("scan_metric") == "choice_accuracy"
        calibration = encoder.rows(held) if by_choices else [encoder.example(question, question.right) for question in held]
        trim = TrimConfig(
            target_layers=args.layers,
            drop_every=str(args.drop_every),
            protect_first=args.protect,
            protect_last=args.protect,
            trainable_ratio=RATIOS[ratio],
            warm_up_importance="none",  # each row is to be by its own score, also where that ranks noise
            calibration_seed=seed,
            repair="none",
            **SCORES[score],
        )
        TrimTrainer(model, arguments, trim=trim, calibration_dataset=calibration, **common).train()
    seconds = time.process_time() - start
    model.save_pretrained(args.out / "run")
    loaded = load(str(args.out / "run")).eval()
    right = [encoder.example(question, question.right) for question in questions["test"]]
    return {
        "score": score,
        "ratio": ratio,
        "seed": seed,
        "kept": list(LayerMap.from_config(loaded.config).kept_layers),
        **general_loss(loaded, right, encoder, 32),
        **score_questions(loaded, questions["test"], encoder, 32),
        "cpu_seconds": seconds,
        "steps": args.steps,
        "drop_every": args.drop_every,
        "protect": args.protect,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cells(seeds: Sequence[int]) -> list[tuple[str, str, int]]:
    of_seed = [(BASE, "1"), (FULL, "1"), *((score, ratio) for score in SCORES for ratio in RATIOS)]
    return [(score, ratio, seed) for seed in seeds for score, ratio in of_seed]


def mean(values: Sequence[float], digits: int) -> str:
    """Mean and its standard error over the seeds."""
    told = f"{statistics.mean(values):.{digits}f}"
    return f"{told} ± {statistics.stdev(values) / sqrt(len(values)):.{digits}f}" if len(values) > 1 else told


def table(found: Sequence[dict[str, Any]]) -> str:
    """Two tables of all cells that there are: loss and accuracy, and by how much the loss is above that of random."""
    of: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for cell in found:
        of.setdefault((cell["score"], cell["ratio"]), {})[cell["seed"]] = cell
    questions = {cell["questions"] for cell in found}
    lines = [f"Questions: {questions}. Seeds: {sorted({cell['seed'] for cell in found})}.", ""]
    for title, key, digits in (("loss on held-out answers", "loss", 3), ("accuracy", "accuracy", 3)):
        lines += [f"| {title} | {' | '.join(f'r = {ratio}' for ratio in RATIOS)} |", f"|---|{'---|' * len(RATIOS)}"]
        for score in (BASE, FULL, *SCORES):
            rows = [of.get((score, ratio), {}) for ratio in RATIOS]
            told = [mean([row[seed][key] for seed in sorted(row)], digits) if row else "-" for row in rows]
            lines.append(f"| {score} | {' | '.join(told)} |")
        lines.append("")
    lines += [
        "| loss, less that of `random` at the same seed and r | " + " | ".join(f"r = {ratio}" for ratio in RATIOS) + " |"
    ]
    lines += [f"|---|{'---|' * len(RATIOS)}"]
    for score in list(SCORES)[:-1]:
        told = []
        for ratio in RATIOS:
            row, other = of.get((score, ratio), {}), of.get(("random", ratio), {})
            both = sorted(row.keys() & other.keys())
            told.append(mean([row[seed]["loss"] - other[seed]["loss"] for seed in both], 3) if both else "-")
        lines.append(f"| {score} | {' | '.join(told)} |")
    lines += ["", "Layers kept, by seed:", ""]
    for (score, ratio), row in of.items():
        if score in SCORES:
            lines.append(f"- {score}, r = {ratio}: {', '.join(str(row[seed]['kept']) for seed in sorted(row))}")
    errors = [cell["standard_error"] for cell in found]
    lines += ["", "CPU seconds of training, scores included, mean over ratios and seeds:", ""]
    for score in (FULL, *SCORES):
        lines.append(f"- {score}: {statistics.mean([c['cpu_seconds'] for c in found if c['score'] == score] or [0]):.1f}")
    lines += ["", f"Standard error of an accuracy by its questions alone: {statistics.mean(errors):.3f}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/medquad", help="train, valid, test.jsonl")
    parser.add_argument("--base", type=Path, default=ROOT.parent / "shared/models/stories260K")
    parser.add_argument("--layers", type=int, default=3, help="that are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--protect", type=int, default=0, help="layers at each end that stay, whatever their score")
    parser.add_argument("--drop_every", type=int, default=20, help="steps; the paper drops after each epoch")
    parser.add_argument("--questions", type=int, default=200, help="to test on")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    args = parser.parse_args()
    logging.set_verbosity_error()
    (args.out / "cells").mkdir(parents=True, exist_ok=True)
    for score, ratio, seed in cells(args.seeds):
        name = f"{score}-{ratio}-{seed}".replace(" ", "_").replace("/", "of").replace(",", "")
        file = args.out / "cells" / f"{name}.json"
        if not file.exists():
            cell = make_cell(args, score, ratio, seed)
            file.write_text(json.dumps(cell, indent=2) + "\n")
            print(
                f"{score}, r = {ratio}, seed {seed}: {cell['loss']:.3f}, {cell['accuracy']:.3f}, {cell['kept']}", flush=True
            )
    told = table([json.loads(file.read_text()) for file in sorted((args.out / "cells").glob("*.json"))])
    (args.out / "table.md").write_text(told)
    print(told)


if __name__ == "__main__":
    main()
