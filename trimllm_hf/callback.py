"""`TrimCallback`: drops layers while a Trainer trains, one line in a script."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .adapters import adapters_of, base_of, mark
from .calibration import Batch, calibration_batches, draw, own_randomness
from .choices import next_drop, rehearse
from .config import TrimConfig
from .depth_check import refuse_other_depths, wrong_depth
from .engines import Engine, attach
from .engines.host import find_trainer, unwrapped
from .importance import needs_data, score_layers
from .layer_map import LayerMap
from .prepared import apply_drop
from .schedule import Plan, layers_due, plan_drops
from .stack import find_stack
from .surgery import plan_drop

logger = logging.get_logger("transformers.trimllm_hf")  # below transformers' logger: its verbosity and handlers


class TrimCallback(TrainerCallback, ExportableState):
    """Drops the least important layers of the model while it is fine-tuned.

    `Trainer(callbacks=[TrimCallback(TrimConfig(target_layers=16))])` is all that a script needs, in one process and under
    data-parallel training (DDP), with `Trainer` and its subclasses. The kept-layer map goes into `model.config.trim`, the
    checkpoints' trainer_state.json, and the logs (`trim/num_layers`, `trim/parameters`, `trim/score`).

    Args:
        config: The settings (or, as a Trainer hands them back on resume, a dict of them).
        trainer: The Trainer, if it is at hand; else it is looked up when training begins.
        calibration_dataset: Examples to score layers by, processed like the training set. Without it, `TrimTrainer` sets
            training examples aside; under another Trainer they are drawn from the training set, which still trains on
            them. Never the evaluation set.

    Raises:
        ValueError: When training begins, before anything is changed: on a target that the model or the plan cannot
            reach, a model or engine that cannot be trimmed, or a resumed checkpoint that keeps other layers than the
            model.
    """

    def __init__(
        self,
        config: TrimConfig | dict[str, Any],
        trainer: Trainer | None = None,
        calibration_dataset: Any = None,
    ) -> None:
        self.config = config if isinstance(config, TrimConfig) else TrimConfig(**config)
        self.trainer = trainer
        self.calibration_dataset = calibration_dataset
        self.layer_map: LayerMap | None = None
        self.start_num_layers: int | None = None  # depth when this run began: the plan counts from it
        self.plan: Plan = {}
        self.calibration_given = calibration_dataset is not None
        self._engine: Engine | None = None
        self._sizes: dict[int, int] = {}  # depth -> how many layers have to go at once
        self._watched: weakref.ref[nn.Module] | None = None
        self._batches: list[Batch] | None = None
        self._stand_in: Batch | None = None  # for a process whose share of the calibration set is empty

    def state(self) -> dict[str, Any]:
        """What trainer_state.json holds: the settings, the map, and where the run began."""
        return {
            "args": {"config": asdict(self.config)},
            "attributes": {
                "layer_map": None if self.layer_map is None else self._plain_map(),
                "start_num_layers": self.start_num_layers,
                "calibration_given": self.calibration_given,
                "num_processes": 1 if self._engine is None else self._engine.world_size,
            },
        }

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Watch the model, so that weights of another depth are refused instead of loaded by index."""
        needs_data(self.config.importance)  # raises on an unknown name
        if kwargs["model"] is not None:
            self._watch(kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check everything that can be checked, make the plan, and drop what is due before the first step."""
        self.trainer = trainer = self.trainer or find_trainer(self)
        model = unwrapped(trainer)
        self._watch(model)
        stateful: Any = state.stateful_callbacks  # a dict by class name, whatever its annotation says
        saved = stateful.setdefault(type(self).__name__, self.state())  # a checkpoint may be from before this callback
        self._restore(saved["attributes"], model, state)
        assert self.layer_map is not None and self.start_num_layers is not None
        target = self.config.resolve_target(self.layer_map.base_num_layers, self.layer_map.num_layers)
        self.plan = plan_drops(
            self.config,
            self.start_num_layers,
            target,
            state.max_steps,
            _steps_per_epoch(args, kwargs["train_dataloader"]),
        )
        self._take_adapters(base_of(model), args)
        self._engine = attach(trainer.accelerator, trainer.model_wrapped, trainer.optimizer)
        if self.plan:
            self._sizes = rehearse(model, target, self._open, self.config.part)  # raises where there is no way
            self._check_best_model(args)
            self._batches = self._calibration_batches(args, kwargs["train_dataloader"])
        self._drop_what_is_due(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Drop what is due after this optimizer step."""
        self._drop_what_is_due(state, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let go of the calibration batches and of the engine's references; what is saved from here is a whole model."""
        if self._engine is not None:
            self._engine.save_whole()
        self._batches = self._engine = None

    def _restore(self, attributes: dict[str, Any], model: PreTrainedModel, state: TrainerState) -> None:
        """Take up the run that the checkpoint holds; a run that starts now begins with the model's own map."""
        of_model = LayerMap.from_config(model.config, self.config.part)
        plain = attributes["layer_map"]
        if state.global_step == 0 or plain is None:
            self.layer_map, self.start_num_layers = of_model, of_model.num_layers
            return
        of_checkpoint = LayerMap.from_dict(plain) if isinstance(plain, dict) else plain
        if (of_checkpoint.part, of_checkpoint.kept_layers) != (of_model.part, of_model.kept_layers):
            raise ValueError(wrong_depth(of_model.kept_layers, of_checkpoint.kept_layers))
        self.layer_map, self.start_num_layers = of_checkpoint, attributes["start_num_layers"]
        model.config.trim = self._plain_map()

    def _take_adapters(self, base: PreTrainedModel, args: TrainingArguments) -> None:
        assert self.layer_map is not None
        if adapters_of(base) and args.load_best_model_at_end and (self.plan or self.layer_map.dropped_layers):
            raise ValueError(
                "Expected load_best_model_at_end=False when a model with adapters is trimmed, got True: a checkpoint holds "
                "the adapter only, and the best one may need layers of the base that are gone by then. Load it yourself: "
                "trim_like(base, checkpoint) on the full-depth base, then PeftModel.from_pretrained(base, checkpoint)."
            )
        mark(base, find_stack(base, self.config.part).name, self.layer_map)

    def _watch(self, model: nn.Module) -> None:
        if self._watched is None or self._watched() is not model:
            refuse_other_depths(model, self.config.part)
            self._watched = weakref.ref(model)

    def _open(self, depth: int) -> range:
        """The positions that are not protected."""
        return range(self.config.protect_first, depth - self.config.protect_last)

    def _check_best_model(self, args: TrainingArguments) -> None:
        """Refuse what would fail at the very end: the best checkpoint may be deeper than the model by then."""
        assert self._engine is not None
        if args.load_best_model_at_end and max(self.plan) > 0 and not self._engine.regrows:
            raise ValueError(
                "Expected load_best_model_at_end=False, got True: where the engine cuts parameters into shards, a best "
                "checkpoint from before a drop could not be loaded into the smaller model. Drop everything at the start "
                "(drop_every='once'), or set it to False and choose among the checkpoints: each is a complete model."
            )

    def _calibration_batches(self, args: TrainingArguments, dataloader: Any) -> list[Batch]:
        if not needs_data(self.config.importance):
            return []
        examples = self.calibration_dataset
        assert self.trainer is not None and self._engine is not None
        if examples is None and self.calibration_given:
            raise ValueError(
                "Expected the calibration_dataset that this run began with, got none: the Trainer made this callback "
                "anew. Set restore_callback_states_from_checkpoint=False; TrimCallback restores its state by itself."
            )
        if examples is None:
            dataset: Any = self.trainer.train_dataset
            logger.warning(
                f"TrimCallback scores layers on {self.config.calibration_size} examples of the training set, which are "
                "trained on as well. Use TrimTrainer, which sets them aside, or pass calibration_dataset."
            )
            if hasattr(dataset, "__len__"):
                size = min(self.config.calibration_size, len(dataset))
                examples = [dataset[i] for i in draw(len(dataset), size, self.config.calibration_seed)]
            else:
                examples = list(islice(iter(dataset), self.config.calibration_size))
        examples = list(examples)
        collate, columns = dataloader.collate_fn, getattr(dataloader.dataset, "column_names", None)
        with own_randomness(self.config.calibration_seed):  # a collator may draw
            (self._stand_in,) = calibration_batches(examples[:1], collate, 1, columns)
            return calibration_batches(
                examples, collate, args.per_device_train_batch_size, columns, self._engine.rank, self._engine.world_size
            )

    def _drop_what_is_due(self, state: TrainerState, control: TrainerControl) -> None:
        assert self.layer_map is not None and self.start_num_layers is not None
        dropped = self.start_num_layers - self.layer_map.num_layers
        due = layers_due(self.plan, state.global_step, dropped)
        should_log = control.should_log
        while due and due >= self._sizes.get(self.layer_map.num_layers, 1):  # a whole period goes at once, or waits
            due -= self._drop(state, due)
        control.should_log = should_log  # logging a drop clears it, and this step's loss would go unlogged

    def _drop(self, state: TrainerState, most: int) -> int:
        """Score, choose, drop: one layer, by scores of the model as it is now; or as many as have to go at once."""
        assert self.trainer is not None and self._engine is not None and self._batches is not None
        assert self.layer_map is not None
        model = unwrapped(self.trainer)
        depth = self.layer_map.num_layers
        try:
            scores = score_layers(
                model,
                self._batches,
                self.config.importance,
                self.config.unit,
                agree=self._engine.agree,
                seed=self.config.calibration_seed + depth,
                memory_gb=self.config.scan_memory_gb,
                sweep=self._engine.sweeps,
                stand_in=self._stand_in,
                progress=state.is_local_process_zero and not self.trainer.args.disable_tqdm,
                part=self.config.part,
            )
            drop = next_drop(
                lambda positions: plan_drop(
                    model,
                    positions,
                    self.config.unit,
                    step=state.global_step,
                    importance=self.config.importance,
                    scores=scores[positions].tolist(),
                    part=self.config.part,
                ),
                {position: scores[position].item() for position in self._open(depth)},
                most,
                self._sizes.get(depth, 1),
            )
        except Exception as error:  # one process must not drop, or wait, alone
            self._engine.fail(error)
            raise
        self._engine.agree(torch.zeros(1))  # nobody failed: all of them drop
        self.layer_map = apply_drop(self._engine, drop)
        gone = self.layer_map.history[-1].dropped
        score = scores[sorted(drop.positions)].mean().item()
        depth = self.layer_map.num_layers
        parameters = get_model_param_count(model)
        logger.info(
            f"Step {state.global_step}: dropped {f'layer {gone[0]}' if len(gone) == 1 else f'layers {list(gone)}'} of "
            f"{self.layer_map.base_num_layers} ({self.config.importance} {score:.4f}); {depth} layers, {parameters:,} "
            "parameters left."
        )
        self.trainer.log({"trim/num_layers": depth, "trim/parameters": parameters, "trim/score": score})
        return len(gone)

    def regrow(self, edit: Callable[[], LayerMap]) -> None:
        """Run an edit that gives the model other layers, and take up the map that it returns."""
        assert self._engine is not None and self.trainer is not None
        blocks = find_stack(unwrapped(self.trainer)).blocks
        self.layer_map = self._engine.edit(edit, lambda: list(blocks.parameters()))

    def _plain_map(self) -> dict[str, Any]:
        assert isinstance(self.layer_map, LayerMap)
        return self.layer_map.to_dict()


def _steps_per_epoch(args: TrainingArguments, dataloader: Any) -> int | None:
    if not has_length(dataloader):
        return None
    return max(1, math.ceil(len(dataloader) / args.gradient_accumulation_steps))
