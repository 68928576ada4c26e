"""Trains a tiny model while it is trimmed, under an engine, in as many processes as launched; writes what it saw.

python train.py FOLDER --engine {plain,fsdp2,hsdp,zero1,zero2,zero2_offload,zero3} [--save STEPS] [--resume CHECKPOINT]
    [--lora] [--trainable_ratio SHARE]

Plain is one process, or DistributedDataParallel. With --save or --resume TrimTrainer trains, else stock Trainer with a
TrimCallback. DeepSpeed and FSDP2 run on the CPU only by the detours below: `use_cpu` would silently mean DDP.
"""

import argparse
import gc
import json
import os
import signal
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--engine", default="plain")
parser.add_argument("--save", type=int)
parser.add_argument("--resume", help="a checkpoint, or 'last': the last complete one in FOLDER, if there is any")
parser.add_argument("--kill", help="SIGKILL this process: 'after:SECONDS of training', 'drop:N', 'model:STEP', 'state:STEP'")
parser.add_argument("--kill_rank", type=int, default=0)
parser.add_argument("--calibration", type=int, default=9)  # not a multiple of two: shares differ
parser.add_argument("--examples", type=int, default=120, help="24, and each second step ends an epoch")
parser.add_argument("--universal", action="store_true", help="DeepSpeed loads a universal checkpoint")
parser.add_argument("--unit", default="block", help="what is dropped: two blocks, or six sublayers")
parser.add_argument("--per_ms", action="store_true", help="sublayers are chosen by importance per ms")
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--distill", type=float, default=0.0, help="TrimTrainer with a teacher")
parser.add_argument("--config_optimizer", action="store_true", help="optimizer and scheduler of the DeepSpeed config")
parser.add_argument("--sharded", action="store_true", help="checkpoints hold shards: FSDP2, ZeRO-3")
parser.add_argument("--lora", action="store_true", help="train adapters only")
parser.add_argument("--trainable_ratio", type=float)
parser.add_argument("--repair", action="store_true", help="repair the model for each drop")
parser.add_argument("--born", action="store_true", help="load the model when the engine is known: ZeRO-3 makes it in shards")
parser.add_argument("--importance", default="sensitivity")
parser.add_argument("--out_of_memory", type=int, help="the second process has no memory for this call of a layer in a scan")
options = parser.parse_args()
if options.engine.startswith("zero"):
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
if options.engine in ("fsdp2", "hsdp"):
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ["FSDP_VERSION"] = "2"

import torch  # noqa: E402
from accelerate import ParallelismConfig, PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny import tiny_model, tiny_texts  # noqa: E402
from transformers.utils import logging  # noqa: E402

from trimllm_hf import TrimCallback, TrimConfig, TrimTrainer  # noqa: E402
from trimllm_hf.loading.checkpoints import unfinished  # noqa: E402
from trimllm_hf.surgery.drop import PlannedDrop  # noqa: E402

WORLD = int(os.environ.get("WORLD_SIZE", "1"))


def engine_arguments() -> dict[str, Any]:
    """What TrainingArguments get for the engine."""
    if options.engine == "plain":
        return {"use_cpu": True, "ddp_backend": "gloo" if WORLD > 1 else None}
    configured: dict[str, Any] = {"accelerator_config": {"use_configured_state": True}}
    if options.engine in ("fsdp2", "hsdp"):
        state = PartialState(cpu=True)
        state.device = torch.device("cpu")
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        fsdp = {
            "fsdp_version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "reshard_after_forward": True,
            "state_dict_type": "SHARDED_STATE_DICT" if options.sharded else "FULL_STATE_DICT",
        }
        if options.engine == "hsdp":  # two replicas of two shards
            configured["parallelism_config"] = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
        return {"fsdp": True, "fsdp_config": fsdp, **configured}
    PartialState(backend="gloo")
    stage = int(options.engine[4])
    zero: dict[str, Any] = {"stage": stage}
    if "offload" in options.engine:
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": not options.sharded}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": "auto"},
    }
    if options.universal:
        config["checkpoint"] = {"load_universal": True}
    if options.config_optimizer:
        adamw = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
        config["optimizer"] = {"type": "AdamW", "params": adamw}
        config["scheduler"] = {
            "type": "WarmupDecayLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": "auto", "warmup_num_steps": 2, "total_num_steps": "auto"},
        }
    return {"deepspeed": config, **configured}


def fp32_and_state(parameter: torch.nn.Parameter, optimizer: Any) -> dict[str, torch.Tensor]:
    """A parameter's fp32 copy and its optimizer state, as this process can read them by the engine's public means."""
    if not options.engine.startswith("zero"):
        state = optimizer.state[parameter]
        tensors = {"weight": parameter.detach(), **state}
        return {key: getattr(value, "_local_tensor", value).clone() for key, value in tensors.items()}
    from deepspeed import utils

    local = hasattr(parameter, "ds_id")
    weight = utils.safe_get_local_fp32_param if local else utils.safe_get_full_fp32_param
    state = utils.safe_get_local_optimizer_state if local else utils.safe_get_full_optimizer_state
    found = {"weight": weight(parameter).clone()}
    return found | {key: state(parameter, key).clone() for key in ("exp_avg", "exp_avg_sq")}


def read_all(model: Any, optimizer: Any) -> dict[int, dict[str, torch.Tensor]]:
    if options.engine in ("fsdp2", "hsdp"):
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()  # after an evaluation (the scan) some hold gathered parameters
    zero = getattr(optimizer, "optimizer", optimizer)
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # DeepSpeed links the state of its first group only
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    return {id(p): fp32_and_state(p, optimizer) for p in model.parameters() if p.requires_grad}


def bytes_held() -> int:
    """What all tensors of this process hold, each storage counted once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in local if not tensor.is_meta)}
    return sum(storages.values())


class Before(TrainerCallback):
    """Reads everything before TrimCallback's turn."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.refs = [weakref.ref(parameter) for parameter in model.parameters()]

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.seen = read_all(model, optimizer) if state.global_step in (3, 6) else {}
        self.parameters = len(list(model.parameters()))


class After(TrainerCallback):
    """Compares after it."""

    def __init__(self, before: Before) -> None:
        self.before = before
        self.alive: list[int] = []
        self.elements: list[int] = []  # that parameters which are alive still hold
        self.unchanged: list[bool] = []
        self.bytes: list[int] = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        now = {id(parameter) for parameter in model.parameters()}
        if state.global_step in (3, 6):
            after = read_all(model, optimizer)
            assert len(now) < self.before.parameters
            pairs = [(self.before.seen[key][name], value) for key in after for name, value in after[key].items()]
            self.unchanged.append(len(pairs) >= 3 * len(after) and all(torch.equal(a, b) for a, b in pairs))
            self.before.seen = {}
        if state.global_step in (2, 4, 7):
            self.bytes.append(bytes_held())
        if state.global_step in (4, 7):
            held = [ref() for ref in self.before.refs if ref() is not None and id(ref()) not in now]
            self.alive.append(len(held))
            self.elements.append(sum(p.numel() + getattr(p, "ds_tensor", p.data).numel() for p in held))


def run_out(module: torch.nn.Module, at: int) -> None:
    """Raise what torch raises, at one call of a module in evaluation mode."""
    calls = iter(range(1, 10**6))

    def fail(module: torch.nn.Module, _: Any) -> None:
        if not module.training and next(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    module.register_forward_pre_hook(fail)


def arm(when: str, value: str) -> None:
    """Make this process kill itself at some moment."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if when == "after":
        TrimCallback.on_train_begin = after_call(TrimCallback.on_train_begin, threading.Timer(float(value), die).start)
    elif when == "drop":  # the layers are gone, the optimizer and the wrapper are not mended yet
        count = iter(range(int(value) + 1))
        PlannedDrop.apply = after_call(PlannedDrop.apply, lambda: die() if next(count) == int(value) else None)
    elif when == "model":  # half of the weights' file is written

        def half(model: Any, folder: str, *args: Any, **kwargs: Any) -> None:
            save(model, folder, *args, **kwargs)
            if str(folder).endswith(f"checkpoint-{value}"):
                file = Path(folder) / "model.safetensors"
                with file.open("r+b") as opened:
                    opened.truncate(file.stat().st_size // 2)
                die()

        save = PreTrainedModel.save_pretrained
        PreTrainedModel.save_pretrained = half
    else:  # half of the last file is written

        def torn(state: TrainerState, path: str) -> None:
            save_state(state, path)
            if f"checkpoint-{value}" in path:
                Path(path).write_text(Path(path).read_text()[:100])
                die()

        save_state = TrainerState.save_to_json
        TrainerState.save_to_json = torn


def after_call(function: Any, then: Any) -> Any:
    def both(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        then()
        return result

    return both


def main() -> None:
    if options.bf16:  # TrainingArguments want a GPU for bf16 unless use_cpu is set, which the detours forbid
        import transformers.training_args

        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    model: Any = tiny_model(tie_word_embeddings=True)  # before the arguments: under ZeRO-3 they make it be born in shards
    base = Path(options.folder) / f"base{os.environ.get('RANK', 0)}"
    if options.born:
        model.save_pretrained(base)
    block_bytes = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    args = TrainingArguments(
        output_dir=options.folder,
        max_steps=12,
        per_device_train_batch_size=4 // WORLD,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        bf16=options.bf16,
        learning_rate=1e-3,
        weight_decay=0.1,
        max_grad_norm=0.5,
        warmup_steps=2 if options.config_optimizer else 0,
        logging_steps=1,
        save_strategy="steps" if options.save else "no",
        save_steps=options.save or 500,
        report_to=[],
        disable_tqdm=True,
        **engine_arguments(),
    )
    if options.born:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(7)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    trim = TrimConfig(
        target_layers=4,
        drop_every="3",
        importance=options.importance,
        repair="none",
        calibration_size=options.calibration,
        trainable_ratio=options.trainable_ratio,
        warm_up_importance="none",  # random tokens cannot be learned, and the scan is to run all the same
        distill_weight=options.distill,
        distill_temperature=2.0,
    )
    if options.unit == "sublayer":
        trim = replace(trim, unit="sublayer", target_layers=6, layers_per_drop=3, importance_per_ms=options.per_ms)
        trim = replace(trim, latency_prompt_tokens=16)
    if options.importance == "auto":
        logging.set_verbosity_info()
        # sets of layers are compared by the model's loss without them
        trim = replace(trim, layers_per_drop=2, selection_budget=1.0, repair="auto" if options.repair else "none")
    elif options.repair:
        trim = replace(trim, repair="required", importance="block_influence", layers_per_drop=2, rescore=False)
    before = Before()
    after = After(before)
    texts = tiny_texts(options.examples)
    if options.save or options.resume or options.trainable_ratio or options.distill:
        trainer: Trainer = TrimTrainer(model, args, train_dataset=texts, trim=trim, callbacks=[before])
        trainer.add_callback(after)
    else:
        # a repair changes weights, as it should; by the defaults both go in one drop
        watching = [] if options.repair or options.importance == "auto" else [before, after]
        trainer = Trainer(model, args, train_dataset=texts, callbacks=[*watching[:1], TrimCallback(trim), *watching[1:]])
    held = []

    class Identity(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            held[:] = [trainer.model_wrapped, trainer.model, optimizer, trainer.lr_scheduler]

    trainer.add_callback(Identity)
    if options.out_of_memory and args.process_index == 1:
        run_out(model.model.layers[3].mlp, options.out_of_memory)
    if options.kill and args.process_index == options.kill_rank:
        arm(*options.kill.split(":"))
    resume: Any = options.resume
    if resume == "last":
        resume = any(unfinished(folder) is None for folder in Path(options.folder).glob("checkpoint-*"))
    try:
        trainer.train(resume_from_checkpoint=resume)
    except RuntimeError as error:
        if not options.out_of_memory:
            raise
        failed = {"raised": [type(error).__name__, str(error)], "step": trainer.state.global_step}
        (Path(options.folder) / f"rank{args.process_index}.json").write_text(json.dumps(failed))
        os._exit(0)  # the engine's own end waits for processes that are in the midst of a pass
    now = [trainer.model_wrapped, trainer.model, trainer.optimizer, trainer.lr_scheduler]
    assert all(a is b for a, b in zip(held, now, strict=True))
    trainer.save_model(str(Path(options.folder) / "final"))
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, TrimCallback))
    result = {
        "distributed_type": trainer.accelerator.distributed_type.value,
        "zero_stage": trainer.model_wrapped.zero_optimization_stage() if options.engine.startswith("zero") else None,
        "kept_layers": model.config.trim["kept_layers"],
        "kept_halves": [model.config.trim.get("kept_attention"), model.config.trim.get("kept_mlp")],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rates": [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry],
        "alive": after.alive,
        "elements": after.elements,
        "unchanged": after.unchanged,
        "bytes": after.bytes,
        "block_bytes": block_bytes,
        "repairs": callback.record.repairs,
        "trained_layers": callback.record.trained_layers,
        "unit_ms": callback.record.unit_ms,
        "trained": sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad),
    }
    (Path(options.folder) / f"rank{trainer.args.process_index}.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()


main()
