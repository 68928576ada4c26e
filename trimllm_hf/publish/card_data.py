"""`TrimCardData`: the contents of a trimmed model's card, by where they come from; and its metadata for the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite, sqrt
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..layer_map import LayerMap
from ..utils import as_list
from .folder import is_repo_id

VERSION = 1
TAGS = ("trimmed", "pruned", "layer-pruning")  # the Hub knows no relation for a pruned model, so tags say it
PIPELINES = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
}


@dataclass(frozen=True)
class Score:
    """A measured figure and, where one was computed, an interval around it.

    Raises:
        ValueError: If a value is not finite.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            given = getattr(self, name)
            if given is None and name != "value":
                continue
            plain = float(given)  # numpy's numbers would become Python objects in YAML
            if not isfinite(plain):
                raise ValueError(f"Expected a finite number as {name} of a score, got {given!r}. Leave it out of the card.")
            object.__setattr__(self, name, plain)

    @classmethod
    def of_share(cls, share: float, n: int) -> Score:
        """A share of n independent examples (an accuracy) with Wilson's 95% interval (JASA 22, 1927).

        Raises:
            ValueError: If the share is not from 0 to 1 or there are no examples.
        """
        if not 0 <= share <= 1 or n < 1:
            raise ValueError(f"Expected a share from 0 to 1 of at least one example, got {share} of {n}.")
        z2 = 1.959964**2
        middle, half = share + z2 / (2 * n), sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
        return cls(share, max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n)))


@dataclass(frozen=True)
class Quality:
    """One measure of quality: of the trimmed model, and of those beside it that were measured too.

    Attributes:
        metric: What was measured, e.g. "accuracy".
        trimmed: Of the model that the card is about.
        dataset: What it was measured on, in words.
        split: Which part of it.
        n: Number of examples.
        base: Of the base model, before any fine-tuning.
        full: Of the base, fine-tuned in the same way at full depth.
        interval: What kind of interval the scores have, e.g. "95%, Wilson".
        dataset_id: The data set's id on the Hub, if it is there; and its revision.
        note: Further information, e.g. how the answer is chosen.
    """

    metric: str
    trimmed: Score
    dataset: str
    split: str
    n: int
    base: Score | None = None
    full: Score | None = None
    interval: str | None = None
    dataset_id: str | None = None
    revision: str | None = None
    note: str | None = None

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Quality:
        """Read what `dataclasses.asdict` wrote."""
        scores = {name: Score(**plain[name]) for name in ("trimmed", "base", "full") if plain.get(name) is not None}
        return cls(**{**plain, **scores})


@dataclass(frozen=True)
class DataUse:
    """A data set, or a split of one, and what it was used for.

    Attributes:
        use: "training", "calibration" or "test".
        name: The data set, in words.
        examples: How many.
        split: Which part of the data set.
        dataset_id: Its id on the Hub, if it is there; and its revision.
        note: How it was chosen, or kept apart from the others.
    """

    use: str
    name: str
    examples: int | None = None
    split: str | None = None
    dataset_id: str | None = None
    revision: str | None = None
    note: str | None = None


def tag_name(layer_map: LayerMap) -> str | None:
    """The depth as a tag: trim-16of32; trim-decoder-6of12 for a part; trim-27of32-sublayers where sublayers are gone.

    None for a model that keeps all its layers.
    """
    if layer_map.has_all_sublayers and not layer_map.dropped_layers:
        return None
    part = f"{layer_map.part}-" if layer_map.part else ""
    if layer_map.has_all_sublayers:
        return f"trim-{part}{layer_map.num_layers}of{layer_map.base_num_layers}"
    return f"trim-{part}{layer_map.num_units('sublayer')}of{2 * layer_map.base_num_layers}-sublayers"


class TrimCardData(ModelCardData):
    """The contents of a card. Each field has one source; what was not measured stays None, and the card says so.

    Args:
        repo_id: Given by the user: the model's id on the Hub, for the usage example.
        domain: Given: what the model was fine-tuned for, e.g. "medical questions in English".
        quality: Given: quality in the domain.
        outside: Given: quality outside the domain, which trimming may have cost.
        data: Given: the data sets, more than a Trainer can know of them.
        not_for: Given: what the model should not be used for, one sentence per entry.
        usage_prompt: Given: what the usage example asks (text, or chat messages).
        training: Filled by TrimTrainer: steps, settings, sizes of the data, the log.
        trimmed: Filled from the folder: map, parameters, bytes, checksums.
        base: Filled from the base's files: id, revision, licence, sizes.
        latency: Filled by `measure_latency`: a LatencyReport as a dict, or {"not_measured": why}.
        usage: Filled by running the example: its code and output, or {"not_run": why}.
        pictures: Filled by drawing them: the files that the card shows.
        **metadata: As for ModelCardData: language, license, model_name, tags, … `base_model` follows from the map if it is
            not given; `library_name` and the model index follow from the other fields.

    Raises:
        ValueError: If a given `base_model` is not an id of the Hub.
    """

    GIVEN = ("repo_id", "domain", "quality", "outside", "data", "not_for", "usage_prompt")
    FILLED = ("training", "trimmed", "base", "latency", "usage", "pictures")

    def __init__(
        self,
        *,
        repo_id: str | None = None,
        domain: str | None = None,
        quality: Sequence[Quality] = (),
        outside: Sequence[Quality] = (),
        data: Sequence[DataUse] = (),
        not_for: Sequence[str] = (),
        usage_prompt: str | list[dict[str, str]] | None = None,
        training: dict[str, Any] | None = None,
        trimmed: dict[str, Any] | None = None,
        base: dict[str, Any] | None = None,
        latency: dict[str, Any] | None = None,
        usage: dict[str, Any] | None = None,
        pictures: Sequence[str] = (),
        **metadata: Any,
    ) -> None:
        super().__init__(**metadata)
        for name in as_list(self.base_model):
            if not is_repo_id(str(name)):
                raise ValueError(
                    f"Expected base_model to be an id on the Hub, got {str(name)!r}. Leave it out for a local base."
                )
        self.repo_id = repo_id
        self.domain = domain
        self.quality = list(quality)
        self.outside = list(outside)
        self.data = list(data)
        self.not_for = list(not_for)
        self.usage_prompt = usage_prompt
        self.training = training
        self.trimmed = trimmed
        self.base = base
        self.latency = latency
        self.usage = usage
        self.pictures = list(pictures)

    @property
    def name(self) -> str:
        """The name of the model: the user's, or else one made of the base and the depth."""
        if self.model_name:
            return str(self.model_name)
        kept = (self.trimmed or {}).get("map")
        depth = tag_name(LayerMap.from_dict(kept)) if kept else None
        return "-".join(filter(None, (((self.base or {}).get("name") or "model").rpartition("/")[2], depth)))

    def to_report(self) -> dict[str, Any]:
        """All fields as plain values for JSON; `from_report` reads them back."""
        given = {name: getattr(self, name) for name in self.GIVEN}
        for name in ("quality", "outside", "data"):
            given[name] = [asdict(item) for item in given[name]]
        filled = {name: getattr(self, name) for name in self.FILLED}
        own = {*self.GIVEN, *self.FILLED}
        metadata = {name: value for name, value in vars(self).items() if name not in own and value is not None}
        return {"version": VERSION, **given, **filled, "metadata": metadata}

    @classmethod
    def from_report(cls, plain: Any) -> TrimCardData:
        """Read what `to_report` wrote.

        Raises:
            ValueError: If it is no report, or one of a newer version.
        """
        if not isinstance(plain, dict) or plain.get("version") != VERSION:
            version = plain.get("version") if isinstance(plain, dict) else plain
            raise ValueError(f"Expected a trim report of version {VERSION}, got {version!r:.60}. Write the card anew.")
        try:
            fields = {name: plain[name] for name in (*cls.GIVEN, *cls.FILLED)}
            for name in ("quality", "outside"):
                fields[name] = [Quality.from_dict(item) for item in fields[name]]
            fields["data"] = [DataUse(**item) for item in fields["data"]]
            return cls(**fields, **plain["metadata"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Expected a trim report, got a damaged one ({error!r:.100}). Write the card anew.") from error

    def _to_dict(self, data_dict: dict[str, Any]) -> None:
        """The metadata in the card's YAML, which the Hub reads."""
        for name in (*self.GIVEN, *self.FILLED, "model_name", "eval_results"):
            data_dict.pop(name, None)
        base, trimmed = self.base or {}, self.trimmed or {}
        data_dict["library_name"] = "transformers"
        data_dict["base_model"] = self.base_model or base.get("id")  # an id on the Hub, or nothing
        data_dict["base_model_relation"] = getattr(self, "base_model_relation", None) or (
            "finetune" if data_dict["base_model"] else None
        )
        data_dict["license"] = self.license or base.get("license")
        for name in ("license_name", "license_link"):
            data_dict[name] = getattr(self, name) or (None if self.license else base.get(name))
        data_dict["tags"] = list(dict.fromkeys([*(self.tags or ()), *TAGS]))
        kinds = [tag for kind, tag in PIPELINES.items() if (trimmed.get("architecture") or "").endswith(kind)]
        data_dict["pipeline_tag"] = self.pipeline_tag or (kinds[0] if kinds else None)
        used = [use.dataset_id for use in self.data if use.dataset_id and use.use == "training"]
        data_dict["datasets"] = list(dict.fromkeys([*as_list(self.datasets), *used])) or None
        data_dict["metrics"] = list(dict.fromkeys([*as_list(self.metrics), *(q.metric for q in self.quality)])) or None
        if results := [_result(quality, data_dict["pipeline_tag"]) for quality in (*self.quality, *self.outside)]:
            data_dict["model-index"] = eval_results_to_model_index(self.name, results)


def _result(quality: Quality, task: str | None) -> EvalResult:
    """For the model index: this model's score alone, as the Hub takes every score in it for this model's."""
    return EvalResult(
        task_type=task or "text-generation",
        dataset_type=quality.dataset_id or re.sub(r"[^a-z0-9]+", "-", quality.dataset.lower()),
        dataset_name=quality.dataset,
        dataset_split=quality.split,
        dataset_revision=quality.revision,
        metric_type=quality.metric,
        metric_name=quality.metric,
        metric_value=quality.trimmed.value,
    )
