"""README.md and docs/: their Python runs, their commands are right, their links lead somewhere, and the site is built.

A page runs from top to bottom on tiny models. What only the test needs stands in comments of the page, `<!-- test … -->`:
what the reader is taken to have, and what has to hold afterwards. A block after `<!-- not run: reason -->` is left out.
"""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_base import save_base
from tiny import tiny_model, tiny_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import trimllm_hf
from trimllm_hf import LayerMap, TrimCallback, TrimConfig, TrimTrainer
from trimllm_hf.importance import scores

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
LINKED = [*PAGES, "CONTRIBUTING.md", "model_cards/README.md", "benchmarks/README.md"]
SLOW = {"docs/publishing.md", "docs/integrations.md"}  # a card is measured; three Trainers of TRL
SKIPPED = r"(?P<skipped><!-- not run: \S[^\n]*-->\n)?"
BLOCK = re.compile(SKIPPED + r"^```(?P<kind>\w*)\n(?P<code>.*?)^```$|<!-- test\n(?P<test>.*?)-->", re.M | re.S)


def blocks_of(page: str, *kinds: str) -> list[tuple[int, str]]:
    """Line and text of a page's blocks of some kinds, without those that the page says are not run."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [(match, match["kind"] or "test") for match in BLOCK.finditer(text) if not match["skipped"]]
    line = lambda match: text.count("\n", 0, match.start("code" if match["kind"] else "test"))  # noqa: E731
    return [(line(match), match["code"] or match["test"]) for match, kind in found if kind in kinds]


# ---- Python


def given() -> dict[str, Any]:
    """What a page takes as given: the reader's model, arguments, data and batches; and what its tests use."""
    data = tiny_texts(160, length=8)
    batch = {name: torch.stack([row[name] for row in data[:4]]) for name in data[0]}
    settings: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return {
        "model": tiny_model(num_hidden_layers=8),
        "args": TrainingArguments("out", max_steps=80, per_device_train_batch_size=16, **settings),
        "data": data,
        "batches": [batch, batch],
        "Trainer": Trainer,
        "Path": Path,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "pytest": pytest,
        **{tool.__name__: tool for tool in (tiny_model, depth, same_logits, interrupt, train_adapter, chat_base)},
    }


def depth(model: Any) -> int:
    """How many layers a model's map keeps."""
    return len(LayerMap.from_config(model.config).kept_layers)


def same_logits(model: Any, other: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, other.eval()(ids).logits)


class StopAfter(TrainerCallback):
    """Ends a run after so many steps, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def interrupt(args: TrainingArguments, data: Any) -> None:
    """A run that has saved a checkpoint while it was losing layers."""
    args.save_strategy, args.save_steps = "steps", 10
    model, trim = tiny_model(num_hidden_layers=8), TrimConfig(target_ratio=0.5, drop_every="spread")
    trainer = TrimTrainer(model, args, train_dataset=data, trim=trim, callbacks=[StopAfter(10)])
    trainer.train()
    assert 4 < depth(trainer.model) < 8  # its last checkpoint is of a depth between


def train_adapter(args: TrainingArguments, data: Any) -> None:
    """A LoRA adapter that was trained while its base lost layers."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    base = AutoModelForCausalLM.from_pretrained("org/base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    args.save_strategy = "no"
    trainer = Trainer(model, args, train_dataset=data, callbacks=[TrimCallback(TrimConfig(target_layers=5))])
    trainer.train()
    trainer.save_model("my-adapter")


def chat_base() -> tuple[Any, Any, Any]:
    """A base with a tokenizer at org/chat; the tokenizer, texts, and pairs of answers to a prompt."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    base = save_base(Path("org/chat"))
    texts = datasets.Dataset.from_list([{"text": f"w{n % 40} w{n % 7} good w{n % 11}"} for n in range(160)])
    pairs = [{"prompt": f"w{n % 40} w{n % 7}", "chosen": " good", "rejected": " bad"} for n in range(160)]
    return AutoTokenizer.from_pretrained(base), texts, datasets.Dataset.from_list(pairs)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page is run; its base lies there under the name that the pages give it, and the recipes beside it.

    What a page registers is gone after it.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scores, "_REGISTRY", dict(scores._REGISTRY))
    tiny_model(num_hidden_layers=8, max_position_embeddings=256).save_pretrained(tmp_path / "org/base")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


WITH_PYTHON = [page for page in PAGES if blocks_of(page, "python")]


@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in WITH_PYTHON])
def test_the_python_of_a_page_runs(page: str, folder: Path) -> None:
    names = given()
    for line, block in blocks_of(page, "python", "test"):
        exec(compile("\n" * line + block, str(ROOT / page), "exec"), names)


def test_a_page_whose_code_is_wrong_would_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden blocks are run, in their place, and what is marked is not."""
    shown = "```python\ny = x + 1\n```\n\n<!-- not run: why -->\n```python\n1 / 0\n```\n"
    page = f"<!-- test\nx = 1\n-->\n{shown}<!-- test\nassert y == 2\n-->\n"
    (tmp_path / "page.md").write_text(page, encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert [block for _, block in blocks_of("page.md", "python", "test")] == ["x = 1\n", "y = x + 1\n", "assert y == 2\n"]
    assert blocks_of("page.md", "python") == [(4, "y = x + 1\n")]


# ---- commands and data


def check_trimllm(words: list[str], folder: Path) -> None:
    """The command knows these arguments; what they name is not looked for."""
    typer = import_module("typer")
    command = typer.main.get_command(import_module("trimllm_hf.cli").app).commands[words[0]]
    values = [str(folder) if word in ("my-model", "runs/medical") else word for word in words[1:]]
    command.make_context(words[0], [str(folder / "train.jsonl") if word == "train.jsonl" else word for word in values])


def check_recipe(words: list[str], folder: Path) -> None:
    """The recipe, and what launches it, is there, and takes these flags."""
    recipe = next(place for place, word in enumerate(words) if word.endswith(".py"))
    for word in words:
        assert not word.startswith(("recipes/", "benchmarks/")) or (ROOT / word).is_file(), word
    if words[recipe].startswith("recipes/"):
        flags = [word for word in words[recipe + 1 :] if word != "--bf16"]  # refused on a CPU
        import_module(Path(words[recipe]).stem).parse(flags)


def check_pip(words: list[str], folder: Path) -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    for word in words:
        for extra in re.findall(r"\w+", (re.findall(r"^(?:\.|trimllm_hf)\[(.*)\]$", word) or [""])[0]):
            assert extra in setup["options.extras_require"], extra


def check_make(words: list[str], folder: Path) -> None:
    assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M), words


COMMANDS = {"trimllm": check_trimllm, "python": check_recipe, "torchrun": check_recipe, "accelerate": check_recipe}
COMMANDS |= {"pip": check_pip, "make": check_make}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page, "console", "bash")])
def test_the_commands_of_a_page_are_right(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    monkeypatch.chdir(tmp_path)  # where TrainingArguments may make folders
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    for _, block in blocks_of(page, "console", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                COMMANDS[words[0]](words[1:], tmp_path)


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    """What is shown as data can be read as such; what is text or a citation is not run."""
    for page in PAGES:
        assert not blocks_of(page, "sh", "shell", "py", "yml", "jsonl"), f"{page}: call it console, python, yaml, json"
        for line, block in blocks_of(page, "json", "yaml"):
            assert (json.loads if block.lstrip().startswith("{") else yaml.safe_load)(block), f"{page}:{line}"
        text = (ROOT / page).read_text(encoding="utf-8")
        kinds = {match["kind"] for match in BLOCK.finditer(text) if match["kind"] is not None}
        assert kinds <= {"python", "console", "bash", "json", "yaml", "text", "bibtex"}, page


# ---- links, and the site


def anchors_of(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower().strip()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED)
def test_every_link_leads_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`(?!\])", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}, which is not there"
        assert not anchor or anchor in anchors_of(file), f"{page} links to {target}, a heading that is not there"


def test_every_public_name_is_in_the_reference_once() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs/api").glob("*.md")))
    assert sorted(re.findall(r"^::: trimllm_hf\.(\w+)$", text, re.M)) == sorted(trimllm_hf.__all__)


def messages() -> list[str]:
    """What the package's errors and constants say, with … for what is filled in."""
    found = []
    for file in (ROOT / "trimllm_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_errors_that_are_explained_exist() -> None:
    known = messages()
    explained = re.findall(r"^\| (Expected .*?) \|", (ROOT / "docs/faq.md").read_text(encoding="utf-8"), re.M)
    assert len(explained) > 20
    for message in explained:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.S)
        assert any(pattern.match(text) for text in known), message


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Each page is in it, with the table of all settings and nothing of what only the tests read."""
    if (mkdocs := shutil.which("mkdocs", path=str(Path(sys.executable).parent))) is None:
        pytest.skip("needs mkdocs, which is not installed: make docs")
    command = [mkdocs, "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    shown = {
        page.relative_to(tmp_path).parent.as_posix(): page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")
    }
    pages = {page.removeprefix("docs/").removesuffix(".md").removesuffix("index").strip("/") or "." for page in PAGES[1:]}
    assert pages <= shown.keys()
    assert all("<!-- test" not in page and "<!-- not run" not in page for page in shown.values())
    assert all(f"<code>{name}</code>" in shown["settings"] for name in TrimConfig(target_layers=1).to_dict())
