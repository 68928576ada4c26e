"""`python -m trimllm_hf.cli` is `trimllm`."""

from . import app

app(prog_name="trimllm")
