"""What is mended around a model when layers leave it while it trains: one protocol, a file an engine."""

from .engine import Engine, attach, refuse_other_processes, unprepared
from .process_group import Alone, Hold, Processes, Together

__all__ = ["Alone", "Engine", "Hold", "Processes", "Together", "attach", "refuse_other_processes", "unprepared"]
