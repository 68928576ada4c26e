"""`TrimConfig`: how far to trim a model, by which score, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..layer_map import UNITS
from .config_checks import check_settings
from .json_settings import JsonSettings
from .published import PUBLISHED


@dataclass
class TrimConfig(JsonSettings):
    """How far to trim, which layers, and when. Ready for `HfArgumentParser`; `to_json`/`from_json` round-trip.

    Give exactly one of `target_layers` and `target_ratio`; with a budget (`max_latency_ms`, `max_memory_gb`) at most one,
    which then limits how far trimming may go to meet it.

    Raises:
        ValueError: If values are invalid for every model. What depends on the model (a target at or above its depth) or on
            the run (too few steps) is checked when training starts, before anything is changed.
    """

    target_layers: int | None = field(
        default=None,
        metadata={"help": "How many layers the trimmed model keeps, e.g. 16 of 32. With a budget: how many at least."},
    )
    target_ratio: float | None = field(
        default=None,
        metadata={"help": "Share of the base's layers to keep, between 0 and 1; with a budget, at least."},
    )
    unit: str = field(
        default="block",
        metadata={
            "help": "What a layer is: 'block' (a whole layer of the model), or 'sublayer' (TrimLLM's: an attention or an "
            "MLP with its residual, two a block). target_layers, target_ratio and layers_per_drop count them."
        },
    )
    part: str | None = field(
        default=None,
        metadata={"help": "Of an encoder-decoder (T5, BART), what to trim: 'decoder' (the default there) or 'encoder'."},
    )
    portable: bool = field(
        default=False,
        metadata={"help": "Drop only so that runtimes which work out a layer's kind from its number find the right one."},
    )
    importance: str = field(
        default="auto",
        metadata={
            "help": "The score by which the least important layer is chosen: 'auto' (block influence by one ranking, "
            "compared with sets in fewer gaps, and with a lazy scan where `selection_budget` affords one), 'sensitivity' "
            "(leave-one-out loss on the calibration set), 'perplexity', 'activation_norm', 'block_influence', "
            "'layer_redundancy', 'angular', 'relative_magnitude', 'taylor', 'last', 'deepest_except_last', 'first', "
            "'random', or a name given to `register_importance`."
        },
    )
    selection_budget: float | None = field(
        default=None,
        metadata={
            "help": "With importance='auto': the share of the run, in forward passes (a training step is three), that may "
            "go into choosing layers; the log says what it affords. Default: 0.05, and in any case block influence and sets "
            "in fewer gaps."
        },
    )
    scan_metric: str = field(
        default="loss",
        metadata={
            "help": "What 'sensitivity' measures of the model without a layer: 'loss' (per token of the labels), "
            "'choice_accuracy', or a key of what the Trainer's compute_metrics returns."
        },
    )
    scan_greater_is_better: bool | None = field(
        default=None,
        metadata={"help": "Whether such a key is better the greater it is. Default: unless it ends in 'loss'."},
    )
    tie_breaker: str | None = field(
        default=None,
        metadata={"help": "The score that chooses among layers of equal importance, e.g. 'activation_norm' (TrimLLM's)."},
    )
    importance_per_ms: bool = field(
        default=False,
        metadata={
            "help": "Whether to divide what the model loses without a layer by the ms that the layer takes, measured once "
            "when training begins: an attention and an MLP do not cost the same. With unit='block' and blocks that are all "
            "alike the order stays what it is. For 'sensitivity', 'perplexity', 'block_influence', 'relative_magnitude', "
            "'taylor'."
        },
    )
    warm_up_importance: str = field(
        default="block_influence",
        metadata={
            "help": "The score in place of one that goes by the loss, while the loss on the calibration set is no better "
            "than that of a model which knows only how frequent each label is: such a scan would rank noise. 'none': never."
        },
    )
    drop_every: str = field(
        default="auto",
        metadata={
            "help": "'auto' ('once'; with max_metric_drop or healing_ratio 'spread'), 'once' (everything before the first "
            "step), 'spread' (one after the other, from a twentieth to a quarter of the steps), 'epoch', or a number of "
            "optimizer steps. By benchmarks/README.md, quality, one early cut is as good as several, and cheaper."
        },
    )
    healing_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of the steps at the end in which nothing is dropped, from 0 up to below 1. Default: 0.75 for "
            "'spread', one step for the other schedules."
        },
    )
    layers_per_drop: int = field(default=1, metadata={"help": "Layers dropped at a time."})
    rescore: bool = field(
        default=True,
        metadata={
            "help": "Whether to score anew after each layer of a drop, or to drop the lowest of one ranking. 'angular' "
            "always drops successive layers together."
        },
    )
    protect_first: int = field(default=1, metadata={"help": "Blocks at the input side that lose nothing."})
    protect_last: int = field(default=1, metadata={"help": "Blocks at the output side that lose nothing."})
    trainable_ratio: float | None = field(
        default=None,
        metadata={
            "help": "TrimLLM's sparse update: the share of the layers that train, to the nearest whole number; the most "
            "important ones, chosen once before the first step. The others are frozen, and dropped first. Needs TrimTrainer."
        },
    )
    train_embeddings: bool = field(
        default=False,
        metadata={"help": "With trainable_ratio: whether the embeddings train, and a head that is tied to them."},
    )
    train_head: bool = field(
        default=True,
        metadata={"help": "With trainable_ratio: whether the head trains, with whatever else is outside of the layers."},
    )
    calibration_size: int = field(
        default=64,
        metadata={"help": "Training examples set aside to score layers by. Never taken from the evaluation data."},
    )
    calibration_seed: int = field(
        default=0, metadata={"help": "Seed for drawing the calibration examples and for the score 'random'."}
    )
    repair: str = field(
        default="auto",
        metadata={
            "help": "Whether a weight in front of dropped layers is fitted anew to take over what it can of them: 'auto' "
            "(where the architecture allows, and the calibration loss is lower for it), 'required' (or an error), 'none'."
        },
    )
    repair_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens of training examples that it is fitted on. Default: 4 times the MLP's width."},
    )
    scan_memory_gb: float | None = field(
        default=None,
        metadata={"help": "Memory for a scan beside a forward pass, in 10^9 bytes. Default: half of what is free."},
    )

    max_metric_drop: float | None = field(
        default=None,
        metadata={
            "help": "Stop dropping once an evaluation is worse than the reference by more than this, and end with the last "
            "model that was not. Evaluates before each drop and at the last step."
        },
    )
    stop_metric: str | None = field(
        default=None,
        metadata={
            "help": "The evaluation metric that max_metric_drop watches, e.g. 'accuracy'. Default: metric_for_best_model of "
            "the TrainingArguments, else 'loss'. Higher is better, except for it as greater_is_better says, and for a loss."
        },
    )
    reference_metric: float | None = field(
        default=None,
        metadata={
            "help": "That metric after fine-tuning at full depth; dropping begins when the run has come as close to it as "
            "max_metric_drop allows. Default: what the last evaluation before the first drop gives."
        },
    )
    max_latency_ms: float | None = field(
        default=None,
        metadata={
            "help": "Drop until a generated token takes at most so many ms (for a model that does not generate: a forward "
            "pass), measured on this machine after each drop."
        },
    )
    max_memory_gb: float | None = field(
        default=None,
        metadata={"help": "Drop until running the model takes at most so much memory, in 10^9 bytes, measured likewise."},
    )
    latency_batch_size: int = field(default=1, metadata={"help": "Sequences at a time in all measurements of time."})
    latency_prompt_tokens: int = field(default=128, metadata={"help": "Tokens before the generated ones in them."})

    distill_weight: float = field(
        default=0.0,
        metadata={
            "help": "Share of the loss that is the KL divergence from what the full-depth model says as it was before "
            "training, from 0 (off) to 1. Takes TrimTrainer, and the memory and the forward pass of that model."
        },
    )
    distill_temperature: float = field(
        default=1.0, metadata={"help": "What the logits of both models are divided by in that divergence."}
    )

    def __post_init__(self) -> None:
        self.drop_every = str(self.drop_every)
        check_settings(self)

    @property
    def has_budget(self) -> bool:
        """Whether measured latency or memory determines how far to trim."""
        return self.max_latency_ms is not None or self.max_memory_gb is not None

    @classmethod
    def published(cls, **settings: Any) -> TrimConfig:
        """TrimLLM's original procedure: sublayers, a scan by accuracy with a tie-breaker, one at a time over the whole run.

        Its sparse update applies to blocks here: `published(unit="block", trainable_ratio=0.25, …)`.

        Args:
            settings: The target, and other settings that differ from `training.published.PUBLISHED`.
        """
        return cls(**{**PUBLISHED, **settings})

    @property
    def schedule(self) -> str:
        """`drop_every`, with 'auto' resolved."""
        if self.drop_every != "auto":
            return self.drop_every
        return "once" if self.max_metric_drop is None and self.healing_ratio is None else "spread"

    @property
    def by_budget(self) -> bool:
        """Whether the selection budget determines how layers are chosen."""
        asks = self.scan_metric != "loss" or self.tie_breaker is not None or self.importance_per_ms
        return self.importance == "auto" and not asks

    @property
    def score(self) -> str:
        """The score that ranks layers: `importance`; for 'auto', block influence, or a scan if one is requested."""
        if self.importance != "auto":
            return self.importance
        return "block_influence" if self.scan_metric == "loss" and self.tie_breaker is None else "sensitivity"

    def resolve_target(self, base_num_layers: int, num_layers: int) -> int:
        """The final number of layers, for a model with `num_layers` now whose base had `base_num_layers`.

        All are counted in the unit. With a budget it is the lowest number allowed: the target if there is one, else the
        number of protected layers.

        Raises:
            ValueError: If the target is not below the depth, or would require dropping a protected layer.
        """
        protected = (self.protect_first + self.protect_last) * UNITS[self.unit]
        if self.target_layers is not None:
            target, said = self.target_layers, f"target_layers={self.target_layers}"
        elif self.target_ratio is None:
            target = max(1, protected)
            said = f"{protected} protected layers"
        else:
            target = max(1, math.floor(self.target_ratio * base_num_layers + 0.5))
            said = f"target_ratio={self.target_ratio} of {base_num_layers} layers, that is {target},"
        if target > num_layers or target >= base_num_layers:
            raise ValueError(
                f"Expected a target below the model's depth, got {said} for a model of {num_layers} layers. Choose a "
                f"target from {max(1, protected)} to {num_layers - 1}."
            )
        if target < protected:
            raise ValueError(
                f"Expected a target of at least the {protected} protected layers (protect_first={self.protect_first}, "
                f"protect_last={self.protect_last}), got {said}. Raise the target or protect fewer layers."
            )
        return target

    def resolve_trainable(self, num_layers: int) -> int:
        """How many of `num_layers` layers train: `trainable_ratio` of them, rounded to nearest (.5 up), at least one."""
        ratio = 1.0 if self.trainable_ratio is None else self.trainable_ratio
        return max(1, math.floor(ratio * num_layers + 0.5))
