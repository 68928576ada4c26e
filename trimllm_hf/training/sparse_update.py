"""The sparse update: only a share of the blocks is trained, the most important ones (TrimLLM, arXiv 2412.11242).

They are chosen once, before the optimizer is created, so the optimizer holds state only for them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from ..importance import is_joint
from ..surgery.adapters import base_of
from ..surgery.blocks import find_blocks
from .config import TrimConfig
from .trainer_hooks import TrainerSupport


def train_only(model: nn.Module, positions: Collection[int], config: TrimConfig) -> list[nn.Parameter]:
    """Freeze the blocks at other positions and, depending on the settings, the embeddings and other modules outside them.

    Parameters that were frozen before stay frozen: in a model with adapters, only the adapters of the chosen blocks train.

    Returns:
        The newly frozen parameters.

    Raises:
        ValueError: If one of the blocks has no trainable parameters. Nothing has changed then.
    """
    base = base_of(model)
    blocks = find_blocks(base, config.part).blocks
    frozen = {id(p) for position, block in enumerate(blocks) if position not in positions for p in block.parameters()}
    inside = {id(parameter) for parameter in blocks.parameters()}
    tables = [module for module in base.modules() if isinstance(module, nn.Embedding)]
    embeddings = {id(parameter) for table in tables for parameter in table.parameters()} - inside
    if not config.train_embeddings:
        frozen |= embeddings  # includes a head that is tied to them
    if not config.train_head:
        frozen |= {id(parameter) for parameter in model.parameters()} - inside - embeddings
    idle = [position for position in positions if not any(p.requires_grad for p in blocks[position].parameters())]
    if idle:
        raise ValueError(
            f"Expected each of the layers {sorted(positions)}, the most important ones, to have parameters that train, got "
            f"none in {idle}. Free them (requires_grad), or put adapters on every layer."
        )
    changed = [parameter for parameter in model.parameters() if id(parameter) in frozen and parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    return changed


def set_free(support: TrainerSupport) -> None:
    """Unfreeze what `train_only` froze for an earlier run, since a new run makes its own choice."""
    for parameter in (held() for held in support.frozen):
        if parameter is not None:  # otherwise it has been dropped
            parameter.requires_grad_(True)
    support.frozen, support.trained_layers = [], None


def check_room(trained: Sequence[int], num_layers: int, target: int, config: TrimConfig) -> None:
    """Refuse a plan that would have to drop all trained blocks, once no other block may be dropped.

    Raises:
        ValueError: With the arithmetic.
    """
    unprotected = set(range(config.protect_first, num_layers - config.protect_last))
    others = unprotected - set(trained)
    if num_layers - target - len(others) >= len(trained):
        raise ValueError(
            f"Expected a target that leaves a block that trains, got {target} of {num_layers} layers: besides the "
            f"{len(trained)} that train (trainable_ratio={config.trainable_ratio}) only {len(others)} may be dropped "
            f"(protect_first={config.protect_first}, protect_last={config.protect_last}). Raise trainable_ratio or the "
            "target, or protect fewer layers."
        )


def refuse_bare_callback(config: TrimConfig, support: TrainerSupport) -> None:
    """Refuse the setting without a TrimTrainer, which freezes layers before the optimizer is created.

    Raises:
        ValueError: With what to use instead.
    """
    ratio = config.trainable_ratio
    if ratio is not None and not support.freezes_layers:
        raise ValueError(
            f"Expected TrimTrainer (or TrimTrainerMixin) for trainable_ratio={ratio}, got a TrimCallback in another "
            "Trainer: a callback comes too late, when the optimizer is made."
        )
    if ratio is not None and is_joint(config.score):
        raise ValueError(
            f"Expected a score of single layers for trainable_ratio={ratio}, got {config.importance!r}, which scores "
            "successive layers together. Use another importance, like 'block_influence'."
        )


def refuse_other_share(of_checkpoint: Sequence[int] | None, trained: Sequence[int] | None) -> None:
    """Refuse to resume a run with a sparse update as one without it.

    Raises:
        ValueError: Naming the layers that train in the checkpoint.
    """
    if of_checkpoint and trained is None:
        raise ValueError(
            f"Expected the trainable_ratio of the run that is resumed, in which the layers {list(of_checkpoint)} train, got "
            "None. Set it as it was."
        )
