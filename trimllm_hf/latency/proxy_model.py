"""A model to measure in place of the one that trains."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from ..surgery.adapters import base_of
from ..surgery.from_config import build_from_config
from ..surgery.sublayers import remove_missing_sublayers


def proxy_model(model: PreTrainedModel, part: str | None, args: TrainingArguments) -> Any:
    """A model like this one as it will be used: built from its config, adapters merged, alone on this process's device.

    It has other weights, and the dtype that the run computes in: by bf16 and fp16, else the model's own.

    Args:
        model: The unwrapped model; only its config is looked at.
        part: Of an encoder-decoder, the one whose layers are dropped.
        args: Say the dtype and the device.
    """
    base, usual = base_of(model), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype)
    try:
        twin: Any = build_from_config(base, {}, part, device=args.device)
    finally:
        torch.set_default_dtype(usual)
    remove_missing_sublayers(twin)
    return twin
