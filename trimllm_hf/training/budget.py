"""A budget as the target: layers are dropped until the measured latency or memory is below it.

The measured model is the one that will be used: built from the trimmed config, in the dtype of the run, alone on the main
process's device. So a measurement means the same under every engine, and does not affect the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from ..engines import Engine
from ..latency.measure import measure_latency
from ..latency.proxy_model import proxy_model
from ..layer_map import LayerMap
from ..surgery.adapters import base_of
from ..surgery.drop import drop_layers
from ..utils import isolated_rng
from .config import TrimConfig

logger = logging.get_logger("transformers.trimllm_hf")

NEW_TOKENS, REPEATS, WARM_UP = 16, 7, 2  # for one measurement


@dataclass(frozen=True)
class Footprint:
    """The latency and memory of running a model.

    Attributes:
        num_layers: Its depth.
        latency_ms: Median time per generated token, or per forward pass if the model does not generate.
        memory_gb: Peak memory of running it, weights included, in 10^9 bytes.
    """

    num_layers: int
    latency_ms: float
    memory_gb: float

    def within(self, config: TrimConfig) -> bool:
        """Whether it is within the budget."""
        return all(value <= limit for _, value, limit in self._against(config))

    def compared(self, config: TrimConfig) -> str:
        """A text that compares the measurements with the budget."""
        return " and ".join(f"{value:.4g} {name} (budget {limit:.4g})" for name, value, limit in self._against(config))

    def _against(self, config: TrimConfig) -> list[tuple[str, float, float]]:
        limits = [("ms", self.latency_ms, config.max_latency_ms), ("GB", self.memory_gb, config.max_memory_gb)]
        return [(name, value, limit) for name, value, limit in limits if limit is not None]


@dataclass
class BudgetState:
    """A run's budget state, stored in trainer_state.json, since a new measurement would differ.

    Attributes:
        planned: The depth that the plan aims at.
        measured: For each depth (a string, as in JSON), latency in ms and memory in GB.
    """

    planned: int | None = None
    measured: dict[str, list[float]] = field(default_factory=dict)


class Budget:
    """`max_latency_ms` and `max_memory_gb` in a run.

    Args:
        config: The settings, including the batch size and prompt length for measurements.
        engine: For agreement between the processes.
        args: Determine the dtype by bf16 and fp16; else it is the model's own.
        state: The run's budget state; for a resumed run, from its checkpoint.
    """

    def __init__(self, config: TrimConfig, engine: Engine, args: TrainingArguments, state: BudgetState) -> None:
        self.config, self.engine, self.args, self.state = config, engine, args, state

    def target(self, model: PreTrainedModel, least: int, candidates: Sequence[int]) -> int:
        """The depth to plan for; the model's own depth, if it is already within the budget.

        Args:
            model: The unwrapped model.
            least: How many layers must be kept.
            candidates: The positions of the layers that may be dropped.

        Raises:
            ValueError: If not even a model of `least` layers is within the budget.
        """
        if self.state.planned is None:
            now = self.footprint(model)
            if now.within(self.config):
                logger.warning(f"No layer will be dropped: the model is under the budget: {now.compared(self.config)}.")
                self.state.planned = now.num_layers
            else:
                without = candidates[: now.num_layers - least]
                self.state.planned = depth_within(now, self.footprint(model, without), self.config)
                logger.info(f"Dropping towards {self.state.planned} layers; now: {now.compared(self.config)}.")
        return self.state.planned

    def met(self, model: PreTrainedModel) -> bool:
        """Whether the model in its current state is within the budget."""
        return self.footprint(model).within(self.config)

    def report(self, model: PreTrainedModel) -> None:
        """Log the final measurement of the run."""
        now = self.footprint(model)
        words = f"The run ends with {now.num_layers} layers: {now.compared(self.config)}."
        if now.within(self.config):
            logger.info(words)
        else:
            logger.warning(f"The budget is not met. {words}")

    def footprint(self, model: PreTrainedModel, without: Sequence[int] = ()) -> Footprint:
        """Measure a model of this architecture, once for each depth, on the main process; all processes get the same result.

        Args:
            model: The unwrapped model; only its config is used.
            without: Positions of the layers or sublayers that the measured model lacks.

        Raises:
            ValueError: If it cannot be measured with these settings.
            torch.OutOfMemoryError: If it does not fit on the device.
        """
        depth = LayerMap.from_config(base_of(model).config, self.config.part).num_units(self.config.unit) - len(without)
        if str(depth) not in self.state.measured:
            try:
                found = [0.0, 0.0] if self.engine.rank else _latency_and_memory(model, self.config, self.args, without)
            except Exception as error:  # the other processes wait for the result
                self.engine.raise_on_all(error)
                raise
            agreed = self.engine.all_reduce(torch.tensor(found, dtype=torch.float64))
            self.state.measured[str(depth)] = agreed.tolist()
        return Footprint(depth, *self.state.measured[str(depth)])


def depth_within(now: Footprint, least: Footprint, config: TrimConfig) -> int:
    """The depth at which the budget should be met, by linear interpolation between two measured depths.

    Blocks may differ, and timings are noisy: this is only for the plan. After each drop it is measured whether the budget is
    met.

    Raises:
        ValueError: If not even the least depth is within the budget.
    """
    if not least.within(config):
        raise ValueError(
            f"Expected a budget that can be met, got {least.compared(config)} with the {least.num_layers} layers that have "
            f"to stay, and {now.compared(config)} with all {now.num_layers}. Raise max_latency_ms or max_memory_gb, or let "
            "more layers go (target_layers, target_ratio, protect_first, protect_last)."
        )
    depth = now.num_layers - 1
    for (_, high, limit), (_, low, _) in zip(now._against(config), least._against(config), strict=True):
        if high > limit:
            share = (limit - low) / (high - low)
            depth = min(depth, least.num_layers + int(share * (now.num_layers - least.num_layers)))
    return max(depth, least.num_layers)


def _latency_and_memory(
    model: PreTrainedModel, config: TrimConfig, args: TrainingArguments, without: Sequence[int]
) -> list[float]:
    with isolated_rng(0):
        twin = proxy_model(model, config.part, args)
        if without:
            drop_layers(twin, without, config.unit, config.part)
        generates = twin.can_generate()
        report = measure_latency(
            twin,
            batch_sizes=[config.latency_batch_size],
            prompt_tokens=config.latency_prompt_tokens,
            new_tokens=NEW_TOKENS,
            repeats=REPEATS,
            warmup=WARM_UP,
        )
    (run,) = report.runs
    spread = run.decode_ms_per_token if generates else run.forward_ms
    assert spread is not None
    return [spread.p50, run.peak_memory_bytes / 1e9]
