"""What is mended around a model when layers leave it while it trains: one protocol, a file an engine."""

from .engine import Engine, attach, refuse_other_processes, unprepared
from .full_shape import full_shape
from .process_group import DistributedProcesses, Gathered, ProcessGroup, SingleProcess

__all__ = [
    "DistributedProcesses",
    "Engine",
    "Gathered",
    "ProcessGroup",
    "SingleProcess",
    "attach",
    "full_shape",
    "refuse_other_processes",
    "unprepared",
]
