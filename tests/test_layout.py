"""The layout: a file imports only from lower floors, one room names the engines, and no file grows out of sight.

There is no list of exceptions. Where a rule stands in the way, a room is missing or a thing is in the wrong one.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "trimllm_hf"

# The floor of each room, a room being a file or a folder of the package.
FLOORS = {
    "engines": 1,
    "utils": 1,
    "layer_map": 2,
    "surgery": 3,
    "importance": 4,
    "latency": 4,
    "loading": 4,
    "publish": 5,
    "slicing": 5,
    "training": 6,
    "cli": 6,
    "__init__": 7,
}

# What only `engines/` imports, and names. Attributes that start with ds_ are DeepSpeed's.
ENGINE_MODULES = ("deepspeed", "torch.distributed", "torch.nn.parallel", "accelerate.utils.fsdp_utils")
ENGINE_NAMES = re.compile(r"deepspeed|DistributedDataParallel|DistributedType|DTensor|fully_shard|FSDPModule|_?ds_\w+")
# Where the files around the package lie, and from which of these folders they import one another.
AROUND = {
    "recipes": (2, ["recipes"]),
    "benchmarks": (3, ["benchmarks", "benchmarks/quality"]),
    "tests": (4, ["tests", "tests/distributed", "tests/distributed/scripts", "tests/hub", "tests/zoo"]),
}
MAX_LINES = 300
# `import trimllm_hf` works without them.
OPTIONAL = ("datasets", "evaluate", "deepspeed", "matplotlib", "peft", "trl")


def room_of(module: str) -> str:
    """The room of a dotted name: `trimllm_hf.engines.ddp` is in `engines`, `trimllm_hf` itself is `__init__`."""
    return [*module.split("."), "__init__"][1]


def imported_rooms(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and room of each import from the package itself, also inside functions and `if TYPE_CHECKING`."""
    package = list(file.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            modules = [module]
            if module == PACKAGE:  # `from trimllm_hf import surgery` is the room, `… import TrimConfig` is __init__
                modules = [f"{module}.{alias.name}" if alias.name in FLOORS else module for alias in node.names]
        else:
            continue
        for module in modules:
            if module.split(".")[0] == PACKAGE:
                yield node.lineno, room_of(module)


def floor_errors(root: Path) -> list[str]:
    errors = []
    for file in sorted((root / PACKAGE).rglob("*.py")):
        name = file.relative_to(root)
        room = room_of(".".join(name.with_suffix("").parts))
        if room not in FLOORS:
            errors.append(f"{name}: no floor for {room!r}; give it one in FLOORS in tests/test_layout.py")
            continue
        for line, target in imported_rooms(file, root):
            if target != room and FLOORS.get(target, -1) >= FLOORS[room]:
                errors.append(
                    f"{name}:{line}: {room} (floor {FLOORS[room]}) imports {target} (floor {FLOORS[target]}); "
                    "a file imports only from lower floors, or from its own room"
                )
    return errors


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each absolute import: `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each name, attribute and string that could be an attribute's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.lineno, node.value


def engine_errors(root: Path) -> list[str]:
    errors = []
    for file in sorted((root / PACKAGE).rglob("*.py")):
        if file.relative_to(root / PACKAGE).parts[0] == "engines":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found = [each for each in imports_of(tree) if f"{each[1]}.".startswith(tuple(f"{m}." for m in ENGINE_MODULES))]
        found += [each for each in names_in(tree) if ENGINE_NAMES.fullmatch(each[1])]
        errors += [
            f"{file.relative_to(root)}:{line}: names an engine; only {PACKAGE}/engines does: {name}" for line, name in found
        ]
    return errors


def around_errors(root: Path) -> list[str]:
    """Recipes import the package, benchmarks also recipes, tests all of them; never the other way."""
    floor_of = {PACKAGE: (1, PACKAGE)}
    files = {PACKAGE: sorted((root / PACKAGE).rglob("*.py"))}
    for area, (floor, folders) in AROUND.items():
        files[area] = sorted((root / area).rglob("*.py"))
        for folder in folders:
            for found in sorted((root / folder).glob("*")) if (root / folder).is_dir() else ():
                if found.suffix == ".py" or (found / "__init__.py").is_file():
                    floor_of[found.stem] = floor, area
    errors = []
    for area, (floor, _) in {PACKAGE: (1, []), **AROUND}.items():
        for file in files[area]:
            for line, module in imports_of(ast.parse(file.read_text(encoding="utf-8"))):
                name = module.partition(".")[0]
                target, room = floor_of.get(name, (0, ""))
                where = f"{file.relative_to(root)}:{line}"
                if target > floor:
                    errors.append(f"{where}: {area} (floor {floor}) imports {name} of {room} (floor {target})")
    return errors


def length_errors(root: Path) -> list[str]:
    files = [file for folder in (PACKAGE, "recipes") for file in sorted((root / folder).rglob("*")) if file.is_file()]
    lengths = {file.relative_to(root): file.read_bytes().count(b"\n") for file in files if file.suffix != ".pyc"}
    return [f"{file}: {n} lines; over {MAX_LINES}, a room is missing" for file, n in lengths.items() if n > MAX_LINES]


@pytest.mark.parametrize("check", [floor_errors, engine_errors, around_errors, length_errors])
def test_layout(check) -> None:
    assert not (errors := check(ROOT)), "\n" + "\n".join(errors)


def test_the_package_has_at_most_eleven_rooms_on_six_floors() -> None:
    rooms = {room: floor for room, floor in FLOORS.items() if room != "__init__"}
    assert len(rooms) <= 11 and set(rooms.values()) == set(range(1, 7))


def test_the_table_for_contributors_shows_each_room_on_its_floor() -> None:
    rows = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    shown = {room: int(floor) for floor, rooms in rows for room in re.findall(r"`(\w+)/?`", rooms)}
    assert shown == {room: floor for room, floor in FLOORS.items() if room != "__init__"}
    for _, rooms in rows:
        for folder in re.findall(r"`(\w+)/`", rooms):
            assert (ROOT / PACKAGE / folder).is_dir()


def test_imports_without_the_optional_packages() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL})); from {PACKAGE} import *"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("check", "file", "source", "error"),
    [
        (
            floor_errors,
            "surgery/drop.py",
            "import trimllm_hf.training.trainer",
            r"drop.py:1: surgery .* imports training \(floor 6\)",
        ),
        (floor_errors, "surgery/blocks.py", "from ..importance.scan import scan", "imports importance"),
        (floor_errors, "surgery/drop.py", "from trimllm_hf import TrimConfig", "imports __init__"),
        (floor_errors, "engines/ddp.py", "def f():\n    from .. import surgery", "ddp.py:2: engines .* surgery"),
        (floor_errors, "engines/ddp.py", "from ..layer_map import LayerMap", "imports layer_map"),
        (floor_errors, "attic/__init__.py", "", "no floor for 'attic'; give it one in FLOORS"),
        (engine_errors, "training/callback.py", "if args.deepspeed: ...", "callback.py:1: names an engine.*: deepspeed"),
        (engine_errors, "surgery/drop.py", "shape = getattr(p, 'ds_shape', p.shape)", "names an engine.*: ds_shape"),
        (engine_errors, "importance/scan.py", "def f():\n    from torch.distributed import tensor", "scan.py:2: .*tensor"),
        (engine_errors, "importance/scan.py", "import torch.distributed as dist", "names an engine.*: torch.distributed"),
        (engine_errors, "training/run.py", "from accelerate.utils import fsdp_utils", "names an engine.*: accelerate"),
        (around_errors, "surgery/drop.py", "from tiny import tiny_model", r"trimllm_hf \(floor 1\) imports tiny of tests"),
        (around_errors, "surgery/drop.py", "import domain.rows", r"imports domain of recipes \(floor 2\)"),
        (around_errors, "../recipes/legal.py", "from tiny import tiny_model", r"recipes \(floor 2\) imports tiny of tests"),
        (around_errors, "../recipes/legal.py", "import quality", r"imports quality of benchmarks \(floor 3\)"),
        (length_errors, "training/callback.py", "\n" * 301, "callback.py: 301 lines"),
    ],
)
def test_the_checks_see_what_is_wrong(tmp_path: Path, check, file: str, source: str, error: str) -> None:
    for beside in ("tests/tiny.py", "tests/test_this.py", "recipes/domain/__init__.py", "benchmarks/quality/__init__.py"):
        (tmp_path / beside).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / beside).touch()
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    errors = check(tmp_path)
    assert len(errors) == 1
    assert re.search(error, errors[0])


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("__init__.py", "from .cli import app\nfrom .engines.ddp import DDP"),
        ("surgery/drop.py", "import torch\nfrom ..layer_map import LayerMap\nfrom trimllm_hf import engines"),
        (
            "importance/scan.py",
            "from . import register\nfrom .rules import last\nfrom trimllm_hf.surgery.blocks import find_stack",
        ),
    ],
)
def test_the_floors_allow_what_is_right(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert floor_errors(tmp_path) == []
