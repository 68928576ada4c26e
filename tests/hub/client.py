"""A client of the local Hub in a process of its own: it reads the endpoint and whether to use Xet when it is imported.

It reads calls as lines of JSON from standard input and answers each with a line: what came back or was raised, and the log.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
sys.stdout = sys.stderr  # nothing else may speak there

from huggingface_hub import HfApi  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from trimllm_hf.cli import app  # noqa: E402
from trimllm_hf.publish import hub, remote, target  # noqa: E402

remote.WAITS = target.WAITS = (0.1, 0.2, 0.4)


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def push(**arguments: Any) -> dict[str, Any]:
    done = hub.push(**arguments)
    return {
        "repo_id": done.repo_id, "oid": done.commit.oid, "url": done.commit.commit_url, "pr_url": done.commit.pr_url,
        "pr": done.commit.pr_revision, "new": done.new, "tag": done.tag, "left_out": done.contents.left_out,
    }  # fmt: skip


def main() -> None:
    log = Log()
    logging.getLogger("transformers.trimllm_hf").addHandler(log)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        log.lines.clear()
        try:
            if call["name"] == "push":
                answer = push(**call["arguments"])
            elif call["name"] == "trimllm":
                done = CliRunner().invoke(app, call["arguments"]["line"], env={"HF_TOKEN": call["arguments"]["token"]})
                answer = {"code": done.exit_code, "out": done.stdout, "errors": done.stderr}
            else:
                token = call["arguments"].pop("token")
                answer = {"value": str(getattr(HfApi(token=token), call["name"])(**call["arguments"]))}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error), "landed": getattr(error, "landed", "unsaid")}
        print(json.dumps({**answer, "log": "\n".join(log.lines)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
