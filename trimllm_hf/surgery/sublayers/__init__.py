"""Dropping an attention or an MLP alone, and the model classes that are built without it."""

from .attentions import attentions_that_stay, keep_attentions, layer_types
from .classes import class_of, refuse_unloadable, remove_missing_sublayers, update_classes, with_trimmed_class
from .output_specs import OutputSpecs, find_output_specs
from .pass_through import OutputSpec, PassThrough
from .remote_code import write_remote_code
from .saved_config import from_saved_config, to_saved_config

__all__ = [
    "OutputSpec",
    "OutputSpecs",
    "PassThrough",
    "attentions_that_stay",
    "class_of",
    "find_output_specs",
    "from_saved_config",
    "keep_attentions",
    "layer_types",
    "refuse_unloadable",
    "remove_missing_sublayers",
    "to_saved_config",
    "update_classes",
    "with_trimmed_class",
    "write_remote_code",
]
