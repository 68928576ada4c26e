"""`LatencyReport`: what was measured, on what, with which spread."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from .sizes import Sizes

CONFIDENCE = 0.95  # of the interval of a speed-up


@dataclass(frozen=True)
class Spread:
    """A time over its repeats, in ms: median, 90th percentile, and the distance between the quartiles."""

    p50: float
    p90: float
    iqr: float
    n: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """The spread of some times in ms."""
        quarter, half, three, ninety = np.percentile(times, [25, 50, 75, 90]).tolist()
        return cls(half, ninety, three - quarter, len(times))


@dataclass(frozen=True)
class Run:
    """One model at one batch size.

    Attributes:
        batch_size: Sequences at a time.
        prefill_ms: Time to the first token; None for a model that does not generate.
        decode_ms_per_token: Time of each further step, which gives a token to every sequence.
        decode_tokens_per_s: Tokens a second over the batch, at the median.
        forward_ms: Time of a forward pass over the batch, for a model that does not generate.
        peak_memory_bytes: On an accelerator: weights and the allocator's peak above them. On CPU: weights and the
            growth of the resident set while running.
    """

    batch_size: int
    prefill_ms: Spread | None
    decode_ms_per_token: Spread | None
    decode_tokens_per_s: float | None
    forward_ms: Spread | None
    peak_memory_bytes: int


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as its base a model is.

    Attributes:
        what: "prefill", "decode" or "forward".
        batch_size: Sequences at a time.
        ratio: Median over the rounds of time of the base / time of the model.
        low, high: Interval of that median, from the order of the rounds' ratios (no assumption on their distribution).
        confidence: Its coverage; below 0.95 where there were fewer than 6 rounds.
        byte_bound: For decoding: 1 / (1 - f*s), the ratio of the weight bytes read for each token. f: share of blocks
            dropped; s: the blocks' share of the bytes read. It is what decoding gains where time goes with these bytes
            alone; small layers take longer than their bytes, so that a measured ratio may pass it.
        share_of_bound: ratio / byte_bound.
    """

    what: str
    batch_size: int
    ratio: float
    low: float
    high: float
    confidence: float
    byte_bound: float | None = None
    share_of_bound: float | None = None


@dataclass(frozen=True)
class LatencyReport:
    """What `measure_latency` found. `to_json` and `from_json` round-trip.

    Attributes:
        settings: prompt_tokens, new_tokens, repeats, warmup, cache, compile.
        environment: device and its name, threads, dtype, attention implementation, versions.
        sizes: Of the model.
        runs: Of the model, one per batch size.
        base_sizes, base_runs: The same of the base; None and empty where there was none.
        speedups: Of the model over the base.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    sizes: Sizes
    runs: tuple[Run, ...]
    base_sizes: Sizes | None = None
    base_runs: tuple[Run, ...] = ()
    speedups: tuple[Speedup, ...] = ()

    def speedup(self, what: str, batch_size: int | None = None) -> Speedup | None:
        """The speed-up of "prefill", "decode" or "forward", at a batch size or the first one."""
        found = [s for s in self.speedups if s.what == what and batch_size in (None, s.batch_size)]
        return found[0] if found else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def to_json(self, path: str | Path) -> None:
        """Write the report to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> LatencyReport:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: If a field is missing or unknown.
        """
        try:
            fields = dict(plain)
            fields["sizes"] = Sizes(**fields["sizes"])
            fields["base_sizes"] = fields.get("base_sizes") and Sizes(**fields["base_sizes"])
            fields["runs"], fields["base_runs"] = (
                tuple(_run_from_dict(run) for run in fields.get(name, ())) for name in ("runs", "base_runs")
            )
            fields["speedups"] = tuple(Speedup(**speedup) for speedup in fields.get("speedups", ()))
            return cls(**fields)
        except (TypeError, KeyError) as error:
            raise ValueError(f"Expected a latency report, got {error!r}. Measure again: measure_latency.") from error

    @classmethod
    def from_json(cls, path: str | Path) -> LatencyReport:
        """Read a report from a JSON file.

        Raises:
            ValueError: If the file holds no report.
        """
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """An interval of the median from order statistics, and its coverage.

    The k-th lowest and k-th highest of n values enclose the median with probability 1 - 2 P(Binomial(n, 1/2) < k).
    """
    n, ordered = len(values), sorted(values)
    below = np.cumsum([comb(n, k) / 2**n for k in range(n)])
    k = max((k for k in range(1, n // 2 + 1) if 1 - 2 * below[k - 1] >= confidence), default=1)
    return ordered[k - 1], ordered[-k], float(max(0.0, 1 - 2 * below[k - 1]))


def _run_from_dict(plain: dict[str, Any]) -> Run:
    spreads = {name: plain[name] and Spread(**plain[name]) for name in ("prefill_ms", "decode_ms_per_token", "forward_ms")}
    return Run(**{**plain, **spreads})
