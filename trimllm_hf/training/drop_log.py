"""What is told of a drop."""

from __future__ import annotations

from ..layer_map import LayerMap


def drop_log(
    layer_map: LayerMap, unit: str, step: int, margin: float | None, parameters: int
) -> tuple[str, dict[str, float]]:
    """What to tell of the last drop, and to log: to a person, and to TensorBoard and its like."""
    record, depth = layer_map.history[-1], layer_map.num_units(unit)
    score = max(record.scores or (float("nan"),))
    layers = f"layer{'s' * (len(record.dropped) > 1)} {', '.join(map(str, record.dropped))}"
    if record.sublayers is not None:
        named = zip(record.sublayers, record.dropped, strict=True)
        layers = ", ".join(f"the {kind} of layer {layer}" for kind, layer in named)
    to_next = "no other candidate" if margin is None else f"margin to the next best {margin:.4g}"
    line = (
        f"Step {step}: dropped {layers} of {layer_map.base_num_layers} ({record.importance} {score:.4f}, {to_next}); "
        f"{depth} layers, {parameters:,} parameters left."
    )
    logs = {"trim/num_layers": depth, "trim/parameters": parameters, "trim/score": score}
    return line, logs if margin is None else {**logs, "trim/margin": margin}
