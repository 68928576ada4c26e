"""Exports: a folder in the format of another runtime, by that runtime's own converter, compared with transformers.

`export.py` converts, compares and moves into place; `formats.py` says what each format needs, `comparison.py` asks
transformers. `tools/` runs in the interpreter that has the tool, by itself.
"""

from .export import Export, export_model

__all__ = ["Export", "export_model"]
