"""A plugin for pytest that runs each test of a peer's in several modes, with a line of JSON for each; it goes on where it
stopped.

`PEERS_MODES` names the modes: the first one runs every test, `reloaded` those that loaded a trimmed model and passed, and
`untrimmed` those that failed. A plugin beside this one puts a function into `switches`, which is called with each mode, and
counts in `models` what a test had of trimmed models. Modes take turns every few tests, so that files are collected once.
"""

from __future__ import annotations

import gc
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_peft import in_rounds, number_of

MODES = os.environ["PEERS_MODES"].split()
LOGS = Path(os.environ["PEERS_LOGS"])
SHARE = float(os.environ.get("PEERS_SHARE", "1"))
DEADLINE = float(os.environ.get("PEERS_DEADLINE", "inf"))
TURN = 40  # tests
switches: list[Callable[[str], None]] = []
models: Counter[str] = Counter()


class Modes:
    """Which test is to run in which mode next, and what came of it in the others."""

    def __init__(self) -> None:
        self.done: dict[str, dict[str, dict[str, Any]]] = {mode: {} for mode in MODES}
        for mode in MODES:
            log = LOGS / f"{mode}.jsonl"
            lines = map(json.loads, log.read_text().splitlines()) if log.is_file() else []
            self.done[mode] = {line["id"]: line for line in lines}
        self.turns: list[tuple[str, str]] = []  # a mode and a test's name
        self.mode = ""
        self.alone = False  # whether the test that runs now is the last one in its mode for now

    def plan(self, names: set[str]) -> list[str]:
        """The names of tests in the order in which they run, most of them several times."""
        order = in_rounds(names)
        for turn in (order[start : start + TURN] for start in range(0, len(order), TURN)):
            self.turns += [(mode, name) for mode in MODES for name in turn if name not in self.done[mode]]
        self.turns.reverse()  # the next one is the last
        return [name for _, name in reversed(self.turns)]

    def is_wanted(self, name: str) -> bool:
        before = [self.done[mode][name] for mode in MODES if mode != self.mode and name in self.done[mode]]
        if self.mode == "reloaded":
            return bool(before and before[0]["outcome"] == "passed" and before[0]["trimmed"])
        return self.mode == MODES[0] or any(line["outcome"] == "failed" for line in before)

    def switch(self, mode: str) -> None:
        if mode != self.mode:
            self.mode = mode
            for function in switches:
                function(mode)


modes = Modes()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_name = {item.nodeid: item for item in items if number_of(item.nodeid) < SHARE * 16**8}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in by_name])
    items[:] = [by_name[name] for name in modes.plan(set(by_name))]


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # each collection, and each search of living modules, would walk the items: seconds for a drop


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if modes.alone:
        return None
    mode, _ = modes.turns.pop()
    modes.switch(mode)
    if nextitem is None or modes.turns[-1][0] == mode:
        return None
    modes.alone = True  # no fixture goes over into another mode
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
    modes.alone = False
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > DEADLINE:
        pytest.exit("no time is left", returncode=0)
    if not modes.is_wanted(item.nodeid):
        pytest.skip("not in this mode")


@pytest.fixture(autouse=True)
def seeded() -> None:
    models.clear()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = (yield).get_result()
    if (report.when != "call" and report.outcome == "passed") or not modes.is_wanted(item.nodeid):
        return
    said = f"{call.excinfo.typename}: {str(call.excinfo.value)[:500]}" if report.failed and call.excinfo else ""
    line = {"id": item.nodeid, "when": report.when, "outcome": report.outcome, "trimmed": models["trimmed"], "said": said}
    line["seconds"] = round(report.duration, 2)
    with (LOGS / f"{modes.mode}.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    modes.done[modes.mode][item.nodeid] = line
