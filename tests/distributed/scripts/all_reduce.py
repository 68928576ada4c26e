"""Sums the ranks over all processes; `--fail` makes rank 1 raise, `--hang` makes it sleep."""

import sys
import time

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
if rank == 1 and "--fail" in sys.argv:
    raise ValueError("rank 1 was told to fail")
if rank == 1 and "--hang" in sys.argv:
    time.sleep(600)
total = torch.tensor(rank + 1)
dist.all_reduce(total)
print(f"rank {rank} of {dist.get_world_size()}: total {total.item()}, {torch.get_num_threads()} thread")
dist.destroy_process_group()
