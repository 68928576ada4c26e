"""`trimllm`: the command line. A file a command; what they share is in `app.py`."""

from . import inspect as inspect  # a command registers itself when it is imported; here, in the order of the help
from .app import app as app
