"""The strip of kept layers as an image in the trackers that support images."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.utils import logging

from ..layer_map import LayerMap
from ..publish.pictures import strip_figure

logger = logging.get_logger("transformers.trimllm_hf")
TAG = "trim/layers"


def _tensorboard(callback: Any, image: Any, step: int) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_image(TAG, np.asarray(image), step, dataformats="HWC")


def _wandb(callback: Any, image: Any, step: int) -> None:
    callback._wandb.log({TAG: callback._wandb.Image(image), "train/global_step": step})


def _trackio(callback: Any, image: Any, step: int) -> None:
    callback._trackio.log({TAG: callback._trackio.Image(np.asarray(image)), "train/global_step": step})


def _mlflow(callback: Any, image: Any, step: int) -> None:
    callback._ml_flow.log_image(image, f"trim_layers_{step}.png")


# by the name of transformers' callback: a tracker's module is imported only if it is in use
SENDERS: Mapping[str, Callable[[Any, Any, int], None]] = {
    "TensorBoardCallback": _tensorboard,
    "WandbCallback": _wandb,
    "TrackioCallback": _trackio,
    "MLflowCallback": _mlflow,
}


def send_strip(callbacks: Sequence[TrainerCallback], layer_map: LayerMap, step: int) -> None:
    """Send the strip to the trackers among a Trainer's callbacks; does nothing without matplotlib, which draws it.

    A failure of a tracker is logged once and otherwise ignored, so that an image cannot stop a run.

    Args:
        callbacks: The Trainer's callbacks, on the process that reports.
        layer_map: The layers kept now.
        step: Optimizer step.
    """
    senders = [(SENDERS[type(each).__name__], each) for each in callbacks if type(each).__name__ in SENDERS]
    if not senders or find_spec("matplotlib") is None:
        return
    from PIL import Image  # comes with matplotlib

    file = io.BytesIO()
    strip_figure(layer_map).savefig(file, format="png", dpi=100)
    image = Image.open(file).convert("RGB")
    for send, callback in senders:
        try:
            send(callback, image, step)
        except Exception as error:
            logger.warning_once(f"{type(callback).__name__} took no picture of the layers: {type(error).__name__}: {error}")
