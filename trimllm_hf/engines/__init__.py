"""What is mended around a model when layers leave it while it trains: one contract, a file an engine."""

from .attach import attach, engine_class
from .engine import Changes, Engine
from .process_group import DistributedProcesses, Gathered, ProcessGroup, SingleProcess, all_or_none
from .shards import full_shape, is_sharded, local_product, refuse_shards

__all__ = [
    "Changes",
    "DistributedProcesses",
    "Engine",
    "Gathered",
    "ProcessGroup",
    "SingleProcess",
    "all_or_none",
    "attach",
    "engine_class",
    "full_shape",
    "is_sharded",
    "local_product",
    "refuse_shards",
]
