"""Which layers of which base model a trimmed model keeps, always in the base's numbering."""

from .depth import PARTS, depth_name, num_hidden_layers, num_layers_behind, part_config, resolve_part
from .layer_map import ADAPTER_MAP, MODEL_TYPE, MOST_LAYERS, SUBLAYER_KINDS, TRAINER_STATE, UNITS, LayerMap
from .record import DropRecord
from .trainer_state import run_in

__all__ = [
    "ADAPTER_MAP",
    "MODEL_TYPE",
    "MOST_LAYERS",
    "PARTS",
    "SUBLAYER_KINDS",
    "TRAINER_STATE",
    "UNITS",
    "DropRecord",
    "LayerMap",
    "depth_name",
    "num_hidden_layers",
    "num_layers_behind",
    "part_config",
    "resolve_part",
    "run_in",
]
