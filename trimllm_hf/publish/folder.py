"""What a model's files tell: its map, sizes and checksums; its base's licence and sizes. No weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, get_local_safetensors_metadata, get_safetensors_metadata
from huggingface_hub.errors import HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # re-exported there
from transformers import AutoConfig
from transformers.utils import cached_file, logging  # type: ignore[attr-defined]  # re-exported there

from ..layer_map import LayerMap
from ..utils import checksum

logger = logging.get_logger("transformers.trimllm_hf")

# What from_pretrained reads; not our own files, which tell of these.
LOADED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "*processor_config.json"),
    *("tokenizer*", "*.jinja", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)


def describe_weights(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Files, parameters and bytes of a folder or a model on the Hub, by the headers of its safetensors files.

    Raises:
        NotASafetensorsRepoError: If it has no such files.
        SafetensorsParsingError: If one is damaged.
        OSError: If the Hub cannot be reached.
    """
    if Path(model).is_dir():
        found = get_local_safetensors_metadata(model)
    else:
        found = get_safetensors_metadata(str(model), revision=revision)
    tensors = [tensor for file in found.files_metadata.values() for tensor in file.tensors.values()]
    return {
        "files": sorted(found.files_metadata),
        "parameters": sum(found.parameter_count.values()),
        "parameters_by_dtype": dict(sorted(found.parameter_count.items())),
        "bytes": sum(end - start for start, end in (tensor.data_offsets for tensor in tensors)),
    }


def describe_trimmed(folder: Path) -> dict[str, Any]:
    """What stands on the card of the model in a folder.

    Raises:
        ValueError: If its config or map is damaged.
        OSError: If the folder holds no model.
    """
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "trim", None) is None:
        raise ValueError(f"Expected a trimmed model in {folder}, got one that says of no layer that it was dropped.")
    layer_map = LayerMap.from_config(config).to_dict()
    layer_map.pop("base_model"), layer_map.pop("base_revision")  # the card's `base` says it, without local paths
    try:
        weights = describe_weights(folder)
    except NotASafetensorsRepoError:
        weights = None  # a Trainer's folder before the model is saved
    return {
        "map": layer_map,
        "model_type": config.model_type,
        "architecture": (config.architectures or [None])[0],
        "remote_code": hasattr(config, "auto_map"),
        "weights": weights,
        "sha256": {
            path.name: checksum(path, large=True)
            for pattern in LOADED
            for path in sorted(folder.glob(pattern))
            if path.is_file()
        },
    }


def describe_base(base: str | None, revision: str | None) -> dict[str, Any] | None:
    """What stands on a card of its base: a Hub id with its revision, or that it is a local model; licence and sizes.

    What cannot be found out (no network, no card, no licence) is left out, and said in the log.
    """
    if not base:
        return None
    local = Path(base).is_dir() or not is_repo_id(base)
    found: dict[str, Any] = {"name": Path(base).name if local else base, "local": local}
    if not local:
        found |= {"id": base, "revision": revision}
    hub: dict[str, Any] = {} if local else {"revision": revision}
    try:
        card = cached_file(base, "README.md", _raise_exceptions_for_missing_entries=False, **hub)
        data = ModelCard.load(card, ignore_metadata_errors=True).data if card else None
        for name in ("license", "license_name", "license_link"):
            if data is not None and isinstance(data.get(name), str):
                found[name] = data.get(name)
    except (OSError, ValueError) as error:
        logger.warning(f"The licence of {base} is not known: its card cannot be read ({error}).")
    try:
        found["weights"] = describe_weights(base, revision)
    except (OSError, ValueError, NotASafetensorsRepoError, SafetensorsParsingError) as error:
        logger.warning(f"The size of {base}'s files is not known ({error}).")
    return found


def is_repo_id(name: str) -> bool:
    """Whether a name can be a model's id on the Hub; a path cannot."""
    if Path(name).is_absolute() or name.startswith((".", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
