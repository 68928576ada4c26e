"""Finds the complete checkpoint folders: an interrupted save leaves a partial one behind."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..layer_map import TRAINER_STATE, run_in
from ..utils import json_at

logger = logging.get_logger("transformers.trimllm_hf")


def complete_checkpoints(output_dir: str | Path, rank: int = 0, world_size: int = 1) -> list[Path]:
    """The checkpoint folders whose save was completed, newest first; incomplete ones are named in the log.

    Args:
        output_dir: The run's folder.
        rank: This process's number.
        world_size: Number of processes that make this check, each for its own files.
    """
    numbered = [
        (int(number), folder)
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal()
    ]
    complete = []
    for _, folder in sorted(numbered, reverse=True):
        if (reason := unfinished(folder, rank, world_size)) is None:
            complete.append(folder)
        else:
            logger.warning(f"Passing over {folder}, which a save left unfinished: {reason}.")
    return complete


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """The newest checkpoint folder whose save was completed.

    Raises:
        ValueError: If there is none.
    """
    if complete := complete_checkpoints(output_dir):
        return str(complete[0])
    raise ValueError(f"Expected a complete checkpoint in {str(output_dir)!r}, got none or unfinished ones. Name another.")


def run_of(folder: str | Path) -> dict[str, Any]:
    """What TrimCallback recorded about its run in a checkpoint; empty if the Trainer had no TrimCallback.

    Raises:
        ValueError: If the checkpoint's state cannot be read.
    """
    file = Path(folder) / TRAINER_STATE
    if not file.is_file():
        raise ValueError(f"Expected a complete {TRAINER_STATE} in {folder}, got none. Use another checkpoint.")
    return run_in(json_at(file))


def unfinished(folder: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Why a checkpoint of a trimmed run is not complete; None if it is.

    The main process writes trainer_state.json last, after everything else. The last file of each other process is that of
    its random state, for which the main process does not wait. If as many processes check as have saved, each checks for
    its own file, which may be on another disk.
    """
    try:
        processes = run_of(folder).get("num_processes") or 1
    except ValueError as error:
        return str(error)
    if processes > 1 and any(folder.glob("rng_state_*.pth")):  # if there are none at all, only the model was saved
        for number in [rank] if processes == world_size else range(processes):
            if not zipfile.is_zipfile(folder / f"rng_state_{number}.pth"):
                return f"process {number} had not saved its random state"
    return None


def processes_of(folder: str | Path) -> int | None:
    """The number of processes that wrote a checkpoint; None if unknown."""
    processes: int | None = run_in(json_at(Path(folder) / TRAINER_STATE)).get("num_processes")
    return processes
