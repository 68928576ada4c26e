"""Credentials in files that are about to be published."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

# The vendors' documented prefixes and lengths, so that vocabularies and checksums do not match.
PATTERNS = {
    "a Hugging Face token": rb"(?<![A-Za-z0-9_])(?:hf|api_org)_[A-Za-z0-9]{30,}(?![A-Za-z0-9_])",
    "a GitHub token": rb"(?<![A-Za-z0-9_])(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,})",
    "an OpenAI or Anthropic key": rb"(?<![A-Za-z0-9_-])sk-(?:(?:proj|ant)-[A-Za-z0-9_-]{20,}|[A-Za-z0-9]{32,})",
    "an AWS key": rb"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
    "a Google key": rb"(?<![A-Za-z0-9_-])AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",
    "a Slack token": rb"(?<![A-Za-z0-9])xox[abeoprs]-[A-Za-z0-9-]{20,}",
    "a private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a password in an address": rb"[a-z][a-z0-9+.-]*://[^\s/:@\"'<>]{1,64}:[^\s/:@\"'<>]{3,}@[A-Za-z0-9]",
}
_ANY = re.compile(b"|".join(b"(%s)" % pattern for pattern in PATTERNS.values()))
_SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")
SHORTEST = 16  # a shorter string may occur in a file by chance
LONGEST_HEADER = 100_000_000  # safetensors' own limit


def secrets_of_environment() -> dict[str, str]:
    """The environment variables that hold secrets, by their names: some, like W&B's key, have no pattern of their own."""
    return {
        f"the value of {name}": value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= SHORTEST and not os.path.exists(value)
    }


def refuse_credentials(folder: Path, files: Iterable[str], known: Mapping[str, str]) -> None:
    """Check that no file contains a credential; of weight files only the header is read.

    Raises:
        ValueError: If one does. The message says where and of which kind, without repeating it.
    """
    found = [f"{kind} in {name}, line {line}" for name in files for kind, line in _found_in(folder / name, known)]
    if found:
        raise ValueError(
            f"Expected files without credentials, got {'; '.join(found[:5])}. Take it out of the file, and revoke it if "
            "others may have seen it."
        )


def _found_in(file: Path, known: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    with file.open("rb") as opened:
        size = min(int.from_bytes(opened.read(8), "little"), LONGEST_HEADER) if file.suffix == ".safetensors" else -1
        text = opened.read(size)
    for match in _ANY.finditer(text):
        yield list(PATTERNS)[(match.lastindex or 1) - 1], text.count(b"\n", 0, match.start()) + 1
    for name, secret in known.items():
        if len(secret) >= SHORTEST and (start := text.find(secret.encode())) >= 0:
            yield name, text.count(b"\n", 0, start) + 1
