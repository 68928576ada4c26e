"""What the zoo is made of: every type of model that an Auto class of the installed transformers knows, by its task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto import modeling_auto as auto


@dataclass(frozen=True)
class Kind:
    """Models of one task, of which one stack is trimmed."""

    name: str
    auto_class: Any
    names: dict[str, Any]
    part: str | None = None

    def types(self) -> Iterator[str]:
        """The model types of this kind, by the alphabet."""
        for model_type in sorted(self.names):
            if model_type in CONFIG_MAPPING and (self.part is None or CONFIG_MAPPING[model_type]().is_encoder_decoder):
                yield model_type

    def inputs(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Two rows of token ids; where there is a decoder, others for it."""
        generator = torch.Generator().manual_seed(1)
        inputs = {"input_ids": torch.randint(5, 90, (2, 12), generator=generator)}
        if self.part is not None:
            inputs["decoder_input_ids"] = torch.randint(5, 90, (2, 7), generator=generator)
        elif self.auto_class is AutoModelForSequenceClassification:
            end = getattr(model.config, "eos_token_id", None)
            if model.config.is_encoder_decoder and isinstance(end, int):
                inputs["input_ids"][:, -1] = end  # whose state BART's kin classify by
        return inputs


CAUSAL = Kind("causal LM", AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CLASSIFICATION = Kind(
    "sequence classification", AutoModelForSequenceClassification, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
)
DECODER = Kind(
    "decoder of encoder-decoder", AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "decoder"
)
ENCODER = Kind(
    "encoder of encoder-decoder", AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "encoder"
)
MULTIMODAL = Kind(
    "text part of image-text-to-text", AutoModelForImageTextToText, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
)
KINDS = {kind.name: kind for kind in (CAUSAL, CLASSIFICATION, DECODER, ENCODER, MULTIMODAL)}
