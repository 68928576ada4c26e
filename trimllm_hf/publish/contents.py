"""Which files of a folder are published: those on an allow-list; the others are listed as left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..utils import format_bytes, json_at
from .credentials import refuse_credentials

CARD = "README.md"
# Files at the top of the folder. Weights are not in the list: they are those that from_pretrained would read.
ALLOWED = (
    *("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.codes"),  # config, tokenizer, processor, measurements
    *("*.md", "*.png", "*.jpg", "*.jpeg", "*.svg", "*.webp", "*.cff", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
NEVER = ("*credential*", "*secret*", "*service_account*", "*.safetensors.index.json")
PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".webp")


@dataclass(frozen=True)
class Contents:
    """The part of a folder that is published.

    Attributes:
        folder: The folder.
        sizes: Bytes of each file that is published, by its path in the folder (and in the repository).
        left_out: Names of the files and folders that are not published; folders end with a slash.
    """

    folder: Path
    sizes: Mapping[str, int]
    left_out: tuple[str, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """The safetensors files among them."""
        return tuple(name for name in self.sizes if name.endswith(".safetensors"))

    def __str__(self) -> str:
        size = f"{len(self.sizes)} files, {format_bytes(sum(self.sizes.values()))}"
        return size + (f"; left out: {', '.join(self.left_out)}" if self.left_out else "")


def contents_of(folder: str | Path, known_secrets: Mapping[str, str] | None = None) -> Contents:
    """Choose the files to publish, and check that each is complete and contains no credential.

    Args:
        folder: A model's folder, as `save_pretrained` or a Trainer leaves it.
        known_secrets: Secrets that no file may contain, by the name that the error uses.

    Raises:
        ValueError: If the folder does not hold a model, a file is incomplete, or one contains a credential.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"Expected a model's folder, got {str(folder)!r}, which is not a folder. Save the model first.")
    if not (folder / "config.json").is_file():
        advice = "Name the folder that save_pretrained or Trainer.save_model wrote."
        if (folder / "adapter_config.json").is_file():
            advice = "It holds an adapter: merge it into its trimmed base (merge_and_unload), save that, and push it."
        raise ValueError(f"Expected a model's folder with a config.json, got {str(folder)!r} without one. {advice}")
    weights = weight_files(folder)
    config = json_at(folder / "config.json")
    pictures = shown_pictures(folder)
    code = ("*.py",) if isinstance(config, dict) and "auto_map" in config else ()
    chosen: list[str] = list(weights)
    left_out: list[str] = []
    for path in sorted(folder.iterdir()):
        name = path.name
        if path.is_dir():
            if not any(picture.startswith(f"{name}/") for picture in pictures):
                left_out.append(f"{name}/")
        elif any(fnmatch(name, pattern) for pattern in (*ALLOWED, *code)) and not any(
            fnmatch(name.lower(), pattern) for pattern in NEVER
        ):
            chosen.append(name)
        elif name not in weights:
            left_out.append(name)
    chosen = sorted({*chosen, *pictures})
    for name in chosen:
        if name.endswith(".json"):
            json_at(folder / name)
    refuse_credentials(folder, chosen, known_secrets or {})
    return Contents(folder, {name: (folder / name).stat().st_size for name in chosen}, tuple(left_out))


def weight_files(folder: Path) -> tuple[str, ...]:
    """The weight files that from_pretrained would read, the index of shards among them.

    Raises:
        ValueError: If there are none in safetensors, or shards are missing.
    """
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return (SAFE_WEIGHTS_NAME,)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin") if path.name.startswith("pytorch_model"))
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
        advice = "Save the model into it with save_pretrained."
        if shards:
            advice = f"It holds {', '.join(shards[:3])} without their index, so a save was not finished: save again."
        elif pickled:
            advice = f"It holds {pickled[0]}, a pickle, which can run code where it is loaded: save with save_pretrained."
        raise ValueError(
            f"Expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} in {str(folder)!r}, got neither. {advice}"
        )
    plain = json_at(index)
    weight_map = plain.get("weight_map") if isinstance(plain, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"Expected a weight_map in {index}, got none. A save was not finished: save the model again.")
    shards = sorted(set(map(str, weight_map.values())))
    missing = [name for name in shards if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"Expected the {len(shards)} shards that {index} names, got none called {', '.join(missing[:3])}. A save was "
            "not finished: save the model again."
        )
    return (SAFE_WEIGHTS_INDEX_NAME, *shards)


def shown_pictures(folder: Path) -> tuple[str, ...]:
    """The pictures in the folder that its card shows, as paths in the folder.

    Raises:
        ValueError: If the card shows one that does not exist.
    """
    if not (folder / CARD).is_file():
        return ()
    text = (folder / CARD).read_text(encoding="utf-8-sig", errors="replace")
    found = re.findall(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)", text) + re.findall(r"<img[^>]+src=[\"']([^\"']+)", text)
    pictures = []
    for target in dict.fromkeys(found):
        if re.match(r"[a-z][a-z0-9+.-]*:|//|/", target):  # a URL
            continue
        path = folder / target
        if not path.is_file() or path.suffix.lower() not in PICTURES or ".." in Path(target).parts:
            raise ValueError(
                f"Expected the picture {target!r} that {folder / CARD} shows to lie in the folder, got none. Render the "
                "card again."
            )
        pictures.append(Path(target).as_posix())
    return tuple(pictures)
