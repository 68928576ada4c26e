"""The files of a base model: which of them hold the weights, in transformers' order of preference, and their contents."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import (  # type: ignore[attr-defined]  # its types re-export none of them
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from ..utils import is_lfs_pointer

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
FILE_ARGUMENTS = ("use_safetensors", "variant")
CODE_ARGUMENTS = ("trust_remote_code", "code_revision")
# Other arguments of from_pretrained that determine which file is read or how its tensors are named.
_REFUSED = {
    "config": "it would be another than the base's, which is read",
    "from_flax": "only safetensors and PyTorch's files are read",
    "from_tf": "only safetensors and PyTorch's files are read",
    "gguf_file": "load the whole model with from_pretrained and use drop_layers",
    "key_mapping": "load the whole model with from_pretrained and use drop_layers",
    "state_dict": "load the whole model with from_pretrained and use drop_layers",
}


@dataclass(frozen=True)
class BaseFiles:
    """The location of a base, and how it is read.

    Attributes:
        base: Hub id or folder.
        arguments: Those of `from_pretrained`.
    """

    base: str | Path
    arguments: Mapping[str, Any]

    @property
    def hub(self) -> dict[str, Any]:
        """The arguments that locate files on the Hub, or in its cache."""
        return {name: self.arguments[name] for name in HUB_ARGUMENTS if self.arguments.get(name) is not None}

    @property
    def code(self) -> dict[str, Any]:
        """The arguments that say whether code beside the weights is run; by default it is not."""
        given = {name: self.arguments[name] for name in CODE_ARGUMENTS if name in self.arguments}
        return {"trust_remote_code": False, **given}

    def find(self, name: str) -> Path | None:
        """A file of the base, or None if it has none of that name."""
        found = cached_file(
            self.base,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **self.hub,
        )
        return None if found is None else Path(found)

    def refuse_arguments(self) -> None:
        """Refuse arguments that would choose other files.

        Raises:
            ValueError: Naming one.
        """
        for name, advice in _REFUSED.items():
            if self.arguments.get(name):
                raise ValueError(f"Expected no {name}= where only some layers are read, got one: {advice}.")

    def weights(self) -> dict[str, WeightFile]:
        """The weight files that `from_pretrained` would read, by name; only their headers are read.

        Raises:
            ValueError: If there are none, or an index names a file that is not a weight file of the base.
        """
        pickled = self.arguments.get("use_safetensors") is False
        one, many = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if pickled else (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        one, many = (_of_variant(name, self.arguments.get("variant")) for name in (one, many))
        named = self._named_by_config()
        if named is not None:
            one, many = (named, "") if not named.endswith(".index.json") else ("", named)
        if one and (path := self.find(one)) is not None:  # before an index, as transformers reads them
            return {one: _whole(one, path, pickled)}
        if many and (index := self.find(many)) is not None:
            return self._shards(index, ".bin" if pickled else ".safetensors")
        advice = ""
        if not pickled and any(self.find(name) for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
            advice = " It has pickled weights, which can run code: use_safetensors=False reads them, as in from_pretrained."
        expected = " or ".join(name for name in (one, many) if name)
        raise ValueError(f"Expected {expected} in {str(self.base)!r}, got {'neither' if one and many else 'none'}.{advice}")

    def download(self, file: WeightFile) -> WeightFile:
        """The weight file with a local path, downloaded if necessary.

        Raises:
            ValueError: If a folder lacks it.
            OSError: If it cannot be downloaded from the Hub.
        """
        if file.path is None and Path(self.base).is_dir() and self.find(file.name) is None:
            raise ValueError(
                f"Expected {file.name} in {str(self.base)!r}, which its index names, got none. A download or a save was not "
                "finished, or the index is left over from other weights."
            )
        if file.path is None:
            found = cached_file(self.base, file.name, **self.hub)
            assert found is not None  # a missing file raises
            file = WeightFile(file.name, file.tensors, Path(found))
        return file

    def _named_by_config(self) -> str | None:
        """The weight file that a config names explicitly."""
        config = self.find("config.json")
        named = json.loads(config.read_text(encoding="utf-8")).get("transformers_weights") if config is not None else None
        if named is None:
            return None
        if (
            not isinstance(named, str)
            or not _inside(named)
            or not named.endswith((".safetensors", ".safetensors.index.json"))
        ):
            raise ValueError(f"Expected transformers_weights to name a safetensors file of the base, got {named!r:.100}.")
        return named

    def _shards(self, index: Path, suffix: str) -> dict[str, WeightFile]:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            held: dict[str, list[str]] = {}
            for name, file in weight_map.items():
                held.setdefault(file, []).append(name)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"Expected a weight_map in {index}, got {type(error).__name__}: {error}. It is damaged."
            ) from None
        wrong = [file for file in held if not _inside(file) or not file.endswith(suffix)]
        if wrong:
            raise ValueError(f"Expected {index} to name {suffix} files beside it, got {wrong[0]!r:.100}. It is damaged.")
        return {name: WeightFile(name, tuple(tensors)) for name, tensors in held.items()}


@dataclass(frozen=True)
class WeightFile:
    """One file of weights.

    Attributes:
        name: In the base.
        tensors: The names of its tensors.
        path: Its local path, once it is on this machine.
    """

    name: str
    tensors: tuple[str, ...]
    path: Path | None = None

    def read(self, names: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Read some of its tensors under new names; `names` maps old names to new ones. The others are not read.

        Raises:
            ValueError: If the file is damaged.
        """
        assert self.path is not None
        if self.path.suffix != ".safetensors":
            held = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            yield from ((new, held[old]) for old, new in names.items())
            return
        with self.path.open("rb", buffering=0) as opened:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
            for old, new in names.items():
                if old not in header:
                    raise ValueError(f"Expected the tensor {old!r} in {self.path}, got none: the index is of other files.")
                start, end = header[old]["data_offsets"]
                tensor = torch.empty(header[old]["shape"], dtype=str_to_torch_dtype[header[old]["dtype"]])
                _read_into(tensor, opened, 8 + size + start, end - start)
                yield new, tensor

    def nbytes(self, names: Mapping[str, str]) -> int:
        """The size in bytes of some of its tensors; 0 if the header does not say."""
        assert self.path is not None
        if self.path.suffix != ".safetensors":
            return 0
        with self.path.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        return sum(header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in names if name in header)

    def header_metadata(self) -> dict[str, str]:
        """The header's metadata, where quantizers store how tensors are packed."""
        if self.path is None or self.path.suffix != ".safetensors":
            return {}
        with safe_open(self.path, framework="pt") as opened:
            return dict(opened.metadata() or {})


def _read_into(tensor: torch.Tensor, file: io.RawIOBase, offset: int, size: int) -> None:
    """Fill a tensor from a file, without memory mapping: through a mapping the kernel reads neighbouring tensors as well.

    Raises:
        ValueError: If the file is truncated, or its header contradicts itself.
    """
    bytes_of: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    view = memoryview(bytes_of) if tensor.numel() else memoryview(b"")
    file.seek(offset)
    done = 0
    while done < len(view) and (read := file.readinto(view[done:])):
        done += read
    if done != size or size != len(view):
        raise ValueError(f"Expected {len(view)} bytes of a tensor, got {done} at {offset}. The base's file is damaged.")


def _whole(name: str, path: Path, pickled: bool) -> WeightFile:
    try:
        if pickled:
            return WeightFile(name, tuple(torch.load(path, map_location="meta", mmap=True, weights_only=True)), path)
        with safe_open(path, framework="pt") as opened:
            return WeightFile(name, tuple(opened.keys()), path)
    except SafetensorError as error:
        pointer = is_lfs_pointer(path)
        said = "a pointer of Git LFS. Fetch the weights: git lfs pull" if pointer else f"{error}. The file is damaged"
        raise ValueError(f"Expected safetensors weights in {path}, got: {said}.") from None


def _of_variant(name: str, variant: str | None) -> str:
    """A weight file's name with a variant, in transformers' format: model.fp16.safetensors."""
    if not variant:
        return name
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}"


def _inside(name: Any) -> bool:
    """Whether a name read from a file stays within the folder or its subfolders."""
    return isinstance(name, str) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
