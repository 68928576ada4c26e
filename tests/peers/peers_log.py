"""A plugin for pytest: a line of JSON for each test of a peer's, which goes on where it stopped.

A plugin beside it counts in `models` what a test had of trimmed models.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_peft import in_rounds, number_of

MODE = os.environ["PEERS_MODE"]
LOG = Path(os.environ["PEERS_LOG"])
ONLY = set(Path(os.environ["PEERS_ONLY"]).read_text().split("\n")) if "PEERS_ONLY" in os.environ else None
SHARE = float(os.environ.get("PEERS_SHARE", "1"))
DEADLINE = float(os.environ.get("PEERS_DEADLINE", "inf"))
models: Counter[str] = Counter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = {json.loads(line)["id"] for line in LOG.read_text().splitlines()} if LOG.is_file() else set()
    wanted = {item.nodeid for item in items if ONLY is None or item.nodeid in ONLY} - done
    wanted = {name for name in wanted if number_of(name) < SHARE * 16**8}
    by_name = {item.nodeid: item for item in items}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
    items[:] = [by_name[name] for name in in_rounds(wanted)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > DEADLINE:
        pytest.exit("no time is left", returncode=0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    models.clear()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = (yield).get_result()
    if report.when != "call" and report.outcome == "passed":
        return
    said = f"{call.excinfo.typename}: {str(call.excinfo.value)[:500]}" if report.failed and call.excinfo else ""
    line = {"id": item.nodeid, "when": report.when, "outcome": report.outcome, "trimmed": models["trimmed"], "said": said}
    line["seconds"] = round(report.duration, 2)
    with LOG.open("a") as log:
        log.write(json.dumps(line) + "\n")
