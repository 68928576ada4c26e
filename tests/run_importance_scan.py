"""Two processes score with shares of different size; run by test_importance_distributed.py with torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from importance_models import make_batches, make_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trimllm_hf import score_layers


def main(engine: str, out: Path) -> None:
    dist.init_process_group("gloo")
    model = make_model("LlamaForCausalLM")
    gathers = [0] * len(model.model.layers)
    if engine == "fsdp2":
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for position, block in enumerate(model.model.layers):
            fully_shard(block, mesh=mesh)
            count_gathers(block, gathers, position)
        fully_shard(model, mesh=mesh)
    else:
        DistributedDataParallel(model)
    batches = make_batches(model, ((3, 9), (2, 7), (4, 5)))
    share = batches[:2] if dist.get_rank() == 0 else batches[2:]

    def agree(total: torch.Tensor) -> torch.Tensor:
        total = total.clone()
        dist.all_reduce(total)
        return total

    scores = score_layers(model, share, agree=agree).tolist()
    (out / f"{dist.get_rank()}.json").write_text(json.dumps({"scores": scores, "gathers": gathers}))
    dist.barrier()
    dist.destroy_process_group()


def count_gathers(block: torch.nn.Module, gathers: list[int], position: int) -> None:
    """Count the all-gathers of a block's parameters: calls that find them gathered do nothing."""
    group = block._get_fsdp_state()._fsdp_param_group  # type: ignore[operator]
    unshard = group.unshard

    def counted(async_op: bool = False) -> None:
        gathers[position] += not group.is_unsharded
        unshard(async_op)

    group.unshard = counted


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
