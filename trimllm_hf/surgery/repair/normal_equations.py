"""The normal equations of a refit, summed over tokens while the model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..units import block_output
from .output_projection import OutputProjection, shape_of
from .ridge import Sums

CAP = 3.0  # a token is weighted as if its norms were at most this multiple of the median
FEW = 8  # tokens: for a shorter row, the median of the whole batch is used


class State:
    """The hidden states at a place, as one forward pass leaves them.

    Args:
        block: The block of the place.
        projection: The projection in front of the place that adds to the hidden states; None: not needed, after a block.
        inside: Whether the place is between the block's halves.
    """

    def __init__(self, block: nn.Module, projection: OutputProjection | None, inside: bool) -> None:
        self.block, self.projection, self.inside = block, projection, inside
        self.found: torch.Tensor | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record the states."""
        with ExitStack() as stack:
            norm = None if self.projection is None else self.projection.norm
            if norm is not None:  # the sum before it
                module, note = self.block.get_submodule(norm), self._given
            elif self.inside and self.projection is not None:
                stack.callback(self.block.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
                module, note = self.block.get_submodule(self.projection.name), self._written
            else:
                module, note = self.block, self._returned
            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
            yield

    def take(self) -> torch.Tensor:
        """The recorded states; they can be taken once."""
        found, self.found = self.found, None
        assert found is not None
        return found

    def _given(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.found = first_tensor(args, kwargs)

    def _begin(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.found = first_tensor(args, kwargs)

    def _written(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        assert self.found is not None and self.projection is not None
        self.found = self.found + self.projection.scale * output.reshape(self.found.shape)

    def _returned(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.found = block_output(output)


class NormalEquations:
    """The sums over tokens from which one gap's refit is computed.

    With a the features (the input of the output projection in front of the gap) and R the difference between the hidden
    states after the gap in the unchanged model and those in front of it in the model as it runs, they are the sums of
    a^T a and a^T R. Each token's rows of both are multiplied by
    w = min(1, 3 median|r| / |r|, 3 median|a| / |a|), where r = R plus what the projection adds: a token with massive
    activations (the first one, some delimiters), whose square would outweigh all others together, is reduced to the weight
    of a large one. It must not be left out, since nothing would then constrain the new weight in its direction.

    Args:
        before: The hidden states in front of the gap; their projection is the one that is refitted.
        last: Those after it.
        by_output: Whether the features are the projection's output, not its input. Then the refit multiplies weight and
            bias by one matrix (the form of ReplaceMe, arXiv 2505.02819), which needs fewer tokens.
    """

    def __init__(self, before: State, last: State, by_output: bool) -> None:
        assert before.projection is not None
        self.before, self.last, self.projection, self.by_output = before, last, before.projection, by_output
        self.module = before.block.get_submodule(before.projection.name)
        inputs, self.width = shape_of(self.module)
        # a bias is one more feature that is always 1
        self.features = self.width if by_output else inputs + (getattr(self.module, "bias", None) is not None)
        self.fitted = self.held_out = Sums(torch.empty(0), torch.empty(0))
        self.targets: list[torch.Tensor] = []
        self._seen: dict[str, torch.Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the hidden states after the gap of one forward pass of the unchanged model, as the next batch's target."""
        with self.last.watched():
            yield
        self.targets.append(self.last.take().to("cpu", copy=True))  # a GPU's memory is for the sums; some add in place

    @contextmanager
    def collecting(self, target: torch.Tensor, mask: torch.Tensor | None, held_out: bool = False) -> Iterator[None]:
        """Add one forward pass's tokens.

        Args:
            target: The hidden states after the gap in the unchanged model, of shape (rows, tokens, width).
            mask: Which of the tokens are real, of shape (rows, tokens); None: all.
            held_out: Whether to add them to the sums used to choose a penalty.
        """

        def note(_: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            self._seen.update(got=first_tensor(args, kwargs), gave=output.clone())  # Falcon adds to it in place

        with ExitStack() as stack:
            stack.callback(self.module.register_forward_hook(note, with_kwargs=True).remove)
            stack.enter_context(self.before.watched())
            yield
        before = self.before.take().float()
        with torch.autocast(before.device.type, enabled=False):  # a caller's autocast is meant for the model
            self._add_rows(before, target.to(before.device).float() - before, mask, held_out)
        self._seen.clear()

    def clear(self) -> None:
        """Forget the sums."""
        self.fitted = self.held_out = Sums(torch.empty(0), torch.empty(0))

    def _add_rows(self, before: torch.Tensor, residual: torch.Tensor, mask: torch.Tensor | None, held_out: bool) -> None:
        rows = before.shape[:-1]
        got, gave = (self._seen[name].float().reshape(*rows, -1) for name in ("got", "gave"))
        features = gave if self.by_output else got
        if not self.fitted.gram.numel():
            self.fitted, self.held_out = (self._zeros(before.device) for _ in range(2))
        real = torch.ones(rows, dtype=torch.bool, device=before.device) if mask is None else mask.to(before.device) != 0
        if not real.any():
            return
        weights = weights_of(features.norm(dim=-1), (residual + self.projection.scale * gave).norm(dim=-1), real)
        features, residual, weights = features[real], residual[real], weights[real][:, None]
        if self.features > features.shape[-1]:
            features = torch.cat([features, torch.ones_like(weights)], dim=-1)
        features, residual = features * weights, residual * (weights / self.projection.scale)
        sums = self.held_out if held_out else self.fitted
        sums.gram += features.T @ features
        sums.cross += features.T @ residual

    def _zeros(self, device: torch.device) -> Sums:
        gram = torch.zeros(self.features, self.features, dtype=torch.float64, device=device)
        return Sums(gram, torch.zeros(self.features, self.width, dtype=torch.float64, device=device))


def weights_of(features: torch.Tensor, targets: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Each token's weight, from the norms of its rows; all of shape (rows, tokens)."""
    weights = torch.ones_like(features)
    for norms in (features, targets):
        weights = torch.minimum(weights, CAP * _medians(norms, real) / norms.clamp(min=1e-30))
    return weights


def _medians(norms: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The median over each row's real tokens, of shape (rows, 1): what counts as large is relative to the row."""
    of_rows = norms.masked_fill(~real, torch.nan).nanmedian(dim=-1, keepdim=True).values
    few = real.sum(dim=-1, keepdim=True) < FEW
    return torch.where(few, norms[real].median(), of_rows)


def first_tensor(args: Any, kwargs: Any) -> torch.Tensor:
    """The first tensor that a module was called with."""
    found: torch.Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return found
