"""`trimllm push`: publishes a trimmed model's folder on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .app import Json, answer, app, table

LANDED_IN_PART, UNKNOWN = 3, 4


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a trimmed model, with its card.")],
    repo_id: Annotated[str, typer.Argument(help="user/model, or model under your own name; created if it does not exist.")],
    private: Annotated[
        bool, typer.Option("--private", help="Create a new repository as private; refuse a public one.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; created if it does not exist.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request; also in someone else's repository.")
    ] = False,
    token: Annotated[str | None, typer.Option(help="Prefer HF_TOKEN: others can see a command line.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message; by default the number of layers.")] = None,
    tag: Annotated[str | None, typer.Option(help="Another tag than trim-16of32.")] = None,
    no_tag: Annotated[bool, typer.Option("--no-tag", help="Set no tag.")] = False,
    as_json: Json = False,
) -> None:
    """Check a trimmed model's folder, then publish it as one commit.

    If the repository already holds the folder, no commit is made. Pickles, optimizer states and other files that are not
    part of a model are not uploaded.

    Exit status: 0 the repository holds the folder; 1 it is as it was; 2 wrong usage; 3 the commit was made, the tag was not;
    4 unknown, the Hub did not answer. After 1, 3 and 4 it is safe to repeat the command.

    **Example:** `trimllm push runs/medical user/llama-16of32-medical --private`
    """
    from ..publish import hub
    from ..publish.target import PushError
    from ..utils import format_bytes

    try:
        done = hub.push(
            folder, repo_id, private=private or None, revision=revision, create_pr=create_pr, token=token,
            commit_message=message, tag=False if no_tag else tag or True,
        )  # fmt: skip
    except PushError as error:
        if as_json:
            typer.echo(json.dumps({"error": str(error), "landed": error.landed}, indent=2))
        Console(stderr=True, soft_wrap=True, highlight=False).print("[bold red]error:[/]", escape(str(error)))
        code = {True: LANDED_IN_PART, False: 1, None: UNKNOWN}[error.landed]
        raise typer.Exit(code) from error
    plain = {
        "repo_id": done.repo_id, "commit": done.commit.oid, "url": done.commit.pr_url or done.commit.commit_url,
        "new": done.new, "tag": done.tag, "pull_request": done.commit.pr_revision, "files": dict(done.contents.sizes),
        "left_out": list(done.contents.left_out),
    }  # fmt: skip
    answer(plain, as_json, lambda: _shown(plain, format_bytes))


def _shown(plain: dict[str, Any], size: Any) -> list[Any]:
    what = "pull request" if plain["pull_request"] else "commit"
    said = f"{'new' if plain['new'] else 'no new'} {what}: {plain['url']}" + (
        f", tag {plain['tag']}" if plain["tag"] else ""
    )
    if not plain["new"]:
        return [said]
    files = sorted(plain["files"].items(), key=lambda file: -file[1])
    left_out = [f"left out: {', '.join(plain['left_out'])}"] if plain["left_out"] else []
    return [table(None, "file", "size", rows=[(name, size(count)) for name, count in files]), *left_out, said]
