"""What is released: the wheel works alone, the source archive builds it, and versions, workflows and files say the same."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import trimllm_hf

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def metadata() -> ConfigParser:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup


# ---- what the files say


def test_one_version_everywhere() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", trimllm_hf.__version__)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == trimllm_hf.__version__
    assert citation["license"] == metadata()["metadata"]["license"]


def test_ci_runs_every_python_that_is_supported_with_the_lowest_and_the_newest_versions() -> None:
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]["test"]["strategy"][
        "matrix"
    ]
    supported = re.findall(r"Python :: (3\.\d+)$", metadata()["metadata"]["classifiers"], re.M)
    assert matrix["python"] == supported and f">={supported[0]}" == metadata()["options"]["python_requires"]
    extremes = {row["constraints"]: row["python"] for row in matrix["include"]}
    assert extremes == {"constraints-lowest.txt": supported[0], "": supported[-1]}
    for file in [*matrix["constraints"], *filter(None, extremes)]:
        assert (ROOT / file).is_file()


def test_the_lowest_versions_are_those_of_the_requirements() -> None:
    setup = metadata()
    # An extra may ask for a newer version of what the package itself needs: the package's bound comes last, and counts.
    wanted = "\n".join([*setup["options.extras_require"].values(), setup["options"]["install_requires"]])
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)", wanted, re.M))
    for name, pinned in re.findall(
        r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8"), re.M
    ):
        assert pinned.startswith(bounds[name]), name


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_a_person_can_run(workflow: Path) -> None:
    """Each command is a target of the Makefile; a job may write only what it has to; no secret is used."""
    plain = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert plain["permissions"] == {"contents": "read"} and "secrets." not in workflow.read_text(encoding="utf-8")
    for name, job in plain["jobs"].items():
        assert job["timeout-minutes"] <= 90
        writes = {what for what, how in job.get("permissions", {}).items() if how == "write"}
        assert writes <= {"publish": {"id-token"}, "deploy": {"id-token", "pages"}}.get(name, set())
        for step in job["steps"]:
            assert "uses" in step or (step["run"].split()[0] == "make" and step["run"].split()[1] in targets), step
            assert "@" in step.get("uses", "@")


# ---- what is built


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all that git knows: building leaves folders behind."""
    pytest.importorskip("setuptools", reason="setuptools, which builds the package, is not installed")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to know what belongs to the repository")
    folder = tmp_path_factory.mktemp("sources")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in listed:
        if not name.startswith(("benchmarks/", "model_cards/")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def build(backend: str, sources: Path, out: Path) -> Path:
    """What the build backend makes, in a process of its own; without network."""
    code = f"import setuptools.build_meta as b; print(b.{backend}({str(out)!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.split()[-1]


@pytest.mark.slow
def test_the_wheel_alone_works(sources: Path, tmp_path: Path) -> None:
    """It trims, saves, loads, writes a card and has its command, where no package is that it does not require."""
    wheel = build("build_wheel", sources, tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"trimllm_hf", f"trimllm_hf-{trimllm_hf.__version__}.dist-info"}
    expected = {str(path.relative_to(sources)) for path in (sources / "trimllm_hf").rglob("*") if path.is_file()}
    assert expected <= set(names), expected - set(names)
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    command = [sys.executable, str(ROOT / "tests/release/smoke.py"), f"v{trimllm_hf.__version__}", "--elsewhere"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(installed) in done.stdout
    command[2] = "v9.9.9"
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "got v9.9.9" in done.stderr


@pytest.mark.slow
def test_the_source_archive_holds_what_builds_the_package_and_no_tests(sources: Path, tmp_path: Path) -> None:
    archive = build("build_sdist", sources, tmp_path)
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    at_top = {path.name for path in unpacked.iterdir()}
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "setup.cfg", "pyproject.toml", "trimllm_hf"} <= at_top
    assert not at_top & {"tests", "recipes", "docs", "benchmarks", "model_cards", ".github"}
    from_archive, from_sources = tmp_path / "archive", tmp_path / "direct"
    wheels = [build("build_wheel", unpacked, from_archive), build("build_wheel", sources, from_sources)]
    assert zipfile.ZipFile(wheels[0]).namelist() == zipfile.ZipFile(wheels[1]).namelist()
