"""The app, and what its commands share: output and exit status (0 done, 1 refused or failed, 2 wrong usage).

A command imports what is slow to import (torch, most of transformers) inside its function: `--help` answers at once.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


_REFUSALS = (ValueError, OSError, HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError)


# What a terminal without Unicode shows instead; other characters that it lacks become question marks.
_PLAIN = str.maketrans({"█": "#", "▀": "^", "▄": "_", "░": ".", "…": "...", "→": "->"})


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode(error.encoding, "replace").decode(error.encoding), error.end


codecs.register_error("trimllm_plain", _replaced)


class Refusing(TyperGroup):
    """Ends a command that fails with the error's message and exit status 1, without a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="trimllm_plain")  # output must not fail because of the terminal's encoding
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _REFUSALS as error:
            no_id = isinstance(error, HFValidationError) or isinstance(error.__cause__, HFValidationError)
            said = _no_model(error) if no_id else str(error)
            Console(stderr=True, soft_wrap=True, highlight=False).print("[bold red]error:[/]", escape(said))
            raise typer.Exit(1) from error


def _no_model(error: Exception) -> str:
    """What to do about a name that is neither a folder here nor an id on the Hub, which quotes it after a colon."""
    quoted = re.search(r": '(.*)'", str(error), re.DOTALL)
    if quoted is None:
        return str(error)
    name = quoted[1]
    wanted = "Expected a model's folder, or its id on the Hub (namespace/name), got"
    if Path(name).is_file():
        return f"{wanted} the file {name}. Give the folder that it is in."
    if "://" in name:
        return f"{wanted} the address {name}. Give what follows the server's name there."
    return f"{wanted} {name}: there is no such folder, and it is no id. Check the name."


app = typer.Typer(
    cls=Refusing,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="Drop the least important layers of a Hugging Face model; inspect, measure and publish the result.",
)


@app.callback()
def main() -> None:
    """Make `trimllm` a group of commands."""


def answer(plain: Any, as_json: bool, render: Callable[[], RenderableType | list[RenderableType]]) -> None:
    """Print a command's result on stdout: as JSON, or as `render` formats it."""
    if as_json:
        unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        typer.echo(json.dumps(plain, indent=2, ensure_ascii=not unicode))
        return
    shown = render()
    console = Console(highlight=False, markup=False)  # a name may have brackets
    for part in shown if isinstance(shown, list) else [shown]:
        console.print(part, soft_wrap=isinstance(part, str))  # a URL must not be wrapped


def refuse_unwritable(folder: Path) -> None:
    """Refuse a folder that cannot be written to or created, before any work is done; no file is left there.

    Raises:
        ValueError: If it cannot be written to.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"Expected a folder to write to, got {folder} ({error.strerror}). Give another with --out."
        ) from None


def table(title: str | None, *columns: str, rows: list[tuple[Any, ...]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    for row in rows:
        made.add_row(*map(str, row))
    return made
