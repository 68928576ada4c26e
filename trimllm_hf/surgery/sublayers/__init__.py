"""Dropping an attention or an MLP alone, and the model classes built without it."""

from .attentions import attentions_that_stay, keep_attentions, layer_types
from .classes import SUBLAYERS, custom_of, refuse_unloadable, remove_missing_sublayers
from .output_specs import OutputSpecs, find_output_specs
from .pass_through import OutputSpec, PassThrough

__all__ = [
    "SUBLAYERS",
    "OutputSpec",
    "OutputSpecs",
    "PassThrough",
    "attentions_that_stay",
    "custom_of",
    "find_output_specs",
    "keep_attentions",
    "layer_types",
    "refuse_unloadable",
    "remove_missing_sublayers",
]
