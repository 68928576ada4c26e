"""Drop the least important layers of a Hugging Face model while it is fine-tuned: TrimLLM for the Trainer.

A name is imported when it is first used (PEP 562): `import trimllm_hf` alone loads neither torch nor the Trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .importance.scores import register_importance, score_layers
    from .latency.measure import measure_latency
    from .latency.report import LatencyReport
    from .layer_map.layer_map import LayerMap
    from .loading.kept_layers import load_kept_layers
    from .loading.trim_like import trim_like
    from .loading.trimmed_folder import write_kept_layers
    from .publish.card import write_card
    from .publish.card_data import TrimCardData
    from .publish.hub import push_to_hub
    from .slicing.slice_map import SliceMap
    from .slicing.slice_model import slice_model
    from .surgery.drop import drop_layers
    from .surgery.remote_code import write_remote_code
    from .training.callback import TrimCallback
    from .training.config import TrimConfig
    from .training.prepared_loop import drop_prepared_layers
    from .training.repair import RepairReport, repair_layers
    from .training.trainer import TrimTrainer, TrimTrainerMixin

# models that lack sublayers, and sliced ones, become known to the Auto classes
import_module(".loading.auto_config", __name__).register_when_imported(
    {"trimllm": f"{__name__}.surgery.sublayers.classes:SUBLAYERS", "trimllm_sliced": f"{__name__}.slicing.classes:SLICED"}
)
import_module(".loading.old_paths", __name__).keep_old_paths()

__version__ = "0.1.0"

# The file of each public name; a test compares it with the imports above.
_FILES = {
    "LatencyReport": "latency.report",
    "LayerMap": "layer_map.layer_map",
    "RepairReport": "training.repair",
    "SliceMap": "slicing.slice_map",
    "TrimCallback": "training.callback",
    "TrimCardData": "publish.card_data",
    "TrimConfig": "training.config",
    "TrimTrainer": "training.trainer",
    "TrimTrainerMixin": "training.trainer",
    "drop_layers": "surgery.drop",
    "drop_prepared_layers": "training.prepared_loop",
    "load_kept_layers": "loading.kept_layers",
    "measure_latency": "latency.measure",
    "push_to_hub": "publish.hub",
    "register_importance": "importance.scores",
    "repair_layers": "training.repair",
    "score_layers": "importance.scores",
    "slice_model": "slicing.slice_model",
    "trim_like": "loading.trim_like",
    "write_card": "publish.card",
    "write_kept_layers": "loading.trimmed_folder",
    "write_remote_code": "surgery.remote_code",
}

__all__ = [
    "LatencyReport",
    "LayerMap",
    "RepairReport",
    "SliceMap",
    "TrimCallback",
    "TrimCardData",
    "TrimConfig",
    "TrimTrainer",
    "TrimTrainerMixin",
    "drop_layers",
    "drop_prepared_layers",
    "load_kept_layers",
    "measure_latency",
    "push_to_hub",
    "register_importance",
    "repair_layers",
    "score_layers",
    "slice_model",
    "trim_like",
    "write_card",
    "write_kept_layers",
    "write_remote_code",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_FILES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
