"""The private names of other libraries that the engines use: a name that moves fails here, and says so."""

from __future__ import annotations

import inspect

import pytest
from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fsdp_state
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer


def test_trainer_makes_its_callbacks_anew_by_this_method() -> None:
    assert "self._load_callback_state()" in inspect.getsource(Trainer._init_training_state)
    assert list(inspect.signature(Trainer._load_callback_state).parameters) == ["self"]


def test_trainer_waits_for_its_pushes_by_this_method() -> None:
    assert "self._finish_current_push()" in inspect.getsource(Trainer.push_to_hub)
    assert list(inspect.signature(Trainer._finish_current_push).parameters) == ["self"]


def test_ddp_keeps_its_buckets_under_these_names() -> None:
    source = inspect.getsource(DistributedDataParallel)
    for name in ("self.reducer =", "self.logger", "self.find_unused_parameters =", "self.gradient_as_bucket_view ="):
        assert name in source, name


def test_fsdp2_keeps_its_lists_under_these_names() -> None:
    source = inspect.getsource(_fsdp_state)
    for name in ("all_states", "_states_to_forward_prefetch", "_states_to_backward_prefetch", "post_forward_order"):
        assert name in source, name
    for name in ("_is_root", "_state_ctx", "_comm_ctx", "_init_fqns"):
        assert name in source, name
    group = inspect.getsource(_fsdp_param_group)
    for name in ("self.fsdp_params = [", "fsdp_param.sharded_param", "self._module_to_pre_save_state_dict_hook_handle:"):
        assert name in group, name
    assert "self._module_to_pre_load_state_dict_hook_handle:" in group


def test_peft_saves_an_adapters_weights_before_its_config() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    source = inspect.getsource(peft.PeftModel.save_pretrained)
    assert 0 < source.rindex("safe_save_file(") < source.rindex("peft_config.save_pretrained(output_dir")
    assert peft.utils.SAFETENSORS_WEIGHTS_NAME == "adapter_model.safetensors"


@pytest.mark.deepspeed
def test_deepspeed_keeps_its_partitions_under_these_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import parameter_offload, stage3, stage_1_and_2

    expected = {
        stage_1_and_2: [
            *("self.bit16_groups", "self.single_partition_of_fp32_groups", "_hp_optimizer_states_linked"),
            *("def _lazy_init_hp_params_optimizer_state", "_hp_mapping"),
        ],
        stage3: [
            "self.fp16_groups",
            "self.sub_group_to_group_id",
            "self.fp32_partitioned_groups_flat",
            "_z3_optimizer",
            "parameter_offload",
        ],
        bf16_optimizer: ["self.bf16_groups", "self.fp32_groups_flat_partition"],
        parameter_offload: ["pre_bwd_fn", "post_bwd_fn", "def get_param_coordinator"],
    }
    for module, names in expected.items():
        source = inspect.getsource(module)
        for name in names:
            assert name in source, f"{module.__name__}: {name}"
    engine = inspect.getsource(DeepSpeedEngine)
    for name in ("self.module_forward_pre_hook", "self.module_forward_post_hook", "def destroy", "self.global_steps"):
        assert name in engine, name
    parameters = inspect.signature(DeepSpeedEngine.__init__).parameters
    assert {"args", "model", "optimizer", "config", "config_class"} <= set(parameters)
    required = [name for name, p in parameters.items() if p.default is p.empty and name not in ("self", "args", "model")]
    assert required == []
