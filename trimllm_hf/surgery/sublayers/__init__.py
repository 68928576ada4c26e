"""Sublayers: an attention or an MLP that goes alone, and the model classes that are built without it."""

from .attentions import attentions_that_stay, keep_attentions, layer_types
from .classes import cast, class_of, refuse_unloadable, take_halves_out, update_classes
from .find import Halves, find_halves
from .pass_through import Gives, StandIn
from .remote_code import write_remote_code
from .saved_config import restored, stored

__all__ = [
    "Gives",
    "Halves",
    "StandIn",
    "attentions_that_stay",
    "cast",
    "class_of",
    "find_halves",
    "keep_attentions",
    "layer_types",
    "refuse_unloadable",
    "restored",
    "stored",
    "take_halves_out",
    "update_classes",
    "write_remote_code",
]
