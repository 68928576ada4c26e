"""Ways to use a Trainer: each makes one, for a folder and callbacks, with more arguments if asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_base import save_base
from test_training import arguments
from tiny import VOCABULARY, tiny_model, tiny_texts
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
)
from transformers.optimization import Adafactor

Make = Callable[..., Trainer]  # (folder, callbacks, **more arguments)


def with_arguments(kind: type[Trainer] = Trainer, model: Any = None, **row: Any) -> Make:
    def make(folder: Path, callbacks: list[TrainerCallback], **more: Any) -> Trainer:
        torch.manual_seed(3)
        given = {"train_dataset": tiny_texts(40), "eval_dataset": tiny_texts(8, seed=9), "callbacks": callbacks}
        args = arguments(folder, **{"max_steps": 8, "seed": 7, **row, **more})
        return kind(tiny_model() if model is None else model(), args, **given)

    return make


def with_optimizer(
    groups: Callable[[Any], Any], optimizer: Any = torch.optim.AdamW, scheduler: Any = None, **how: Any
) -> Make:
    def make(folder: Path, callbacks: list[TrainerCallback], **more: Any) -> Trainer:
        torch.manual_seed(3)
        model = tiny_model()
        made = optimizer(groups(model), **{"lr": 1e-3, **how})
        plan = scheduler(made) if scheduler else LambdaLR(made, lambda step: max(0.0, 1 - step / 10))
        given = {"train_dataset": tiny_texts(40), "callbacks": callbacks}
        return Trainer(model, arguments(folder, **{"max_steps": 8, **more}), optimizers=(made, plan), **given)

    return make


def layerwise(model: Any) -> list[dict[str, Any]]:
    """A group a layer, each with a learning rate of its own."""
    layers = [
        {"params": list(block.parameters()), "lr": 1e-3 * 0.8 ** (5 - i)} for i, block in enumerate(model.model.layers)
    ]
    inside = {id(parameter) for group in layers for parameter in group["params"]}
    return [{"params": [p for p in model.parameters() if id(p) not in inside], "lr": 1e-4}, *layers]


class OwnLoss(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), inputs["labels"][:, 1:].reshape(-1))
        return (loss, {"logits": logits}) if return_outputs else loss


class OwnOptimizer(Trainer):
    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(layerwise(self.model), lr=1e-3)
        return self.optimizer


def collated(folder: Path, callbacks: list[TrainerCallback], **more: Any) -> Trainer:
    """A collator pads, and makes the labels."""

    def pad(rows: list[Any]) -> dict[str, torch.Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row["input_ids"]) for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}

    rows = [{"input_ids": row["input_ids"][: 6 + i % 7]} for i, row in enumerate(tiny_texts(40))]
    args = arguments(folder, **{"max_steps": 8, "remove_unused_columns": False, **more})
    return Trainer(tiny_model(), args, train_dataset=rows, data_collator=pad, callbacks=callbacks)


def classifier(**row: Any) -> Make:
    def make(folder: Path, callbacks: list[TrainerCallback], **more: Any) -> Trainer:
        texts = [{"input_ids": text["input_ids"], "labels": i % 3} for i, text in enumerate(tiny_texts(40))]
        config = tiny_model(num_labels=3).config
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_config(config)
        return Trainer(model, arguments(folder, **{"max_steps": 8, **row, **more}), train_dataset=texts, callbacks=callbacks)

    return make


# ---- TRL


def words(rng: random.Random) -> str:
    return " ".join(f"w{rng.randrange(40)}" for _ in range(rng.randrange(3, 7)))


def texts_of(*columns: str) -> Any:
    from datasets import Dataset

    rng = random.Random(0)
    if columns == ("messages",):
        roles = ("user", "assistant")
        return Dataset.from_dict({"messages": [[{"role": r, "content": words(rng)} for r in roles] for _ in range(40)]})
    rows = {name: [words(rng) for _ in range(40)] for name in columns if name != "label"}
    return Dataset.from_dict(rows | ({"label": [i % 2 == 0 for i in range(40)]} if "label" in columns else {}))


def of_trl(kind: str, columns: str, model: Any = AutoModelForCausalLM, **how: Any) -> Make:
    """A Trainer of TRL, by its name or by that of a module of its experimental ones and its name."""

    def make(folder: Path, callbacks: list[TrainerCallback], **more: Any) -> Trainer:
        import importlib

        import trl

        module, _, name = kind.rpartition(".")
        place = importlib.import_module(f"trl.experimental.{module}") if module else trl
        base = folder / "base"
        if not base.exists():
            save_base(base)
        settings = {"max_steps": 8, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False}
        settings |= {"report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
        args = getattr(place, f"{name}Config")(str(folder), **{**settings, **how.get("args", {}), **more})
        given = {key: value() for key, value in how.items() if key != "args"}
        if "teacher_model" in how:
            given["teacher_model"] = AutoModelForCausalLM.from_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'][:1] + ' ' + m['content'] + ' ' }}{% endfor %}"
        torch.manual_seed(3)
        sized = {"num_labels": 1} if model is AutoModelForSequenceClassification else {}
        return getattr(place, f"{name}Trainer")(
            model=model.from_pretrained(base, **sized), args=args, train_dataset=texts_of(*columns.split()),
            processing_class=tokenizer, callbacks=callbacks, **given,
        )  # fmt: skip

    return make


def rewards() -> Any:
    return lambda completions, **_: [float(len(set(text.split()))) for text in completions]


TRL: dict[str, Make] = {
    "SFT": of_trl("SFT", "text"),
    "SFT, packed": of_trl("SFT", "text", args={"packing": True, "max_length": 16}),
    "DPO": of_trl("DPO", "prompt chosen rejected"),
    "KTO": of_trl("KTO", "prompt completion label"),
    "reward": of_trl("Reward", "prompt chosen rejected", AutoModelForSequenceClassification),
    "ORPO": of_trl("orpo.ORPO", "prompt chosen rejected", args={"max_length": 32}),
    "CPO": of_trl("cpo.CPO", "prompt chosen rejected", args={"max_length": 32}),
}
ROLLOUTS: dict[str, Make] = {  # what they train on they generate
    "GRPO": of_trl(
        "GRPO", "prompt", reward_funcs=rewards,
        args={"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8},
    ),
    "RLOO": of_trl(
        "RLOO", "prompt", reward_funcs=rewards,
        args={"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8},
    ),
    "online DPO": of_trl("online_dpo.OnlineDPO", "prompt", reward_funcs=rewards, args={"max_new_tokens": 8}),
}  # fmt: skip


ROWS: dict[str, Make] = {
    "as it is": with_arguments(),
    "accumulation 4": with_arguments(gradient_accumulation_steps=4),
    "checkpointing": with_arguments(gradient_checkpointing=True),
    "checkpointing, reentrant": with_arguments(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
    "label smoothing": with_arguments(label_smoothing_factor=0.1),
    "NEFTune": with_arguments(neftune_noise_alpha=5.0),
    "no clipping": with_arguments(max_grad_norm=0.0),
    "group by length": with_arguments(train_sampling_strategy="group_by_length"),
    "cosine with warm-up": with_arguments(lr_scheduler_type="cosine", warmup_steps=2),
    "SGD": with_arguments(optim="sgd"),
    "Adafactor": with_arguments(optim="adafactor"),
    "RMSprop": with_arguments(optim="rmsprop"),
    "Adagrad": with_arguments(optim="adagrad"),
    "evaluations": with_arguments(eval_strategy="steps", eval_steps=3, eval_on_start=True),
    "saves": with_arguments(save_strategy="steps", save_steps=3, save_total_limit=1),
    "own loss": with_arguments(OwnLoss),
    "own optimizer": with_arguments(OwnOptimizer),
    "tied embeddings": with_arguments(model=lambda: tiny_model(tie_word_embeddings=True)),
    "bf16 weights": with_arguments(model=lambda: tiny_model().to(torch.bfloat16)),
    "a sequence's class": classifier(),
    "layerwise rates": with_optimizer(layerwise),
    "layerwise rates, one cycle": with_optimizer(
        layerwise, scheduler=lambda o: OneCycleLR(o, max_lr=[group["lr"] for group in o.param_groups], total_steps=12)
    ),
    "layerwise rates, Adafactor": with_optimizer(layerwise, Adafactor, relative_step=False, scale_parameter=False),
    "named parameters": with_optimizer(lambda model: list(model.named_parameters())),
    "AMSGrad, cosine": with_optimizer(
        lambda model: model.parameters(), amsgrad=True, scheduler=lambda o: CosineAnnealingLR(o, 8)
    ),
    "NAdam": with_optimizer(lambda model: model.parameters(), torch.optim.NAdam),
    "RAdam": with_optimizer(lambda model: model.parameters(), torch.optim.RAdam),
    "momentum": with_optimizer(lambda model: model.parameters(), torch.optim.SGD, momentum=0.9, nesterov=True),
    "a collator of its own": collated,
    **TRL,
    "GKD": of_trl("gkd.GKD", "messages", teacher_model=lambda: None, args={"max_length": 32, "lmbda": 0.0}),
    **ROLLOUTS,
}

# Under several processes: global batches of as many examples, so that one process is the reference.
MOST_USED = [
    "as it is", "checkpointing", "label smoothing", "cosine with warm-up", "SGD", "own loss", "tied embeddings",
    "a sequence's class", "a collator of its own", "evaluations",
]  # fmt: skip


class Skip(TrainerCallback):
    """By hand: from a step on a layer hands on what it is given, and nothing of it is trained."""

    def __init__(self, history: Any) -> None:
        self.layers = {record.step: record.dropped for record in history}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        for layer in self.layers.get(state.global_step, ()):
            block = model.model.layers[layer]
            block.forward = lambda hidden_states, *_, **__: hidden_states
            gone = {id(parameter) for parameter in block.parameters()}
            plain = getattr(optimizer, "optimizer", optimizer)
            for group in plain.param_groups:
                group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in gone]
            for parameter in block.parameters():
                parameter.grad = None
                parameter.requires_grad_(False)
                plain.state.pop(parameter, None)


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
