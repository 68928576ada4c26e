"""Fine-tune a model and drop its least important transformer blocks as it learns (TrimLLM, arXiv 2412.11242)."""

__version__ = "0.1.0.dev0"
