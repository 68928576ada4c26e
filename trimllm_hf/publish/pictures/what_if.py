"""What a model would be at each depth: what bytes are read per token, and what memory its weights and its cache take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...latency.depths import Depth
from .style import INK, KEPT, MARK, dress

TOKENS = 1000  # that the cache is shown for


def what_if_figure(depths: Sequence[Depth], kept: int | None = None) -> Any:
    """The ratio of bytes read per token, the weights and the cache against depth, a panel each; the kept depth is marked.

    Down to a quarter of the layers, or to what is kept: the ratios of what nobody drops would hide the others.
    """
    from matplotlib.figure import Figure  # no pyplot: neither a display nor global state
    from matplotlib.ticker import MaxNLocator

    least = min(kept or depths[0].num_layers, -(-depths[0].num_layers // 4))
    depths = [depth for depth in depths if depth.num_layers >= least]
    unit, factor = ("GB", 1e9) if depths[0].weight_bytes >= 1e9 else ("MB", 1e6)
    panels: dict[str, list[float | None]] = {
        "bytes a token, all layers / these": [depth.byte_bound for depth in depths],
        f"weights ({unit})": [depth.weight_bytes / factor for depth in depths],
        f"KV cache (MB, {TOKENS:,} tokens)": [
            None if depth.kv_cache_bytes_per_token is None else depth.kv_cache_bytes_per_token * TOKENS / 1e6
            for depth in depths
        ],
    }
    known = {label: [value for value in values if value is not None] for label, values in panels.items()}
    shown = {label: values for label, values in known.items() if len(values) == len(depths)}
    figure = Figure(figsize=(2.8 * len(shown), 2.8), layout="constrained")
    layers = [depth.num_layers for depth in depths]
    for axes, (label, values) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        axes.plot(layers, values, color=KEPT, linewidth=1.6)
        if kept in layers:
            value = values[layers.index(kept)]
            axes.plot([kept], [value], color=MARK, marker="o", markersize=6)
            rising = values[-1] > values[0]  # beside the line, on the side that it leaves free
            axes.annotate(f"{value:.3g} at {kept}", (kept, value), (-6 if rising else 6, 6), textcoords="offset points",
                          ha="right" if rising else "left", color=INK, fontsize=9)  # fmt: skip
        axes.invert_xaxis()  # as in the other pictures the model gets shallower to the right
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.set_ylim(0, 1.12 * max(values))
        dress(axes, "layers left", label)
    return figure
