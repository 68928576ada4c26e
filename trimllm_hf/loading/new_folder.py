"""A new or empty folder that is either written completely or left as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNFINISHED = ".trimllm_unfinished"  # in the folder, until everything is written


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary subfolder of a new or empty folder; at the end its files are moved up, config.json last.

    On an error the folder is as it was.

    Raises:
        ValueError: If the folder holds something.
        OSError: If it cannot be created or written.
    """
    unfinished = folder / _UNFINISHED
    if folder.exists() and (not folder.is_dir() or any(path.name != _UNFINISHED for path in folder.iterdir())):
        raise ValueError(f"Expected a new or empty folder to write to, got {str(folder)!r}. Name another, or empty it.")
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    shutil.rmtree(unfinished, ignore_errors=True)  # left by an interrupted run
    try:
        try:
            unfinished.mkdir(parents=True)
        except OSError as error:
            why = f"Expected a folder that can be written to, got {str(folder)!r} ({error.strerror}). Name another."
            raise OSError(why) from None
        yield unfinished
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
            path.rename(folder / path.name)
        unfinished.rmdir()
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
