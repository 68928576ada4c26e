"""Fine-tune the small base on one domain by one method, and measure what came of it: one file of results.

    python benchmarks/quality/run.py --domain legal --method default --layers 6 --seed 0

Domains, each a question with choices, answered with the choice of the highest log-likelihood:

    medical   what a passage of MedQuAD tells about: the most frequent types of question
    legal     what kind of clause a passage of CUAD is: the most frequent types
    finance   whether a financial tweet is bearish, bullish or neutral
    answers   which passage answers a question of MedQuAD, among four to the same type of question about other diseases

Every method sees the same questions in the same order in a seed, and as many of them; 64 of the training questions are set
aside to score layers by, for all methods alike. Models are tested on the test split (of the tweets, the validation split).
The loss on a held-out book tells what is left of general English.

Time is that of training, scores and drops included: on the CPU the seconds of one thread, so that waiting for another
process does not count; on a GPU those of a clock, and none with --shared, when other runs use it at the same time.
"""

import argparse
import json
import platform
import random
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from methods import METHODS, Method
from pretrain import HELD_OUT
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from trimllm_hf import LayerMap, TrimConfig, TrimTrainer, drop_layers
from trimllm_hf.choice_accuracy import Question, QuestionEncoder, score_questions
from trimllm_hf.training import schedule

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "recipes"))

from domain.general_text import general_loss  # noqa: E402
from domain.questions import Asking  # noqa: E402
from domain.questions import make_questions as ask  # noqa: E402

DOMAINS = {  # folder, test split, field of the text, field of the label, the question
    "medical": ("medquad", "test", "answer", "qtype", "What is this about?"),
    "legal": ("cuad_clauses", "test", "text", "label", "What kind of clause is this?"),
    "finance": ("twitter_financial_news", "valid", "text", "label", "Is this bearish, bullish or neutral?"),
    "answers": ("medquad", "test", "answer", "qtype", ""),  # each row has its question
}
MAX_LENGTH = 128
CALIBRATION = 64  # training questions; a scan by accuracy, which reads every choice, gets a quarter of them
WARM_UP = schedule.WARM_UP


@cache
def load_encoder(base: Path) -> QuestionEncoder:
    """The base's encoder, which keeps what it has encoded: once for all runs of a process."""
    return QuestionEncoder(AutoTokenizer.from_pretrained(base), MAX_LENGTH)


def read(args: argparse.Namespace, split: str) -> list[dict[str, str]]:
    """The rows of a split, their passages cut to the first words."""
    folder, _, text, label, _ = DOMAINS[args.domain]
    with (args.data / folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [{**row, text: " ".join(row[text].split()[: args.words]), label: row[label].lower()} for row in rows]


def make_questions(args: argparse.Namespace, encoder: QuestionEncoder) -> tuple[list[Question], list[Question]]:
    """Questions to train and to test on, in the order of the seed; no passage is in both."""
    _, test, text, label, asked = DOMAINS[args.domain]
    rows = {split: read(args, split) for split in ("train", test)}
    labels = tuple(label for label, _ in Counter(row[label] for row in rows["train"]).most_common(args.labels))
    held_out = {row[text] for row in rows[test]}
    made = []
    for split, of_split in rows.items():
        kept = [row for row in of_split if split == test or row[text] not in held_out]
        if asked:
            pairs = sorted({(row[text], row[label]) for row in kept if row[label] in labels})
            random.Random(args.seed).shuffle(pairs)
            made.append([Question(asked, labels, labels.index(right), context=passage) for passage, right in pairs])
        else:
            random.Random(args.seed).shuffle(kept)
            made.append(ask(kept, split, encoder, args.seed, Asking("")))
    return made[0], made[1][: args.questions]


def length(question: Question) -> int:
    """Characters that are read: what is alike in length shares a batch, and is padded little."""
    return len(question.context or question.right)


def make_trim(method: Method, settings: dict[str, Any], layers: int, depth: int, steps: int, seed: int) -> TrimConfig:
    """The settings of a trimming method for this run."""
    halves = 2 if settings.get("unit") == "sublayer" else 1
    if method.evenly:
        drops = (depth - layers) * halves
        settings = {**settings, "drop_every": str(max(1, steps // (drops + 1)))}
    return TrimConfig(target_layers=layers * halves, calibration_seed=seed, **settings)


def tune_only_the_end(model: LlamaForCausalLM) -> None:
    """Freeze all but the head, the last norm and the last three blocks."""
    model.requires_grad_(False)
    for module in (model.lm_head, model.model.norm, *model.model.layers[-3:]):
        module.requires_grad_(True)


class Drops(TrainerCallback):
    """Keeps when how many layers were left."""

    def __init__(self) -> None:
        self.found: dict[int, int] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "trim/num_layers" in logs:
            self.found[state.global_step] = int(logs["trim/num_layers"])


def pieces_of_book(data: Path, encoder: QuestionEncoder) -> list[dict[str, list[int]]]:
    """Pieces of the book that the base has not read, each as long as the context."""
    ids = encoder.tokenizer((data / "general_books" / HELD_OUT).read_text(encoding="utf-8"), verbose=False).input_ids
    pieces = [ids[start : start + MAX_LENGTH] for start in range(0, 100 * MAX_LENGTH, MAX_LENGTH)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def steps_for_the_time_of(args: argparse.Namespace) -> int:
    """How many steps this method gets in the time of another, by what both took at this seed, or at the first.

    Raises:
        FileNotFoundError: If the other, or the same method at equal steps, was not run yet.
    """
    both = METHODS[args.method].time_of, args.method.removesuffix("-time")
    for seed in (args.seed, 0):
        other, same = (json.loads(file_of(args, str(name), seed).read_text())["seconds"] for name in both)
        if other and same:
            return round(args.steps * other / same)
    raise FileNotFoundError(f"Expected the seconds of {' and '.join(map(str, both))}, got --shared runs: run both alone.")


def file_of(args: argparse.Namespace, method: str, seed: int) -> Path:
    layers = "full" if method == "full" else args.layers
    return args.results / f"{args.domain}-{method}-{layers}-{seed}.json"


def train(args: argparse.Namespace, train: list[Question], encoder: QuestionEncoder) -> tuple[nn.Module, dict[str, Any]]:
    """The model that the method makes, and what it took."""
    method = METHODS[args.method]
    steps = args.steps if method.time_of is None else steps_for_the_time_of(args)
    held, rest = sorted(train[:CALIBRATION], key=length), train[CALIBRATION:]
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.base)
    depth = model.config.num_hidden_layers
    if method.from_scratch:
        model.config.num_hidden_layers = args.layers
        model = LlamaForCausalLM(model.config)
    arguments = TrainingArguments(
        output_dir=str(args.results),  # nothing is saved
        max_steps=steps,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=20,
        logging_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=args.device == "cpu",
        seed=args.seed,
    )
    drops = Drops()
    common: dict[str, Any] = {
        "train_dataset": [encoder.example(question, question.right) for question in rest],
        "data_collator": encoder.collate,
        "processing_class": encoder.tokenizer,
        "callbacks": [drops],
    }
    if method.only_head:
        drop_layers(model, list(range(args.layers, depth)))
        tune_only_the_end(model)
    if method.trim is None or method.only_head:
        trainer: Trainer = Trainer(model, arguments, **common)
    else:
        schedule.WARM_UP = WARM_UP if method.warm_up is None else method.warm_up
        calibration = encoder.rows(held[::4]) if method.by_choices else [encoder.example(q, q.right) for q in held]
        trim = make_trim(method, method.trim, args.layers, depth, steps, args.seed)
        trainer = TrimTrainer(model, arguments, trim=trim, calibration_dataset=calibration, **common)
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    start = clock()
    trainer.train()
    seconds = None if args.shared else clock() - start
    return model, {"seconds": seconds, "steps": steps, "depth_after_step": drops.found}


def main(flags: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--base", type=Path, default=Path.home() / ".cache/trimllm_hf/base")
    parser.add_argument("--domain", choices=DOMAINS, required=True)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--layers", type=int, default=6, help="blocks that are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--questions", type=int, default=300, help="to test on, at most")
    parser.add_argument("--words", type=int, default=32, help="of a passage")
    parser.add_argument("--labels", type=int, default=6, help="to choose from, at most")
    parser.add_argument("--results", type=Path, default=HERE / "results/12x96")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shared", action="store_true", help="other runs use the GPU too: no time is recorded")
    args = parser.parse_args(flags)
    torch.set_num_threads(1)
    torch.backends.cuda.enable_cudnn_sdp(False)  # on a Hopper GPU its gradients can be NaN: pytorch/pytorch#196678
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU; nothing on a CPU
    logging.set_verbosity_error()

    encoder = load_encoder(args.base)
    learned, tested = make_questions(args, encoder)
    model, cost = train(args, learned, encoder)
    right = [encoder.example(question, question.right) for question in tested]
    frequent = Counter(question.answer for question in tested).most_common(1)[0][1]
    told = {
        "domain": args.domain,
        "method": args.method,
        "layers": model.config.num_hidden_layers,
        "seed": args.seed,
        **cost,
        **score_questions(model, tested, encoder, 64),
        "always_the_same_answer": frequent / len(tested),
        "answer_loss": general_loss(model, right, encoder, 32)["loss"],
        "book_loss": general_loss(model, pieces_of_book(args.data, encoder), encoder, 25)["loss"],
        "kept_layers": list(LayerMap.from_config(model.config).kept_layers),
        "trained_questions": cost["steps"] * args.batch_size,
        "learning_rate": args.learning_rate,
        "words": args.words,
        "base": json.loads((args.base / "base.json").read_text())["tokens_seen"],
        "machine": platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    file = file_of(args, args.method, args.seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told, indent=2) + "\n")
    took = "" if args.shared else f", {told['seconds']:.0f} s"
    print(f"{file.stem}: accuracy {told['accuracy']:.3f}, loss {told['answer_loss']:.3f}{took}", flush=True)


if __name__ == "__main__":
    main()
