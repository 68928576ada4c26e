"""The table of docs/architectures.md: every causal-LM type of the installed transformers, through both checks.

`python tests/zoo/sweep.py` writes it (a few minutes on one core); the slow test compares it with what it finds.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from check import Outcome, check_blocks
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"
SECONDS = 90  # for one type


class TooSlow(BaseException):
    """A type took longer than it may; not an Exception, so that no check takes it for a finding."""


def run(
    types: Iterable[str], check: Callable[[Any, str], Outcome] = check_blocks, auto: Any = AutoModelForCausalLM
) -> list[Outcome]:
    """Check types one after the other, each within its time."""

    def alarm(*_: Any) -> None:
        raise TooSlow

    previous = signal.signal(signal.SIGALRM, alarm)
    outcomes = []
    try:
        for model_type in types:
            signal.alarm(SECONDS)
            try:
                outcomes.append(check(auto, model_type))
            except TooSlow:
                outcomes.append(Outcome(model_type, "unbuilt", f"took more than {SECONDS} s"))
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, previous)
    return outcomes


def counts(outcomes: Iterable[Outcome]) -> str:
    """One line, e.g. "exact 170, refused 10, unbuilt 9"."""
    return ", ".join(f"{status} {number}" for status, number in sorted(Counter(o.status for o in outcomes).items()))


def table(blocks: list[Outcome], sublayers: list[Outcome]) -> str:
    """The page, without the versions that stand in its first lines."""
    halves = {outcome.model_type: outcome for outcome in sublayers}
    rows = ["| type | class | blocks | sublayers | remark |", "|---|---|---|---|---|"]
    for outcome in blocks:
        half = halves.get(outcome.model_type)
        remark = outcome.detail or (half.detail if half is not None and half.status != "exact" else "")
        remark = remark.replace("|", "/").replace("\n", " ")
        cells = [f"`{outcome.model_type}`", outcome.class_name, outcome.status, half.status if half else "", remark[:200]]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"Blocks: {counts(blocks)}. Sublayers: {counts(sublayers)}.", "", *rows, ""])


INTRODUCTION = """# Architectures

Every causal-LM type of transformers {version}, with a tiny random model each: two blocks that are not adjacent dropped,
compared with hooks that skip them, saved, reloaded in stock transformers without a missing or unexpected key, cached
`generate()` compared with uncached. Written by `python tests/zoo/sweep.py`; do not edit.

*exact*: all of that holds. *refused*: `drop_layers` says why and the model is as before. *unbuilt*: no tiny model could be
built here. A remark at an exact type names layers that cannot go.

"""


def main() -> None:
    """Write the page."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    types = sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    text = table(run(types), [])
    print(text)
    if not sys.argv[1:]:
        DOCS.parent.mkdir(exist_ok=True)
        DOCS.write_text(INTRODUCTION.format(version=transformers.__version__) + text, encoding="utf-8")


if __name__ == "__main__":
    main()
