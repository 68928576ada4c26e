"""Whether several nodes share a file system or have separate disks."""

from __future__ import annotations

from pathlib import Path

from transformers import Trainer
from transformers.utils import logging

from ..engines import DistributedProcesses, ProcessGroup, SingleProcess
from ..loading.checkpoints import complete_checkpoints

logger = logging.get_logger("transformers.trimllm_hf")

WEIGHTS = ("*model*.safetensors*", "pytorch_model*", "global_step*")  # full, sharded by FSDP2, or DeepSpeed's


def blind_processes(process_group: ProcessGroup, folder: Path) -> list[int]:
    """The processes that do not see what the main process writes into a folder."""
    if process_group.world_size == 1:
        return []
    probe = folder / ".seen-by-all"
    if process_group.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    process_group.gather(None)
    seen = process_group.gather(probe.is_file())
    if process_group.rank == 0:
        probe.unlink()
    return [rank for rank, sees in enumerate(seen) if not sees]


def refuse_unshared_folder(process_group: ProcessGroup, folder: Path) -> None:
    """Refuse a folder that not all processes see, since they read there what the main process has written.

    Raises:
        ValueError: On every process, with those that do not see it.
    """
    if blind := blind_processes(process_group, folder):
        raise ValueError(
            f"Expected output_dir ({folder}) on a disk that all nodes share for max_metric_drop, got one that processes "
            f"{blind} do not see: they could not read the model that passed. "
            "Use a shared disk, or target_layers without a stop rule."
        )


def warn_unshared_checkpoints(process_group: ProcessGroup, trainer: Trainer) -> None:
    """Warn when training begins that its checkpoints cannot be resumed from, if nodes have separate disks."""
    args = trainer.args
    if args.save_strategy == "no":
        return
    if blind := blind_processes(process_group, Path(args.output_dir or ".")):
        logger.warning(
            f"The processes {blind} do not see the main process's output_dir ({args.output_dir}): the nodes have disks of "
            "their own, and only the main node holds a checkpoint's weights (save_on_each_node leaves them out, too, in "
            "transformers 5.24). Copy the main node's checkpoint to every node before you resume."
        )


def checkpoint_for_all(trainer: Trainer, asked: str | bool) -> str:
    """The checkpoint to resume from, on this process's disk: the requested one, or the newest that all processes have.

    Raises:
        ValueError: On every process, if not all of them find it.
    """
    process_group: ProcessGroup = DistributedProcesses() if trainer.accelerator.num_processes > 1 else SingleProcess()
    if asked is True:
        folder = Path(trainer.args.output_dir or ".")
        found = {path.name: path for path in complete_checkpoints(folder, process_group.rank, process_group.world_size)}
    else:
        folder, found = Path(str(asked)).parent, {Path(str(asked)).name: Path(str(asked))}
    there = [name for name, path in found.items() if process_group.world_size == 1 or any(map(any, map(path.glob, WEIGHTS)))]
    everyones = process_group.gather(there)
    for name in there:  # newest first
        if all(name in names for names in everyones):
            return str(found[name])
    named = "; ".join(f"process {rank}: {names or 'none'}" for rank, names in enumerate(everyones))
    raise ValueError(
        f"Expected a complete checkpoint in {str(folder)!r} on every process, got {named}. Train from the start "
        "(resume_from_checkpoint=False) or name a checkpoint elsewhere. Nodes that share no disk: "
        "copy the main node's checkpoint to every node."
    )
