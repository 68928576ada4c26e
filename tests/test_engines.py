"""Which preparations are accepted, and how the others are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from tiny import tiny_model
from torch import nn

from trimllm_hf.engines import attach
from trimllm_hf.engines.local import LocalEngine


def prepared(kind: DistributedType) -> SimpleNamespace:
    state = SimpleNamespace(fsdp_plugin=None)
    return SimpleNamespace(distributed_type=kind, ddp_handler=None, state=state, parallelism_config=None)


def test_one_process() -> None:
    model = tiny_model()
    engine = attach(prepared(DistributedType.NO), model, torch.optim.AdamW(model.parameters()))
    assert isinstance(engine, LocalEngine) and (engine.rank, engine.world_size) == (0, 1)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (DistributedType.FSDP, "under FSDP2 .*got LlamaForCausalLM: FSDP1 cannot lose layers"),
        (DistributedType.MEGATRON_LM, "FSDP2 or DeepSpeed ZeRO, got MEGATRON_LM"),
        (DistributedType.XLA, "FSDP2 or DeepSpeed ZeRO, got XLA"),
    ],
)
def test_other_kinds_are_refused(kind: DistributedType, said: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=said):
        attach(prepared(kind), model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize(("size", "name"), [("tp_size", "tensor"), ("cp_size", "context"), ("sp_size", "sequence")])
def test_other_parallelism_is_refused(size: str, name: str) -> None:
    accelerator = prepared(DistributedType.MULTI_GPU)
    accelerator.parallelism_config = ParallelismConfig(**{size: 2})
    model = tiny_model()
    with pytest.raises(ValueError, match=f"Expected data parallelism alone, got {name} parallelism"):
        attach(accelerator, model, torch.optim.AdamW(model.parameters()))


def test_a_model_cut_by_transformers_is_refused() -> None:
    model = tiny_model()
    model._tp_size = 2  # as from_pretrained(tp_plan="auto") leaves it
    assert model.tp_size == 2
    with pytest.raises(ValueError, match="got tensor parallelism"):
        attach(prepared(DistributedType.NO), model, torch.optim.AdamW(model.parameters()))


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage": 0}, "got ZeRO stage 0"),
        ({"hpz": 2}, r"got ZeRO\+\+ \(zero_hpz_partition_size\)"),
        ({"weights": True}, r"got ZeRO\+\+ \(zero_quantized_weights\)"),
        ({"nvme": True}, "got offload to NVMe"),
        ({"tp": 2}, "got tensor parallelism"),
        ({}, None),
    ],
)
def test_what_is_not_plain_zero_is_refused(changes: dict, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import deepspeed

    from trimllm_hf.engines.deepspeed import refuse_unsupported

    offload = SimpleNamespace(device="nvme") if changes.get("nvme") else None
    zero = SimpleNamespace(
        offload_optimizer=offload,
        offload_param=None,
        zero_hpz_partition_size=changes.get("hpz", 1),
        zero_quantized_weights=changes.get("weights", False),
        zero_quantized_gradients=False,
    )
    engine = deepspeed.DeepSpeedEngine.__new__(deepspeed.DeepSpeedEngine)
    values = {
        "_config": SimpleNamespace(zero_config=zero),
        "zero_optimization_stage": lambda: changes.get("stage", 2),
        "autotp_size": lambda: changes.get("tp", 0),
        "is_deepcompile_enabled": lambda: False,
        "has_moe_layers": False,
    }
    for name, value in values.items():
        object.__setattr__(engine, name, value)
    if said is None:
        refuse_unsupported(engine)
        return
    with pytest.raises(ValueError, match=said):
        refuse_unsupported(engine)


@pytest.mark.deepspeed
def test_a_frozen_model_under_zero3_is_an_engine_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    from trimllm_hf.engines.deepspeed import DeepSpeedEngine

    class Engine(deepspeed.DeepSpeedEngine):
        def __init__(self, model: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = model

    asked: list[dict] = []

    def initialize(model: nn.Module, config: dict) -> tuple:
        asked.append(config)
        return Engine(model), None, None, None

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "optimizer": {"type": "AdamW"}}
    plugin = SimpleNamespace(deepspeed_config=config)
    model = tiny_model().train()
    placed = DeepSpeedEngine.place_frozen(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)), model)
    assert isinstance(placed, Engine) and placed.module is model and not model.training
    assert asked == [{"zero_optimization": {"stage": 3}}] and "optimizer" in config


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
    removed_parameters = list(model.model.layers[2].parameters())
    LocalEngine(model, optimizer).edit(lambda: model.model.layers.__delitem__(2), lambda: removed_parameters)
    (group,) = optimizer.param_groups
    assert len(group["param_names"]) == len(group["params"]) == len(list(model.parameters()))
    assert not any(name.startswith("model.layers.2.") for name in group["param_names"])
