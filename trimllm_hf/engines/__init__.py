"""What is mended around a model when layers leave it while it trains: one contract, a file an engine."""

from .attach import attach, engine_class
from .engine import Engine
from .process_group import DistributedProcesses, Gathered, ProcessGroup, SingleProcess
from .shards import full_shape, is_sharded, local_product, refuse_shards

__all__ = [
    "DistributedProcesses",
    "Engine",
    "Gathered",
    "ProcessGroup",
    "SingleProcess",
    "attach",
    "engine_class",
    "full_shape",
    "is_sharded",
    "local_product",
    "refuse_shards",
]
