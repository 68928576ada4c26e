"""The page of a run: one file, self-contained, of what the run's files say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_texts
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from trimllm_hf import LayerMap, TrimCallback, TrimCardData, TrimConfig, drop_layers, trim_like
from trimllm_hf.cli import app
from trimllm_hf.layer_map import run_in
from trimllm_hf.publish.pictures.training_time import loss_over_time, timed
from trimllm_hf.publish.run_page import drops, points, read_run, render_run

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder: six layers, of which two went at steps 2 and 4; a scoring; a log."""
    layer_map = LayerMap.from_config(tiny_model().config)
    layer_map = layer_map.drop([4], step=2, importance="sensitivity", scores=[3.5])
    layer_map = layer_map.drop([1], step=4, importance="sensitivity", scores=[3.25])
    log = [{"step": step, "loss": 4.0 - 0.1 * step, "trim/seconds": 1.5 * step} for step in range(1, 9)]
    log += [{"step": 3, "loss": float("nan")}, {"step": 8, "eval_loss": 3.125}]
    scored = {"importance": "sensitivity", "scores": {str(i): 5.0 - i for i in range(6)}}
    spread = {str(i): 0.1 for i in range(6)}
    scans = [{"step": 2, "seconds": 3.5, "num_layers": 5, "dropped": ["4"], "spread": spread, **scored}]
    scans += [{**scans[0], "step": 4, "seconds": 6.5, "num_layers": 4, "importance": "last", "scores": {}, "spread": {}}]
    run = {"layer_map": layer_map.to_dict(), "scans": scans}
    state = {"log_history": log, "stateful_callbacks": {"TrimCallback": {"attributes": {"saved_run": run}}}}
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
    assert (
        "4 of 6 layers" in page
        and "4 of the 6 layers of the base are kept" in page
        and "&lt;run&gt; &amp; co" in page
        and "<run>" not in page
    )
    assert page.count("<svg") == 3 and "var(--kept)" in page and "#1f5f99" not in page.partition("</style>")[2]
    assert "prefers-color-scheme: dark" in page
    assert "an axis does not begin at 0" not in page  # the lowest score is 0
    rows = re.findall(r"<tr>\s*<td>(\d+)</td><td>([\d, ]+)</td>", page)
    assert rows == [("2", "4"), ("4", "1")]


@pytest.mark.parametrize(("base", "said"), [("org/base", "org/base"), ("/home/someone/base/", "base")])
def test_the_page_names_the_base_and_no_path(run: Path, base: str, said: str) -> None:
    """Of a base that is a folder, the name alone; a picture of scores far above 0 says that its axis is cut."""
    record = read_run(run)
    scans = [{**record.scans[0], "scores": {str(i): 50.0 + i for i in range(6)}}]
    page = render_run(replace(record, layer_map=replace(record.layer_map, base_model=base), scans=scans))
    assert f"layers of {said} are kept" in page and "someone" not in page and "an axis does not begin at 0" in page


def test_depth_and_loss_are_those_of_the_log(run: Path) -> None:
    record = read_run(run)
    assert drops(record.layer_map) == [(2, 5), (4, 4)]
    steps, values = points(record.log, "loss")
    assert len(steps) == 8 and values == pytest.approx([4.0 - 0.1 * step for step in range(1, 9)])  # the NaN is left out


def test_a_run_records_what_the_page_shows(tmp_path: Path) -> None:
    """Each scoring with the scores by which it dropped, and when, in the run's own files; short."""
    args = TrainingArguments(str(tmp_path), max_steps=6, logging_steps=1, use_cpu=True, save_steps=6, disable_tqdm=True)
    trim = TrimConfig(target_layers=4, drop_every="2", importance="block_influence", calibration_size=24, repair="none")
    trainer = Trainer(tiny_model(), args, train_dataset=tiny_texts(48, length=8), callbacks=[TrimCallback(trim)])
    trainer.train()
    record = read_run(tmp_path)
    assert [(scan["step"], scan["num_layers"], scan["importance"]) for scan in record.scans] == [
        (2, 5, "block_influence"),
        (4, 4, "block_influence"),
    ]
    for scan, drop in zip(record.scans, record.layer_map.history, strict=True):
        assert drop.scores == pytest.approx([scan["scores"][str(layer)] for layer in drop.dropped], rel=1e-5)
        assert scan["dropped"] == [str(layer) for layer in drop.dropped]
        assert scan["scores"].keys() == scan["spread"].keys() and min(scan["spread"].values()) > 0
    assert list(record.scans[0]["scores"]) == [str(layer) for layer in range(6)] and len(record.scans[1]["scores"]) == 5
    times = [entry["trim/seconds"] for entry in record.log if "loss" in entry]
    assert len(times) == 6 and times == sorted(times)
    assert all(times[scan["step"] - 2] <= scan["seconds"] <= times[scan["step"]] for scan in record.scans)
    state = json.loads((tmp_path / "checkpoint-6/trainer_state.json").read_text())
    assert len(json.dumps(run_in(state)["scans"])) < 1000
    page = render_run(record)
    assert page.count("<svg") == 4 and "Importance at each scoring" in page and "The time it took" in page
    assert re.search(r"<td>llama\.cpp[^<]*</td><td>right</td>", page)  # by the checkpoint's config


def test_the_report_of_the_same_run_tells_of_its_end(run: Path) -> None:
    """The newest checkpoint may be of a step before the last; a report of another run says nothing of this one."""
    state = read_run(run)
    final = state.layer_map.drop([0], step=9, importance="sensitivity", scores=[3.0])
    for first, layers in ((state.log[0], 3), ({"step": 1, "loss": 9.0}, 4)):
        log = [first, *state.log[1:], {"step": 12, "loss": 1.0}]
        data = TrimCardData(trimmed={"map": final.to_dict()}, training={"log": log, "scans": []})
        (run / "trim_report.json").write_text(json.dumps(data.to_report()))
        record = read_run(run)
        assert record.layer_map.num_layers == layers and len(record.log) == len(state.log) + (layers == 3)


@pytest.mark.slow
def test_a_run_that_goes_on_adds_to_its_times(tmp_path: Path) -> None:
    """The clock goes on where the checkpoint left it, and what was scored before stays known."""
    how = {"logging_steps": 1, "use_cpu": True, "save_steps": 2, "disable_tqdm": True}
    trim = TrimConfig(target_layers=4, drop_every="2", importance="last", repair="none")
    data = tiny_texts(48, length=8)
    trainer = Trainer(
        tiny_model(),
        TrainingArguments(str(tmp_path), max_steps=6, **how),
        train_dataset=data,
        callbacks=[TrimCallback(trim)],
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["log_history"][-1]["trim/seconds"] = 1000.0
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    model = tiny_model()
    trim_like(model, checkpoint)
    again = Trainer(
        model,
        TrainingArguments(str(tmp_path), max_steps=6, **how),
        train_dataset=data,
        callbacks=[TrimCallback(trim)],
    )
    again.train(resume_from_checkpoint=str(checkpoint))
    record = read_run(tmp_path)
    assert [scan["step"] for scan in record.scans] == [2, 4] and record.scans[1]["seconds"] > 1000
    assert all(entry["trim/seconds"] >= 1000 for entry in record.log if entry["step"] > 2 and "loss" in entry)
    assert not any("trim/seconds" in entry for entry in record.log if "loss" not in entry)


def test_an_evaluation_lies_between_the_records_around_it() -> None:
    log = [{"step": 10, "loss": 4.0, "trim/seconds": 5.0}, {"step": 12, "eval_loss": 3.0}, {"step": 18, "eval_loss": 2.0}]
    log += [{"step": 20, "loss": 1.0, "trim/seconds": 15.0}, {"step": 20, "eval_loss": 1.5}]
    assert timed(log, "eval_loss") == [(7.0, 3.0), (13.0, 2.0), (15.0, 1.5)]  # a second a step
    assert timed(log, "loss") == [(5.0, 4.0), (15.0, 1.0)]


def test_an_evaluation_before_the_first_record_has_no_time() -> None:
    log = [{"step": 0, "eval_loss": 5.0}, {"step": 2, "loss": 4.0, "trim/seconds": 3.5}, {"step": 3, "eval_loss": 3.0}]
    assert timed(log, "eval_loss") == [(3.5, 3.0)] and timed(log, "loss") == [(3.5, 4.0)]
    assert loss_over_time(log, []) is None  # one point is no curve


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
        ({"trainer_state.json": "of a run that ended before its first drop"}, "tell of no drop"),
        ({"trainer_state.json": "of a scoring without scores"}, "damaged ones in"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(files: dict[str, str], said: str, tmp_path: Path) -> None:
    whole = LayerMap.from_config(tiny_model().config)
    runs = {
        "of a run that ended before its first drop": {"layer_map": whole.to_dict(), "scans": []},
        "of a scoring without scores": {"layer_map": whole.drop([4], step=2).to_dict(), "scans": [{"step": 2}]},
    }
    for name, text in files.items():
        saved = {"TrimCallback": {"attributes": {"saved_run": runs.get(text)}}}
        state = {"log_history": [], "stateful_callbacks": saved}
        (tmp_path / name).write_text(json.dumps(state) if text in runs else text)
    with pytest.raises(ValueError, match=said):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="which is not a folder"):
        read_run(tmp_path / "absent")
