"""The table of docs/architectures.md: every type of the installed transformers, through a drop of blocks and of sublayers.

`python tests/zoo/sweep.py` writes it (some minutes on two cores); `python tests/zoo/sweep.py llama t5` prints the rows of
some types; the slow test compares the page with what it finds.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
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


def run(kinds: Iterable[Kind], check: Check = check_blocks, only: Sequence[str] = ()) -> dict[str, list[Outcome]]:
    """Check every type of some kinds, or `only` some of them, in two processes."""
    wanted = {kind.name: [t for t in kind.types() if not only or t in only] for kind in kinds}
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        futures = {
            name: [pool.submit(check_in_time, check, name, model_type) for model_type in types]
            for name, types in wanted.items()
        }
        return {name: [future.result() for future in those] for name, those in futures.items()}


def counts(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many types came out how."""
    found = Counter(outcome.status for outcome in outcomes)
    return {status: found[status] for status in ("exact", "refused", "unbuilt", "wrong", "crash")}


def page(blocks: dict[str, list[Outcome]], sublayers: dict[str, list[Outcome]]) -> str:
    """The page: the counts, then a row for each type."""
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
            said = [outcome.detail, f"sublayers: {half.detail}" if half is not None and half.detail else ""]
            remark = "; ".join(filter(None, said)).replace("|", "/").replace("\n", " ")
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

Sublayers: an MLP and an attention of two blocks are dropped, compared with the model in which their weights are zero, saved,
and reloaded by the Auto classes after `import trimllm_hf`; stock transformers has to refuse the checkpoint.
"""


def main() -> None:
    """Write the page, or print the rows of the types named."""
    only = sys.argv[1:]
    text = page(run(KINDS.values(), only=only), run([CAUSAL], check_sublayers, only))
    print(text)
    if not only:
        DOCS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
