"""The table of docs/architectures.md: every type of the installed transformers, through a drop of blocks and of sublayers.

    python tests/zoo/sweep.py                                  # all: half an hour on two cores; writes the page
    python tests/zoo/sweep.py --results out.json --minutes 9   # as far as it gets; call it again until it is through
    python tests/zoo/sweep.py llama t5                         # prints the rows of some types

The slow tests compare the page with what they find.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from check import Outcome, check_blocks
from check_sublayers import check_sublayers
from kinds import CAUSAL, KINDS, Kind

DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"
SECONDS = 90  # for one type
PROCESSES = 2
AT_ONCE = 16  # types; then results are written, and the time is looked at
Check = Callable[[Kind, str], Outcome]


class TooSlow(BaseException):
    """A type took longer than it may; not an Exception, so that no check takes it for a finding."""


def check_in_time(check: Check, kind_name: str, model_type: str) -> Outcome:
    """One type, within its time."""

    def alarm(*_: Any) -> None:
        raise TooSlow

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    previous = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(SECONDS)
    try:
        return check(KINDS[kind_name], model_type)
    except TooSlow:
        return Outcome(model_type, "unbuilt", f"took more than {SECONDS} s")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def workers() -> ProcessPoolExecutor:
    """The processes that `run` works in."""
    return ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn"))


def run(pool: ProcessPoolExecutor, kind: Kind, check: Check, types: Iterable[str]) -> list[Outcome]:
    """Check some types of a kind."""
    futures = [pool.submit(check_in_time, check, kind.name, model_type) for model_type in types]
    return [future.result() for future in futures]


def counts(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many types came out how."""
    found = Counter(outcome.status for outcome in outcomes)
    return {status: found[status] for status in ("exact", "refused", "unbuilt", "wrong", "crash")}


def first_sentence(text: str, most: int = 240) -> str:
    """What fits into a row: the first sentence, or of a long one as many words as fit."""
    text = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text, maxsplit=1)[0].rstrip(".")
    return text if len(text) <= most else text[: text.rindex(" ", 0, most)] + " …"


def page(blocks: dict[str, list[Outcome]] | None = None, sublayers: dict[str, list[Outcome]] | None = None) -> str:
    """The page: the counts, then a row for each type."""
    blocks, sublayers = blocks or {}, sublayers or {}
    lines = [INTRODUCTION.format(version=transformers.__version__)]
    lines += [
        "| models | unit | types | exact | refused | could not be built | wrong | crash |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for unit, outcomes in (("blocks", blocks), ("sublayers", sublayers)):
        for name, those in outcomes.items():
            number = counts(those)
            lines.append(f"| {name} | {unit} | {len(those)} | {' | '.join(map(str, number.values()))} |")
    lines += ["", "| models | type | class | blocks | sublayers | remark |", "|---|---|---|---|---|---|"]
    for name, those in blocks.items():
        halves = {outcome.model_type: outcome for outcome in sublayers.get(name, [])}
        for outcome in those:
            half = halves.get(outcome.model_type)
            said = [("", outcome.detail)]
            if half is not None and half.detail != outcome.detail:
                said.append(("sublayers: ", half.detail))
            remark = "; ".join(unit + first_sentence(detail) for unit, detail in said if detail).replace("|", "/")
            cells = [
                name,
                f"`{outcome.model_type}`",
                outcome.class_name,
                outcome.status,
                half.status if half else "",
                remark,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


INTRODUCTION = """# Architectures

Every type of the installed transformers ({version}), by task, with a tiny random model each: layers that are not adjacent
dropped, twice, from two choices of layers; compared with hooks that skip them; saved and reloaded in stock transformers
without a missing or unexpected key, logits equal; cached `generate()` equal to uncached. Written by
`python tests/zoo/sweep.py`; do not edit.

*exact*: all of that holds. *refused*: `drop_layers` says why, and the model (weights, attributes, configs) is as before.
*could not be built*: no tiny model could be made here, or it did not run on token ids alone. A remark at an exact type says
which layers cannot go and why, or what could not be compared.

Sublayers: an MLP and an attention of two blocks (where no such pair may go, one MLP) are dropped, compared with the model in
which their weights are zero, saved, and reloaded by the Auto classes after `import trimllm_hf`; a stock class
that is named outright builds the same model there, or refuses; a stock config refuses.
"""


PARTS: list[tuple[str, Kind, Check]] = [
    *(("blocks", kind, check_blocks) for kind in KINDS.values()),
    ("sublayers", CAUSAL, check_sublayers),
]


def main() -> None:
    """Check what is not in the results yet; write the page once all is there, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="only these, printed")
    parser.add_argument("--results", type=Path, help="a JSON file that keeps what was found, and is read again")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    kept = arguments.results
    found: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    units: dict[str, dict[str, list[Outcome]]] = {"blocks": {}, "sublayers": {}}
    with workers() as pool:
        for unit, kind, check in PARTS:
            wanted = [t for t in kind.types() if not arguments.types or t in arguments.types]
            missing = [t for t in wanted if f"{unit}/{kind.name}/{t}" not in found]
            for start in range(0, len(missing), AT_ONCE):
                for outcome in run(pool, kind, check, missing[start : start + AT_ONCE]):
                    found[f"{unit}/{kind.name}/{outcome.model_type}"] = asdict(outcome)
                if kept:
                    kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
                if time.monotonic() > end:
                    raise SystemExit(f"{len(found)} checked; run it again")
            units[unit][kind.name] = [Outcome(**found[f"{unit}/{kind.name}/{t}"]) for t in wanted]
    text = page(**units)
    print(text)
    if not arguments.types:
        DOCS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
