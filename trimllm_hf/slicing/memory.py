"""Gives freed memory back to the operating system."""

from __future__ import annotations

import ctypes
import sys


def release_freed_memory() -> None:
    """Give freed memory back to the operating system, where the C library is glibc.

    glibc keeps freed blocks of up to 32 MB as long as one behind them is in use: here the activations, and weights that were
    replaced. They would stay resident beside large tensors, which do not fit into them.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
