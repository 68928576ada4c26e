"""What a Trainer knows about the run that produced a model: steps, settings, data, log, command, versions."""

from __future__ import annotations

import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_pt_utils import AcceleratorConfig

from ..publish.card_data import Quality, Score
from .selection import takes_calibration_examples

PACKAGES = ("trimllm_hf", "torch", "transformers", "accelerate", "datasets", "huggingface_hub", "peft", "trl")
MOST_COMPARED = 20_000  # examples that are compared token by token to detect overlap between two sets
_NONE: tuple[Any, ...] = (None, "", "none", "no", [], {}, False)
SECRET = re.compile(r"(^|[-_])(token|secret|password|api[-_]?key)$", re.IGNORECASE)


def describe_run(trainer: Trainer, callback: Any, calibration: Any) -> dict[str, Any]:
    """The card's `training` as plain values, without local paths and secrets.

    Args:
        trainer: The Trainer, during or after training.
        callback: Its TrimCallback.
        calibration: The examples used to score layers, if the Trainer holds them.
    """
    args, state = trainer.args, trainer.state
    layer_map = callback.layer_map
    steps = [record.step for record in layer_map.history if record.step is not None] if layer_map else []
    sets = {"training": trainer.train_dataset, "calibration": calibration, "evaluation": trainer.eval_dataset}
    took = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    record = callback.record
    step = (record and record.model_step) or state.global_step
    return {
        "steps": step,
        "epochs": state.epoch if state.epoch is None else state.epoch * step / max(1, state.global_step),
        "healed_steps": step - max(steps) if steps else None,
        "start_num_layers": record and record.start_num_layers,
        "asked_num_layers": record and record.asked_num_layers(callback.config.unit),
        "seconds": took[-1] if took else None,
        "metric": _metric(args),
        "calibration": _how_calibrated(callback),
        "examples": {name: n for name, held in sets.items() if (n := _length(held)) is not None},
        "shared_examples": shared_examples(sets),
        "repairs": [_plain(each) for each in (record.repairs if record else ()) if each["step"] in steps],
        "sources": {name: found for name, held in sets.items() if (found := source_of(held))},
        "trim_config": callback.config.to_dict(),
        "arguments": _arguments(args),
        "processes": args.world_size,
        "distributed": trainer.accelerator.distributed_type.value,
        "command": command(sys.argv),
        "versions": versions(),
        "scans": record.scans if record else [],
        "log": [{name: _plain(value) for name, value in entry.items()} for entry in state.log_history],
    }


def evaluated(trainer: Trainer) -> list[Quality]:
    """The Trainer's own measurements of the current model: its evaluation after the step of the model."""
    args, log = trainer.args, trainer.state.log_history
    record = trainer.trim_callback().record  # type: ignore[attr-defined]  # a CardMixin
    gone_back: int | None = record and record.model_step
    step = gone_back or trainer.state.global_step
    entries = [entry for entry in log if "eval_loss" in entry and entry["step"] <= step]
    if not entries or entries[-1]["step"] != step or args.load_best_model_at_end:
        return []
    at_start = entries[0] if entries[0]["step"] == 0 else {}
    n = _length(trainer.eval_dataset)
    if n is None:
        return []
    when = f"step {step}" if gone_back else "the last step"
    metrics = dict.fromkeys(("eval_loss", _metric(args)))
    return [
        Quality(
            metric=name.removeprefix("eval_"),
            trimmed=Score(entries[-1][name]),
            dataset="the evaluation set",
            split="all of it",
            n=n,
            base=Score(at_start[name]) if name in at_start else None,
            note=f"As the Trainer measured it after {when}; no interval was computed",
        )
        for name in metrics
        if math.isfinite(entries[-1].get(name, math.nan))
    ]


def _length(dataset: Any) -> int | None:
    """Number of examples, if known; None for several evaluation sets (a dict)."""
    return len(dataset) if hasattr(dataset, "__len__") and not isinstance(dataset, dict) else None


def _metric(args: Any) -> str:
    name = args.metric_for_best_model or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def versions() -> dict[str, str]:
    """The versions of Python and the packages that a run may depend on, if they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name in sys.modules and hasattr(sys.modules[name], "__version__"):
                found[name] = sys.modules[name].__version__
    return found


def command(argv: Sequence[str]) -> str | None:
    """The command line with relative paths and without secrets; None if the run was not a script."""
    if not argv or not argv[0] or not Path(argv[0]).is_file():
        return None
    words, hide = ["python", _relative(argv[0])], False
    for word in argv[1:]:
        flag, is_flag = word.partition("=")[0], word.startswith("-")
        if hide and not is_flag:
            hide = False
            continue
        hide = is_flag and bool(SECRET.search(flag)) and "=" not in word
        if is_flag and SECRET.search(flag):
            continue
        name, equals, value = word.partition("=") if is_flag else ("", "", word)
        words.append(f"{name}{equals}{_relative(value)}")
    return shlex.join(words)


def shared_examples(sets: dict[str, Any]) -> dict[str, int] | None:
    """How many examples each pair of sets has in common, by token ids; None if that cannot be determined."""
    held = {name: examples for name, examples in sets.items() if _length(examples)}
    if len(held) < 2 or sum(map(len, held.values())) > MOST_COMPARED:
        return None
    try:
        tokens = {name: {tuple(map(int, e["input_ids"])) for e in examples} for name, examples in held.items()}
    except (KeyError, TypeError, ValueError):
        return None
    names = list(tokens)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return {f"{a} and {b}": len(tokens[a] & tokens[b]) for a, b in pairs}


def source_of(dataset: Any) -> dict[str, str] | None:
    """The source of a `datasets.Dataset`: its id on the Hub, revision and split; None if unknown."""
    for url in getattr(getattr(dataset, "info", None), "download_checksums", None) or ():
        if match := re.match(r"hf://datasets/([^@]+)@([0-9a-f]{40})/", url):
            return {"dataset_id": match[1], "revision": match[2], "split": str(dataset.split or "")}
    return None


def _how_calibrated(callback: Any) -> str:
    if not takes_calibration_examples(callback.config):
        return "none"
    if callback.support.calibration_set_aside:
        return "set aside"
    return "drawn" if callback.calibration_dataset is None else "given"


def _arguments(args: Any) -> dict[str, Any]:
    """The training arguments that differ from the defaults, and the most important ones."""
    always = {"learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "optim"}
    always |= {"num_train_epochs", "max_steps", "seed", "weight_decay", "warmup_steps"}
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory() for field in fields(args)
    }
    told = {}
    for name, value in args.to_dict().items():
        default = _plain(defaults.get(name))
        if name == "accelerator_config":
            default = {key: AcceleratorConfig().to_dict()[key] for key in value}
        if SECRET.search(name) or (name not in always and (value == default or (not value and default in _NONE))):
            continue
        told[name] = _relative(value) if isinstance(value, str) else _plain(value)
    return dict(sorted(told.items()))


def _relative(text: str) -> str:
    """A path relative to the working directory, or only its name if it is outside; other text is returned unchanged."""
    if not os.path.isabs(text):
        return text
    relative = os.path.relpath(text)
    return Path(text).name if relative.startswith("..") else relative


def _plain(value: Any) -> Any:
    """A value for JSON."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON cannot represent these numbers
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(getattr(value, "value", value))
