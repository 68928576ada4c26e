"""What another runtime answers, beside what transformers answers to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

NEW_TOKENS = 12
_LENGTHS = (7, 40)
_LONGEST = 2048  # of a prompt that is to reach beyond a sliding window
_TEXT = (
    "The patient came back after two weeks. His blood pressure had fallen, but the cough had not gone away, and the "
    "doctor asked for another picture of the lungs. Under the contract, either party may end the agreement with thirty "
    "days of notice in writing; what has been paid by then is not paid back. "
)


@dataclass(frozen=True)
class Comparison:
    """How far two runtimes are apart.

    Attributes:
        difference: The largest difference of a logit, over all prompts, positions and tokens.
        range: From the lowest logit of transformers to the highest.
        equal_tokens: Greedily chosen tokens that are transformers' choice too, after the same tokens.
        tokens: Of how many.
    """

    difference: float
    range: float
    equal_tokens: int
    tokens: int

    @property
    def share(self) -> float:
        """The difference as a share of the range."""
        return self.difference / self.range if self.range else float("inf")

    def __str__(self) -> str:
        said = f"logits differ by at most {self.difference:.3g} of a range of {self.range:.3g}"
        return f"{said}, {self.equal_tokens} of {self.tokens} greedy tokens are transformers'"


def prompts_for(folder: Path, config: PreTrainedConfig) -> list[list[int]]:
    """Token ids of a few prompts; one is longer than the model's sliding window, where it has one that is not too wide."""
    text = config.get_text_config(decoder=True)
    lengths = list(_LENGTHS)
    window = getattr(text, "sliding_window", None)
    if isinstance(window, int) and window + 32 <= _LONGEST:
        lengths.append(window + 32)
    longest = getattr(text, "max_position_embeddings", None) or _LONGEST
    lengths = [length for length in lengths if length + NEW_TOKENS <= longest] or [max(1, longest - NEW_TOKENS)]
    ids = _ids(folder, text.vocab_size, max(lengths))
    return [ids[:length] for length in lengths]


def _ids(folder: Path, vocabulary: int, length: int) -> list[int]:
    if any(folder.glob("tokenizer*")):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        ids = list(tokenizer(_TEXT).input_ids)
        if len(set(ids)) > 8 and max(ids) < vocabulary:
            return (ids * (length // len(ids) + 1))[:length]
    drawn = torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    return [int(each) for each in drawn]


class Reference:
    """The model of a folder in transformers, in float32."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        """The logits from which each of these tokens is chosen, shape (tokens, vocabulary)."""
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        found: NDArray[np.float32] = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].numpy()
        return found


def compare(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[tuple[Sequence[int], NDArray[np.float32]]],
    log_probabilities: bool = False,
) -> Comparison:
    """Ask transformers for the logits along another runtime's own tokens.

    Args:
        reference: The model in transformers.
        prompts: Token ids of each prompt.
        answers: For each, the tokens that the other runtime chose and the logits that it chose them from, shape
            (tokens, vocabulary). NaN is what a runtime does not say.
        log_probabilities: Whether it says these instead: logits but for one number a row.

    Raises:
        ValueError: If a logit is infinite, or a row has none.
    """
    difference, low, high, equal, count = 0.0, float("inf"), float("-inf"), 0, 0
    for prompt, (tokens, theirs) in zip(prompts, answers, strict=True):
        ours = reference.logits(prompt, tokens)
        width = min(ours.shape[1], theirs.shape[1])  # some runtimes leave rows out that stand for no token
        known = ~np.isnan(theirs[:, :width])
        if len(ours) != len(theirs) or not known.any(axis=1).all() or not np.isfinite(theirs[:, :width][known]).all():
            raise ValueError(f"Expected {len(ours)} rows of logits, got {theirs.shape}, and not in every row numbers.")
        apart = ours[:, :width] - theirs[:, :width]
        if log_probabilities:
            apart = apart - _log_sum(ours)[:, None]
        difference = max(difference, float(np.abs(apart[known]).max()))
        low, high = min(low, float(ours.min())), max(high, float(ours.max()))
        equal += int((ours.argmax(axis=1) == np.asarray(tokens)).sum())
        count += len(tokens)
    return Comparison(difference, high - low, equal, count)


def _log_sum(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = torch.from_numpy(logits).logsumexp(dim=1).numpy()
    return found
