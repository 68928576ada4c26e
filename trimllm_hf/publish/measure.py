"""Latency for a card: models made from the configs of a folder and its base, since it depends on shapes alone."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..latency.depths import with_random_weights
from ..latency.measure import measure_latency
from ..latency.report import LatencyReport
from ..utils import isolated_rng
from .folder import raise_unless_lookup

PROMPT_TOKENS, NEW_TOKENS = 128, 64


def measure_for_card(folder: Path, base: str | None, revision: str | None = None, **settings: Any) -> dict[str, Any]:
    """The card's `latency`: a report as a dict, or `not_measured` with the reason (no such model, no memory).

    Args:
        folder: The trimmed model.
        base: Id or folder of its base; without one the model is measured alone.
        revision: Of the base.
        **settings: As for `measure_pair`.
    """
    try:
        return measure_pair(folder, base, revision, **settings).to_dict()
    except Exception as error:
        raise_unless_lookup(error)
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        for path in filter(None, (str(folder), base)):
            said = said.replace(path, Path(path).name)
        return {"not_measured": said}


def measure_pair(
    model: str | Path,
    base: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> LatencyReport:
    """Measure a model, with random weights, beside its base; see `measure_latency`.

    Args:
        model: Id or folder.
        base: Id or folder of its base, if it is to be measured as well.
        revision: Of the base.
        device: Where; the accelerator by default, else the CPU.
        dtype: Of the weights; that of the model's files by default.
        trust_remote_code: Whether code beside the weights may be run.
        **settings: As for `measure_latency`. Lengths that are not given are cut to what the model can take.

    Raises:
        ValueError: If the settings cannot be measured.
        OSError: If a config cannot be found.
    """
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    base_config = None
    if base is not None:
        base_config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
    kind: torch.dtype = getattr(torch, dtype) if dtype else (config.dtype or torch.float32)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    where = torch.device(device) if device else accelerator or torch.device("cpu")
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and "prompt_tokens" not in settings and "new_tokens" not in settings:
        settings["new_tokens"] = min(NEW_TOKENS, max(2, longest // 3))
        settings["prompt_tokens"] = min(PROMPT_TOKENS, longest - settings["new_tokens"])
    with isolated_rng(0):
        built = [with_random_weights(each, kind, where) for each in (config, base_config) if each is not None]
        try:
            return measure_latency(*built, **settings)
        finally:
            del built
            gc.collect()
