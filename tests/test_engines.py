"""Which preparations are accepted, and how the others are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from tiny import tiny_model
from torch import nn

from trimllm_hf.engines import attach
from trimllm_hf.engines.local import LocalEngine


def prepared(kind: DistributedType) -> SimpleNamespace:
    return SimpleNamespace(distributed_type=kind, ddp_handler=None)


def test_one_process() -> None:
    model = tiny_model()
    engine = attach(prepared(DistributedType.NO), model, torch.optim.AdamW(model.parameters()))
    assert isinstance(engine, LocalEngine) and (engine.rank, engine.world_size) == (0, 1)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_what_is_not_supported_yet_is_refused(kind: DistributedType) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=f"Expected one process or DistributedDataParallel, got {kind.value}"):
        attach(prepared(kind), model, torch.optim.AdamW(model.parameters()))


def test_data_parallel_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"got torch.nn.DataParallel. Launch with torchrun"):
        attach(prepared(DistributedType.NO), nn.DataParallel(model), torch.optim.AdamW(model.parameters()))


def test_an_unwrapped_model_under_ddp_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"as accelerator.*returned it"):
        attach(prepared(DistributedType.MULTI_CPU), model, torch.optim.AdamW(model.parameters()))


def test_named_parameters_keep_their_names() -> None:
    """torch keeps the names of parameters that are given with them, in a list beside the parameters."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.named_parameters())
    leaving = list(model.model.layers[2].parameters())
    LocalEngine(model, optimizer).edit(lambda: model.model.layers.__delitem__(2), lambda: leaving)
    (group,) = optimizer.param_groups
    assert len(group["param_names"]) == len(group["params"]) == len(list(model.parameters()))
    assert not any(name.startswith("model.layers.2.") for name in group["param_names"])
