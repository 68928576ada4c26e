"""What fine-tuning and trimming cost outside the domain: loss on a general text; shared by the recipes."""

from math import sqrt
from pathlib import Path
from typing import Any

from trimllm_hf.choice_accuracy import QuestionEncoder, log_likelihoods


def read_pieces(path: str, encoder: QuestionEncoder, most: int = 200) -> list[dict[str, list[int]]]:
    """A text file in pieces (between `<|endoftext|>` if it has that, else between empty lines), cut to the context."""
    text = Path(path).read_text(encoding="utf-8")
    pieces = text.split("<|endoftext|>" if "<|endoftext|>" in text else "\n\n")
    ids = [encoder.tokenizer(piece.strip()).input_ids[: encoder.max_length] for piece in pieces if piece.strip()]
    long_enough = [piece for piece in ids if len(piece) > 1][:most]
    if not long_enough:
        raise ValueError(f"Expected text in {path}, got none of at least two tokens.")
    return [{"input_ids": piece, "labels": piece} for piece in long_enough]


def general_loss(
    model: Any, pieces: list[dict[str, list[int]]], encoder: QuestionEncoder, batch_size: int
) -> dict[str, float]:
    """Loss per token, and half the width of its 95% interval, in which a piece counts as one observation.

    The loss is a ratio of sums, so its standard error is that of the pieces' deviations from it (Cochran 1977, §6.4).
    """
    scores = log_likelihoods(model, pieces, encoder, batch_size)
    tokens = sum(length for _, length in scores)
    loss = -sum(total for total, _ in scores) / tokens
    deviations = sum((-total - loss * length) ** 2 for total, length in scores)
    return {"loss": loss, "half_width": 1.96 * sqrt(deviations * len(scores) / max(1, len(scores) - 1)) / tokens}
