"""Sublayers: an attention or an MLP that goes alone, and the model classes that are built without it."""

from .attentions import attentions_that_stay, keep_attentions
from .classes import cast, class_of, take_halves_out, update_classes
from .halves import Halves, find_halves
from .stand_in import Gives, StandIn
from .stored import restored, stored

__all__ = [
    "Gives",
    "Halves",
    "StandIn",
    "attentions_that_stay",
    "cast",
    "class_of",
    "find_halves",
    "keep_attentions",
    "restored",
    "stored",
    "take_halves_out",
    "update_classes",
]
