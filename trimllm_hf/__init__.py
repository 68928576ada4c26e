"""Drop the least important layers of a Hugging Face model while it is fine-tuned: TrimLLM for the Trainer."""

from .auto import trim_like
from .callback import TrimCallback
from .config import TrimConfig
from .importance import register_importance, score_layers
from .latency.measure import measure_latency
from .latency.report import LatencyReport
from .layer_map import LayerMap
from .loading import load_kept_layers, write_kept_layers
from .prepared import drop_prepared_layers
from .surgery import drop_layers
from .trainer import TrimTrainer, TrimTrainerMixin

__version__ = "0.1.0.dev0"

__all__ = [
    "LatencyReport",
    "LayerMap",
    "TrimCallback",
    "TrimConfig",
    "TrimTrainer",
    "TrimTrainerMixin",
    "drop_layers",
    "drop_prepared_layers",
    "load_kept_layers",
    "measure_latency",
    "register_importance",
    "score_layers",
    "trim_like",
    "write_kept_layers",
]
