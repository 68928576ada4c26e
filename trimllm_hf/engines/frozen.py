"""A frozen model beside the one that trains: on the same device, and cut into shards where that one is."""

from __future__ import annotations

import copy
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn


def refuse_shards(model: nn.Module) -> None:
    """Refuse a model that DeepSpeed has cut into shards when it was made: there is nothing whole to copy.

    Raises:
        ValueError: Saying how to make it whole.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "Expected a whole model for distill_weight, got one that DeepSpeed ZeRO-3 made in shards. Make the model before "
            "the TrainingArguments: then it is whole, and cut into shards when training begins."
        )


def place_frozen(accelerator: Accelerator, model: nn.Module) -> Any:
    """Prepare a model that will only be evaluated; what comes back is called in its place.

    Args:
        accelerator: The Accelerator, after it has prepared the model that trains.
        model: A whole model, the same on each process, whose parameters need no gradients.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
        if config["zero_optimization"]["stage"] == 3:
            import deepspeed

            for name in ("optimizer", "scheduler"):
                config.pop(name, None)
            config["zero_optimization"].pop("offload_optimizer", None)
            engine, *_ = deepspeed.initialize(model=model, config=config)
            return engine.eval()
    return model.to(accelerator.device)
