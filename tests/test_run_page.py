"""The page of a run: one file, self-contained, of what the run's files say."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny import tiny_model
from typer.testing import CliRunner

from trimllm_hf import LayerMap, drop_layers
from trimllm_hf.cli import app
from trimllm_hf.publish.run_page import drops, points, read_run, render_run

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder: six layers, of which two went at steps 2 and 4; a scoring; a log."""
    layer_map = LayerMap.from_config(tiny_model().config)
    layer_map = layer_map.drop([4], step=2, importance="sensitivity", scores=[3.5])
    layer_map = layer_map.drop([1], step=4, importance="sensitivity", scores=[3.25])
    log = [{"step": step, "loss": 4.0 - 0.1 * step} for step in range(1, 9)]
    log += [{"step": 3, "loss": float("nan")}, {"step": 8, "eval_loss": 3.125}]
    scans = [{"step": 2, "importance": "sensitivity", "scores": {str(i): 5.0 - i for i in range(6)}}]
    attributes = {"layer_map": layer_map.to_dict(), "scans": scans}
    state = {"log_history": log, "stateful_callbacks": {"TrimCallback": {"attributes": attributes}}}
    folder = tmp_path / "<run> & co"
    (folder / "checkpoint-8").mkdir(parents=True)
    (folder / "checkpoint-8" / "trainer_state.json").write_text(json.dumps(state))
    return folder


class Outside(HTMLParser):
    """Collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href") and str(value)[0] != "#"]
        self.found += [tag] if tag in ("script", "link", "iframe") else []


def test_the_page_needs_nothing_from_elsewhere_and_shows_the_run(run: Path) -> None:
    page = render_run(read_run(run))
    outside = Outside()
    outside.feed(page)
    assert outside.found == [] and "@import" not in page and "url(http" not in page
    assert "4 of 6 layers" in page and "&lt;run&gt; &amp; co" in page and "<run>" not in page
    assert page.count("<svg") == 2 and "var(--kept)" in page and "#1f5f99" not in page.partition("</style>")[2]
    assert "prefers-color-scheme: dark" in page
    rows = re.findall(r"<tr>\s*<td>(\d+)</td><td>([\d, ]+)</td>", page)
    assert rows == [("2", "4"), ("4", "1")]


def test_depth_and_loss_are_those_of_the_log(run: Path) -> None:
    record = read_run(run)
    assert drops(record.layer_map) == [(2, 5), (4, 4)]
    steps, values = points(record.log, "loss")
    assert len(steps) == 8 and values == pytest.approx([4.0 - 0.1 * step for step in range(1, 9)])  # the NaN is left out


def test_depth_counts_sublayers_where_they_went() -> None:
    model = tiny_model()
    drop_layers(model, [3, 6], unit="sublayer")
    layer_map = LayerMap.from_config(model.config).drop([0], step=5)
    assert drops(layer_map) == [(5, 8)]  # 12, less two, less a block of two


def test_the_command_writes_it_into_the_folder(run: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(run), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["page"] == str(run / "trim_run.html") and (run / "trim_run.html").read_text()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "which has none of them"),
        ({"trainer_state.json": "{"}, "Expected JSON in"),
        ({"trainer_state.json": '{"log_history": []}'}, "tell of no drop"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="which is not a folder"):
        read_run(tmp_path / "absent")
