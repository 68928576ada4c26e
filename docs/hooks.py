"""What mkdocs does to the pages: the table of settings, and no trace of what only the tests read."""

import re
from dataclasses import MISSING, fields
from typing import Any

from trimllm_hf import TrimConfig

FOR_TESTS = re.compile(r"<!-- (?:test|not run)\b.*?-->\n?", re.S)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """The page as it is shown."""
    return FOR_TESTS.sub("", markdown).replace("<!-- settings -->", settings())


def settings() -> str:
    """A table of the fields of `TrimConfig`, with their defaults and help."""
    rows = ["| setting | default | |", "|---|---|---|"]
    for field in fields(TrimConfig):
        default = "required" if field.default is MISSING else f"`{field.default!r}`"
        rows.append(f"| `{field.name}` | {default} | {field.metadata['help']} |")
    return "\n".join(rows)
