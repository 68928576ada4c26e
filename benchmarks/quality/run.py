"""Fine-tune a base on one domain by one method, and measure what came of it: one line of results.

    python benchmarks/quality/run.py --domain legal --method default --layers 6 --seed 0

Domains; all but the last are questions with choices, answered with the choice of the highest log-likelihood:

    medical   what a passage of MedQuAD tells about: the most frequent types of question
    legal     what kind of clause a passage of CUAD is: the most frequent types
    finance   whether a financial tweet is bearish, bullish or neutral
    answers   which passage answers a question of MedQuAD, among four to the same type of question about other diseases
    writing   the answer to a question of MedQuAD, as much of it as fits: loss per token

Every method sees the same questions in the same order in a seed, and as many of them; some of the training questions are
set aside to score layers by, for all methods alike. Models are tested on the test split (of the tweets, the validation
split). The loss on a book tells what is left of general English.

Time is that of training, scores and drops included: on the CPU the seconds of one thread, so that waiting for another
process does not count; on a GPU those of a clock, and none with --shared, when other runs use it at the same time. With
--evaluate_at the loss is measured along the way as well, on its own time; with --constant the learning rate stays where it
is after its warm-up, and each point is what a run of that length ends with: a run that was stopped has its place.
"""

import argparse
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results
import torch
import transformers
from clocks import Curve, Stopwatch
from methods import METHODS, Method
from tasks import DOMAINS, Example, examples, load_encoder, loss_per_token, make_questions, pieces_of_book
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from trimllm_hf import LayerMap, TrimConfig, TrimTrainer, drop_layers, repair_layers
from trimllm_hf.training import schedule

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "recipes"))

from questions.choice_accuracy import Question, QuestionEncoder, score_questions  # noqa: E402

WARM_UP = schedule.WARM_UP


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


def repair_batches(questions: list[Question], encoder: QuestionEncoder) -> list[dict[str, Any]]:
    """Training examples for a repair before the Trainer: as many as a run's own repair takes, and a few to judge by."""
    of_length = sorted(questions[:72], key=length)
    cut = [of_length[start::18] for start in range(18)]  # examples of all lengths in each
    return [dict(encoder.collate(examples(batch, encoder))) for batch in cut]


class Drops(TrainerCallback):
    """Keeps when how many layers were left."""

    def __init__(self) -> None:
        self.found: dict[int, int] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "trim/num_layers" in logs:
            self.found[state.global_step] = int(logs["trim/num_layers"])


def steps_for_the_time_of(args: argparse.Namespace) -> int:
    """How many steps this method gets in the time of another, by what both took at this seed, or at the first.

    Raises:
        ValueError: If the other, or the same method at equal steps, was not run yet, or neither was timed.
    """
    both = str(METHODS[args.method].time_of), args.method.removesuffix("-time")
    found = results.read(args.results)
    for seed in (args.seed, 0):
        runs = [found.get((args.domain, name, args.layers, seed, args.steps)) for name in both]
        other, same = (run and run["seconds"] for run in runs)
        if other and same:
            return round(args.steps * other / same)
    raise ValueError(f"Expected the seconds of {both[0]} and {both[1]} in {args.results}, got none. Run both first, alone.")


def train(
    args: argparse.Namespace,
    steps: int,
    train: list[Question],
    test: list[Example],
    encoder: QuestionEncoder,
    say: Callable[[dict[str, Any]], None],
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that the method makes, and what it took; `say` is told how the loss falls."""
    method = METHODS[args.method]
    held, rest = train[: args.set_aside][: args.calibration], train[args.set_aside :]
    held = sorted(held, key=length)
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    depth = model.config.num_hidden_layers
    if method.from_scratch:
        model.config.num_hidden_layers = args.layers
        model = LlamaForCausalLM(model.config)
    arguments = TrainingArguments(
        output_dir=str(args.results.parent),  # nothing is saved
        max_steps=steps,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant_with_warmup" if args.constant else "linear",
        warmup_steps=20,
        bf16=args.bf16,
        logging_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        include_num_input_tokens_seen="non_padding",
        use_cpu=args.device == "cpu",
        seed=args.seed,
    )
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    drops, choosing = Drops(), Stopwatch(clock)
    curve = Curve([*args.evaluate_at, steps], clock, lambda model: measure(model, test, encoder, args), say)
    common: dict[str, Any] = {
        "train_dataset": examples(rest, encoder),
        "data_collator": encoder.collate,
        "processing_class": encoder.tokenizer,
        "callbacks": [drops, choosing.before],
    }
    start = clock()
    if method.only_head:
        last = list(range(args.layers, depth))
        if method.repaired:
            repair_layers(model, last, repair_batches(rest, encoder))
        drop_layers(model, last)
        tune_only_the_end(model)
    if method.trim is None or method.only_head:
        trainer: Trainer = Trainer(model, arguments, **common)
    else:
        schedule.WARM_UP = WARM_UP if method.warm_up is None else method.warm_up
        calibration: Any = encoder.rows(held[::4]) if method.by_choices else examples(held, encoder)
        trim = make_trim(method, method.trim, args.layers, depth, steps, args.seed)
        trainer = TrimTrainer(model, arguments, trim=trim, calibration_dataset=calibration, **common)
    trainer.add_callback(choosing.after)  # behind what drops layers
    trainer.add_callback(curve)
    curve.began = start
    trainer.train()
    seconds = clock() - start - curve.seconds
    return model, {
        "seconds": None if args.shared else seconds,
        "choosing_seconds": None if args.shared else choosing.seconds,
        "depth_after_step": drops.found,
        "curve": curve.points,
    }


def measure(model: nn.Module, pieces: list[Example], encoder: QuestionEncoder, args: argparse.Namespace) -> float:
    """Loss per labelled token."""
    with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
        return loss_per_token(model, pieces, encoder, 8 if args.device == "cpu" else 32)


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
    parser.add_argument("--constant", action="store_true", help="whether the learning rate does not fall after its warm-up")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, with weights in float32")
    parser.add_argument("--evaluate_at", nargs="*", type=int, default=[], help="steps, beside the last; 0: before the first")
    parser.add_argument("--questions", type=int, default=300, help="to test on, at most")
    parser.add_argument("--set_aside", type=int, default=64, help="training questions that no method trains on")
    parser.add_argument("--calibration", type=int, default=64, help="how many of these score the layers")
    parser.add_argument("--words", type=int, default=32, help="of a passage")
    parser.add_argument("--max_length", type=int, default=128, help="tokens that a model reads")
    parser.add_argument("--labels", type=int, default=6, help="to choose from, at most")
    parser.add_argument("--book_pieces", type=int, default=100, help="of the book")
    parser.add_argument("--results", type=Path, default=HERE / "results/12x96.jsonl", help="the base's file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shared", action="store_true", help="other runs use the GPU too: no time is recorded")
    args = parser.parse_args(flags)
    torch.set_num_threads(1)
    torch.backends.cuda.enable_cudnn_sdp(False)  # on a Hopper GPU its gradients can be NaN: pytorch/pytorch#196678
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU; nothing on a CPU
    logging.set_verbosity_error()

    encoder = load_encoder(args.base, args.max_length)
    learned, tested = make_questions(args, encoder)
    steps = args.steps if METHODS[args.method].time_of is None else steps_for_the_time_of(args)
    told: dict[str, Any] = {
        "domain": args.domain,
        "method": args.method,
        "target": AutoConfig.from_pretrained(args.base).num_hidden_layers if args.method == "full" else args.layers,
        "seed": args.seed,
        "steps": steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "constant": args.constant,
        "bf16": args.bf16,
        "calibration": args.calibration,
        "words": args.words,
        "max_length": args.max_length,
        "machine": machine(args.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    points: list[dict[str, Any]] = []

    def so_far(point: dict[str, Any]) -> None:
        """A run that is stopped leaves what it has measured."""
        points.append(point)
        print(point, flush=True)
        if args.evaluate_at:
            results.add(args.results, {**told, "questions": len(tested), "curve": points, "unfinished": True})

    model, cost = train(args, steps, learned, examples(tested, encoder), encoder, so_far)
    chosen: dict[str, Any] = {"questions": len(tested)}
    if len(tested[0].choices) > 1:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            chosen = score_questions(model, tested, encoder, 64)
        frequent = Counter(question.answer for question in tested).most_common(1)[0][1]
        chosen["always_the_same_answer"] = frequent / len(tested)
    book = pieces_of_book(args.data, encoder, args.book_pieces)
    told |= {
        "layers": model.config.num_hidden_layers,
        **cost,
        **chosen,
        "answer_loss": cost["curve"][-1]["loss"],
        "book_loss": measure(model, book, encoder, args),
        "kept_layers": list(LayerMap.from_config(model.config).kept_layers),
        "trained_questions": steps * args.batch_size,
    }
    results.add(args.results, told)
    took = "" if args.shared else f", {told['seconds']:.0f} s"
    named = f"{args.domain}-{args.method}-{told['target']}-{args.seed}"
    print(f"{named}: accuracy {told.get('accuracy', '-')}, loss {told['answer_loss']:.3f}{took}", flush=True)


def machine(device: str) -> str:
    """What the processor calls itself."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    told = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in told if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
