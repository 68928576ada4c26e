"""A Trainer that writes its model card: with the model, and with measurements after training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..publish.card import write_card
from ..publish.card_data import TrimCardData
from ..publish.folder import is_repo_id
from .run_summary import describe_run, evaluated
from .trainer_hooks import unwrapped

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.get_logger("transformers.trimllm_hf")


class CardMixin(_Base):
    """Fills a model card with what the Trainer knows.

    Attributes:
        card_data: What the user adds: `trainer.card_data.domain = "medical questions"`, and so on, before it is written.
        training_finished: Whether `train` has finished; before that nothing is measured.
    """

    card_data: TrimCardData
    training_finished = False
    calibration_dataset: Any

    def trim_callback(self) -> Any:
        """The Trainer's TrimCallback."""
        raise NotImplementedError

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, as the Trainer does, and its card beside it (but not with checkpoints)."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and not self.args.push_to_hub:  # a push has already written the card with measurements
            self._write_card(Path(output_dir or str(self.args.output_dir)), measured=False)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write the card of the model in `args.output_dir`, from the run, its files, and measurements.

        After training, the latency of model and base is measured alternately, and the usage example is run; during training
        neither is done. `card_data` holds what only the user knows.

        Args:
            language: As for the Trainer, like the next three; written to the metadata.
            license: License of the model; by default the base's.
            tags: Tags in addition to those of this package.
            model_name: Name of the model.
            finetuned_from: Hub id of the base, if the map names none.
            *args: Arguments of other Trainers; not used, since the card is filled from the run itself.
            **kwargs: Likewise.
        """
        data = self.card_data
        if finetuned_from is not None and not is_repo_id(finetuned_from):
            finetuned_from = None  # a local path
        given = {"language": language, "license": license, "model_name": model_name, "base_model": finetuned_from}
        for name, value in given.items():
            if value is not None:
                setattr(data, name, value)
        if tags is not None:
            data.tags = list(dict.fromkeys([*(data.tags or ()), *([tags] if isinstance(tags, str) else tags)]))
        self._write_card(Path(str(self.args.output_dir)), measured=self.training_finished)

    def _write_card(self, folder: Path, measured: bool) -> None:
        if not self.is_world_process_zero():
            return
        callback = self.trim_callback()
        layer_map = callback.layer_map
        if layer_map is None or not layer_map.dropped_layers or not (folder / "config.json").is_file():
            logger.info(f"No card is written to {folder}: no layer has been dropped yet, or no model is saved there.")
            return
        self.card_data.repo_id = self.card_data.repo_id or self.hub_model_id  # None if nothing is pushed
        self.card_data.training = describe_run(self, callback, self.calibration_dataset)
        data = copy.copy(self.card_data)
        data.quality = data.quality or evaluated(self)
        consented = type(unwrapped(self)).__module__.startswith("transformers_modules.")  # to load the model
        progress = not self.args.disable_tqdm
        write_card(folder, data, measured=measured, trust_remote_code=consented, progress=progress)
