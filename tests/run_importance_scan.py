"""Two processes score with shares of different size; run by test_importance_distributed.py with torchrun.

python run_importance_scan.py {ddp,fsdp2,zero3} FOLDER CASE...   # a case is ARCHITECTURE:LAYERS:UNIT:IMPORTANCE
"""

from __future__ import annotations

import json
import os
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

ENGINE, OUT = sys.argv[1], Path(sys.argv[2])
CASES = [case.split(":") for case in sys.argv[3:]]
if ENGINE == "zero3":
    os.environ["DS_ACCELERATOR"] = "cpu"

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from importance_models import make_batches, make_model  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from trimllm_hf import score_layers  # noqa: E402
from trimllm_hf.engines.ddp import DDPEngine  # noqa: E402
from trimllm_hf.engines.fsdp import FSDPEngine  # noqa: E402
from trimllm_hf.surgery.blocks import find_blocks  # noqa: E402

MEMORY = {0: 1.0, 1: 8e-5}  # GB: the second process runs fewer candidates at a time than the first


def main() -> None:
    dist.init_process_group("gloo")
    result: dict[str, Any] = {}
    for (architecture, layers), cases in groupby(CASES, lambda case: case[:2]):
        model = make_model(architecture, num_hidden_layers=int(layers))
        blocks = list(find_blocks(model).blocks)
        gathers = dict.fromkeys([*map(str, range(len(blocks))), ""], 0)
        engine = {"ddp": with_ddp, "fsdp2": with_fsdp2, "zero3": with_zero3}[ENGINE](model, blocks, gathers)
        batches = make_batches(model, ((3, 9), (2, 7), (4, 5)))
        share = batches[:2] if dist.get_rank() == 0 else batches[2:]
        memory = MEMORY[dist.get_rank()]
        for _, _, unit, importance in cases:
            gathers.update(dict.fromkeys(gathers, 0))
            scores = score_layers(model, share, importance, unit, process_group=engine, memory_gb=memory)
            seen = {"blocks": [gathers[str(position)] for position in range(len(blocks))], "rest": gathers[""]}
            result[f"{architecture}:{layers}:{unit}:{importance}"] = {"scores": scores.tolist(), **seen}
    (OUT / f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def with_ddp(model: Any, blocks: list[Any], gathers: dict[str, int]) -> Any:
    return DDPEngine(DistributedDataParallel(model), torch.optim.SGD(model.parameters()))


def with_fsdp2(model: Any, blocks: list[Any], gathers: dict[str, int]) -> Any:
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for position, block in enumerate(blocks):
        fully_shard(block, mesh=mesh)
        count_unshards(block, gathers, str(position))
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # as Accelerate does; torch would keep the root gathered
    count_unshards(model, gathers, "")
    return FSDPEngine(model, torch.optim.SGD(model.parameters()))


def count_unshards(module: Any, gathers: dict[str, int], name: str) -> None:
    """Count the all-gathers of a module's own parameters: calls that find them gathered do nothing."""
    group = module._get_fsdp_state()._fsdp_param_group
    unshard = group.unshard

    def counted(async_op: bool = False) -> None:
        gathers[name] += not group.is_unsharded
        unshard(async_op)

    group.unshard = counted


def with_zero3(model: Any, blocks: list[Any], gathers: dict[str, int]) -> Any:
    import deepspeed

    from trimllm_hf.engines.deepspeed import DeepSpeedEngine

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    wrapper, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    ids = torch.arange(1, 9)[None]
    for _ in range(3):  # it records the order of the modules in training, and then fetches ahead
        wrapper.backward(wrapper(input_ids=ids, labels=ids).loss)
        wrapper.optimizer.zero_grad()
    for position, block in enumerate(blocks):
        parameters = list(block.parameters())
        for parameter in parameters:  # the last is the MLP's: the pass that checks leaves the first attention out
            count_gathers(parameter, gathers, str(position), parameter is parameters[-1])
    count_gathers(model.get_input_embeddings().weight, gathers, "", True)
    return DeepSpeedEngine(wrapper, wrapper.optimizer)


WATCHED: dict[int, str] = {}


def count_gathers(parameter: Any, gathers: dict[str, int], name: str, watched: bool) -> None:
    """Count the gathers of a watched parameter, whichever parameter they are asked of."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if watched:
        WATCHED[id(parameter)] = name
    for method in ("all_gather", "all_gather_coalesced"):
        inside = getattr(parameter, method)

        def counted(first: Any = None, *args: Any, inside: Any = inside, **kwargs: Any) -> Any:
            asked = list(first if first is not None else kwargs.get("param_list") or kwargs.get("params") or [parameter])
            for one in asked:
                if id(one) in WATCHED and one.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                    gathers[WATCHED[id(one)]] += 1
            return inside(*([first] if first is not None else []), *args, **kwargs)

        setattr(parameter, method, counted)


if __name__ == "__main__":
    main()
