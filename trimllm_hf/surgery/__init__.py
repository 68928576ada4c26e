"""Surgery: removes layers from a model and their traces from its config, verified before anything changes.

| file | offers |
|---|---|
| `drop` | `drop_layers`; `plan_drop`, a verified drop that is applied later |
| `trimmable` | `resolve_model`: a model's blocks, layer map and adapters, looked up once for several plans |
| `blocks` | `find_blocks`, `find_sublayers` |
| `candidate_configs`, `verify` | candidates for the trimmed config, and the comparison that picks one |
| `from_config` | `build_from_config`: the model that a config describes, on the meta device |
| `position_constraints`, `per_layer_tensors`, `unshare_config` | what the fields of a config do not show |
| `adapters` | `base_of`, `adapters_of`: PEFT's wrapper and the configs of its adapters |
| `feasibility` | which layers can be dropped, and how many, from the config alone |
| `units` | the blocks or sublayers of a model as candidates for a score |
| `sublayers` | dropping an attention or an MLP alone |
"""

from .adapters import adapters_of, base_of
from .blocks import BlockStack, find_blocks, find_sublayers
from .drop import PlannedDrop, drop_layers, plan_drop
from .trimmable import TrimmableModel, resolve_model
from .units import Unit, list_units, without

__all__ = [
    "BlockStack",
    "PlannedDrop",
    "TrimmableModel",
    "Unit",
    "adapters_of",
    "base_of",
    "drop_layers",
    "find_blocks",
    "find_sublayers",
    "list_units",
    "plan_drop",
    "resolve_model",
    "without",
]
