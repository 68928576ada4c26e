"""`trimllm`: the command line. A file a command; what they share is in `app.py`."""

# A command registers itself when its file is imported.
from . import bench, card, doctor, export, inspect, push, report, score, slice, trim
from .app import app

__all__ = ["app", "bench", "card", "doctor", "export", "inspect", "push", "report", "score", "slice", "trim"]
