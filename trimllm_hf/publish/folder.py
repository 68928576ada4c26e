"""What the files of a model say: its map, sizes and checksums; its base's licence and sizes. No weights are loaded."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, get_local_safetensors_metadata, get_safetensors_metadata
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # re-exported there
from safetensors import safe_open
from transformers import AutoConfig
from transformers.utils import cached_file, logging  # type: ignore[attr-defined]  # re-exported there

from ..layer_map import LayerMap
from ..loading.readers import readers_of
from ..utils import checksum, is_lfs_pointer, json_at
from .remote import brief, transient

logger = logging.get_logger("transformers.trimllm_hf")

REPORT = "trim_report.json"
# Files that from_pretrained reads; without the card and its report, which describe them.
LOADED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "*processor_config.json"),
    *("tokenizer*", "*.jinja", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)


def describe_weights(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Files, parameters and bytes of a folder or a model on the Hub, by the headers of its safetensors files.

    Raises:
        ValueError: If a file of a folder is shorter or longer than its header says, or a pointer of Git LFS.
        NotASafetensorsRepoError: If it has no such files.
        SafetensorsParsingError: If one is damaged.
        OSError: If the Hub cannot be reached.
    """
    if Path(model).is_dir():
        try:
            found = get_local_safetensors_metadata(model)
        except SafetensorsParsingError:
            for path in filter(is_lfs_pointer, Path(model).glob("*.safetensors")):
                raise ValueError(f"Expected weights in {path}, got a pointer of Git LFS. Fetch: git lfs pull.") from None
            raise
        for name, file in found.files_metadata.items():
            _refuse_another_size(Path(model) / name, max((t.data_offsets[1] for t in file.tensors.values()), default=0))
    else:
        found = get_safetensors_metadata(str(model), revision=revision)
    tensors = [tensor for file in found.files_metadata.values() for tensor in file.tensors.values()]
    return {
        "files": sorted(found.files_metadata),
        "parameters": sum(found.parameter_count.values()),
        "parameters_by_dtype": dict(sorted(found.parameter_count.items())),
        "bytes": sum(end - start for start, end in (tensor.data_offsets for tensor in tensors)),
    }


def _refuse_another_size(path: Path, tensors: int) -> None:
    """Refuse a file that is not as long as its header says.

    Raises:
        ValueError: Naming both lengths.
    """
    with path.open("rb") as opened:
        expected = 8 + int.from_bytes(opened.read(8), "little") + tensors
    if (size := path.stat().st_size) != expected:
        raise ValueError(
            f"Expected {expected:,} bytes in {path}, by its header, got {size:,}: it is damaged, or was not written or "
            "downloaded to its end. Fetch it again."
        )


def describe_adapter(file: Path) -> dict[str, Any]:
    """Files, parameters and bytes of an adapter's file."""
    with safe_open(file, framework="pt") as tensors:
        shapes = {name: tensors.get_slice(name) for name in tensors.keys()}  # not a dict: only its keys can be listed
        counts = [(each.get_dtype(), math.prod(each.get_shape())) for each in shapes.values()]
    by_dtype = {kind: sum(count for other, count in counts if other == kind) for kind, _ in counts}
    return {
        "files": [file.name],
        "parameters": sum(by_dtype.values()),
        "parameters_by_dtype": dict(sorted(by_dtype.items())),
        "bytes": file.stat().st_size,
    }


def describe_trimmed(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """What the card says of the model in a folder.

    Args:
        folder: The model's folder.
        trust_remote_code: Whether the code beside its weights may be run to read its config.

    Raises:
        ValueError: If its config or map is damaged.
        OSError: If the folder holds no model.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    slicing = getattr(config, "slicing", None)
    if getattr(config, "trim", None) is None and slicing is None:
        raise ValueError(f"Expected a trimmed model in {folder}, got one whose config records no dropped layers.")
    layer_map = LayerMap.from_config(config).to_dict()
    layer_map.pop("base_model"), layer_map.pop("base_revision")  # the card's `base` says it, without local paths
    try:
        weights = describe_weights(folder)
    except NotASafetensorsRepoError:
        weights = None  # a Trainer's folder before the model is saved
    return {
        "map": layer_map,
        # likewise without a local path
        **({} if slicing is None else {"slicing": {k: v for k, v in slicing.items() if not k.startswith("base_")}}),
        "model_type": config.model_type,
        "architecture": (config.architectures or [None])[0],
        "remote_code": hasattr(config, "auto_map"),
        "readers": [asdict(verdict) for verdict in readers_of(config)[1:]],  # without transformers 5, which has its own row
        "weights": weights,
        "sha256": {
            path.name: checksum(path, large=True)
            for pattern in LOADED
            for path in sorted(folder.glob(pattern))
            if path.is_file()
        },
    }


def describe_base(base: str | None, revision: str | None) -> dict[str, Any] | None:
    """What a card says of the base: its Hub id and revision, or that it is a local model; its licence and sizes.

    What cannot be looked up (no network, no card, no licence) is left out, listed in `not_found` and logged.
    """
    if not base:
        return None
    local = is_local(base)
    found: dict[str, Any] = {"name": Path(base).name if local else base, "local": local}
    if not local:
        found |= {"id": base, "revision": revision}
    unknown = []
    hub: dict[str, Any] = {} if local else {"revision": revision}
    try:
        card = cached_file(base, "README.md", _raise_exceptions_for_missing_entries=False, **hub)
        data = ModelCard.load(card, ignore_metadata_errors=True).data if card else None
        for name in ("license", "license_name", "license_link"):
            if data is not None and isinstance(data.get(name), str):
                found[name] = data.get(name)
    except Exception as error:
        raise_unless_lookup(error)
        unknown.append("licence")
        logger.warning(f"The licence of {base} is not known: its card cannot be read ({brief(error)})")
    try:
        found["weights"] = describe_weights(base, revision)
    except Exception as error:
        raise_unless_lookup(error)
        unknown.append("size")
        logger.warning(f"The size of {base}'s files is not known ({brief(error)})")
    return found | ({"not_found": unknown} if unknown else {})


def raise_unless_lookup(error: Exception) -> None:
    """Re-raise an error, unless it is a missing or damaged file or a failure of the network.

    Raises:
        Exception: The error.
    """
    expected = isinstance(error, ValueError | NotASafetensorsRepoError | SafetensorsParsingError | HfHubHTTPError)
    if not expected and not transient(error):
        raise error


def hide_local_base(folder: Path) -> None:
    """Remove a base that is named by a local path from a folder's map, before the folder is published.

    The card does not name the path either: it says that the base is a local model. Its report gets the new checksum.
    """
    config, report = folder / "config.json", folder / REPORT
    plain = json_at(config)
    maps = [plain.get(name) for name in ("trim", "slicing")] if isinstance(plain, dict) else []
    local = [found for found in maps if isinstance(found, dict) and _names_a_path(found.get("base_model"))]
    if not local:
        return
    for found in local:
        base = found["base_model"]
        logger.warning(f"The base {base!r} is a local path: it was removed from the map in {config}.")
        found |= {"base_model": None, "base_revision": None}
    config.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    digests = json_at(report, "trimmed", "sha256")
    if isinstance(digests, dict) and config.name in digests:
        new = checksum(config, large=True)
        for file in (report, folder / "README.md"):
            if file.is_file():
                file.write_text(file.read_text(encoding="utf-8").replace(digests[config.name], new), encoding="utf-8")


def _names_a_path(base: Any) -> bool:
    return isinstance(base, str) and is_local(base)


def is_local(base: str) -> bool:
    """Whether a base is named by a local path. A folder that exists is preferred to a Hub id, as in `from_pretrained`."""
    return Path(base).is_dir() or not is_repo_id(base)


def is_repo_id(name: str) -> bool:
    """Whether a name can be a model's id on the Hub; an absolute path cannot."""
    if Path(name).is_absolute() or name.startswith((".", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
