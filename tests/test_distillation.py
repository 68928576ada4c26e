"""The teacher's part of the loss, against plain torch; and runs with a teacher."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_model
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from trimllm_hf import TrimCallback, TrimConfig, TrimTrainer
from trimllm_hf.training.distillation import Teacher, half_precision, kl_divergence, labelled_positions

STEPS, RATE = 8, 0.05


def answers(size: int = 80, seed: int = 1) -> list[dict[str, list[int]]]:
    """Prompts without labels and answers with them, of many lengths: each batch is padded and has other counts."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(size):
        prompt, answer = torch.randint(3, 12, (2,), generator=generator).tolist()
        ids = torch.randint(3, VOCABULARY, (prompt + answer,), generator=generator).tolist()
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * prompt + ids[prompt:]})
    return examples


def pad(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch of them."""
    length = max(len(example["input_ids"]) for example in examples)
    filling = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([list(e[name]) + [value] * (length - len(e[name])) for e in examples])
        for name, value in filling.items()
    }


def make(folder: Path, model: Any = None, trim: TrimConfig | None = None, **changes: Any) -> TrimTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrimTrainer(
        model or tiny_model(),
        TrainingArguments(**{**settings, **changes}),
        train_dataset=answers(),
        eval_dataset=answers(8, seed=9),
        data_collator=pad,
        trim=trim or config(),
    )


def config(**changes: Any) -> TrimConfig:
    settings: dict[str, Any] = {"target_layers": 4, "drop_every": "2", "importance": "last", "repair": "none"}
    return TrimConfig(**{**settings, "distill_weight": 0.3, "distill_temperature": 2.0, **changes})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_gradient_is_that_of_the_formula(temperature: float) -> None:
    """d/ds of T² KL(t/T || s/T) = T (softmax(s/T) - softmax(t/T)); and no loss where both say the same."""
    student, teacher = torch.randn(2, 5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    student.requires_grad_()
    loss = kl_divergence(student, teacher, temperature)
    loss.backward()
    p, q = (torch.softmax(logits.double() / temperature, -1) for logits in (teacher, student.detach()))
    torch.testing.assert_close(loss.double(), temperature**2 * (p * (p / q).log()).sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), temperature * (q - p), rtol=1e-5, atol=1e-6)
    assert kl_divergence(teacher, teacher, temperature) == 0


def test_a_run_equals_plain_torch(tmp_path: Path) -> None:
    """Sums over the answers' tokens, divided by those of the whole step; the layer that goes leaves the student alone."""
    trainer = make(tmp_path)
    batches: list[dict[str, torch.Tensor]] = []
    step = trainer.training_step

    def recorded(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        batches.append({name: value.clone() for name, value in inputs.items()})
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = recorded
    student: Any = copy.deepcopy(trainer.model).train()
    teacher: Any = copy.deepcopy(trainer.model)
    trainer.train()
    expected, kept = [], list(range(6))
    for number in range(STEPS):
        pair = batches[2 * number : 2 * number + 2]
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in pair)
        counts = {int((batch["labels"][:, 1:] != -100).sum()) for batch in pair}
        total = torch.tensor(0.0)
        for batch in pair:
            ids, labels = batch["input_ids"], batch["labels"][:, 1:]
            logits = student(ids, attention_mask=batch["attention_mask"]).logits[:, :-1][labels != -100]
            with torch.no_grad():
                wanted = teacher(ids, attention_mask=batch["attention_mask"]).logits[:, :-1][labels != -100]
            p, q = torch.softmax(wanted / 2, -1), torch.softmax(logits / 2, -1)
            divergence = 4 * (p * (p.log() - q.log())).sum()
            task = cross_entropy(logits, labels[labels != -100], reduction="sum")
            loss = (0.7 * task + 0.3 * divergence) / tokens
            loss.backward()
            total += loss.detach()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None
        expected.append(total.item())
        for record in trainer.model.config.trim["history"]:
            if record["step"] == number + 1:
                del student.model.layers[kept.index(record["dropped"][0])]
                kept.remove(record["dropped"][0])
    assert len(counts) == 2  # the micro-batches of a step really differ
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(expected, abs=2e-5)
    assert len(trainer.model.model.layers) == len(student.model.layers) == 4
    for mine, theirs in zip(trainer.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


def test_the_teacher_stays_as_it_was_and_is_not_saved(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make(tmp_path / "run", model)
    trainer.train()
    teacher = trainer.teacher.model
    assert all(torch.equal(value, base[name]) for name, value in teacher.state_dict().items())
    assert (
        len(teacher.model.layers) == 6
        and not teacher.training
        and teacher.lm_head.weight is teacher.model.embed_tokens.weight
    )
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    trainer.save_model(str(tmp_path / "final"))
    assert LlamaForCausalLM.from_pretrained(tmp_path / "final").state_dict().keys() == model.state_dict().keys()


def test_off_is_off_and_an_evaluation_asks_no_teacher(tmp_path: Path) -> None:
    plain = make(tmp_path, trim=config(distill_weight=0.0))
    plain.train()
    assert plain.teacher is None
    trainer = make(tmp_path)
    trainer.train()
    trainer.teacher.model = None  # it would be called
    of_task = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        batch = pad(answers(8, seed=9))
        assert of_task == pytest.approx(trainer.model.eval()(**batch).loss.item(), abs=1e-5)
    changed = [not torch.equal(a, b) for a, b in zip(plain.model.parameters(), trainer.model.parameters(), strict=False)]
    assert any(changed)


def test_a_classifier_with_label_smoothing(tmp_path: Path) -> None:
    """The smoother takes the labels out of the batch; each row is a position. A step of SGD shows the gradient.

    The second one: before the first, student and teacher say the same.
    """
    model = tiny_model("bert", num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    teacher, student = copy.deepcopy(model), copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (32, 8), generator=generator)
    rows = [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(ids)]
    seen: list[dict[str, torch.Tensor]] = []
    states: list[dict[str, torch.Tensor]] = []

    class Recording(TrimTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append({name: value.clone() for name, value in inputs.items()})
            states.append({name: value.clone() for name, value in model.state_dict().items()})
            return super().training_step(model, inputs, *args, **kwargs)

    smoothing = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 1, "max_steps": 4}
    args = make(tmp_path, per_device_train_batch_size=8, **smoothing).args
    trim = TrimConfig(target_layers=5, drop_every="3", importance="last", repair="none", distill_weight=0.6)
    Recording(model, args, train_dataset=rows, trim=trim).train()

    student.load_state_dict(states[1])
    logits = student(seen[1]["input_ids"]).logits
    p = torch.softmax(teacher(seen[1]["input_ids"]).logits.detach(), -1)
    task = cross_entropy(logits, seen[1]["labels"], label_smoothing=0.1)
    divergence = (p * (p.log() - torch.log_softmax(logits, -1))).sum(-1).mean()
    assert divergence > 1e-3
    (0.4 * task + 0.6 * divergence).backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(states[2][name], parameter.detach() - RATE * parameter.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", [1, 3, 6], ids=["before", "between", "after"])
def test_resume_ends_with_the_same_bits(step: int, uninterrupted: tuple[Path, Any], tmp_path: Path) -> None:
    folder, expected = uninterrupted
    trainer = make(tmp_path, tiny_model(attention_dropout=0.1), optim="adamw_torch", learning_rate=1e-3)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert len(trainer.teacher.model.model.layers) == 6
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    changes: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1}
    trainer = make(folder, tiny_model(attention_dropout=0.1), **changes)
    trainer.train()
    return folder, trainer.model.state_dict()


def test_model_init_gives_teacher_and_student(uninterrupted: tuple[Path, Any], tmp_path: Path) -> None:
    folder, expected = uninterrupted
    args = make(tmp_path, optim="adamw_torch", learning_rate=1e-3).args

    def model_init() -> Any:
        model = tiny_model(attention_dropout=0.1)
        torch.manual_seed(args.seed)  # as a Trainer leaves it; making the model has set another one
        return model

    trainer = TrimTrainer(
        args=args,
        model_init=model_init,
        train_dataset=answers(),
        data_collator=pad,
        trim=config(),
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert len(trainer.teacher.model.model.layers) == 6
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())


def test_half_precision_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert half_precision(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert half_precision(torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert half_precision(torch.device("cuda")) == torch.float16
    monkeypatch.setattr("trimllm_hf.training.distillation.half_precision", lambda device: torch.bfloat16)
    model = tiny_model(tie_word_embeddings=True)
    teacher = Teacher(model).model
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {buffer.dtype for buffer in teacher.buffers()} == {torch.float32}  # positions need it
    ids = torch.arange(3, 13)[None]
    torch.testing.assert_close(teacher(ids).logits.float(), model(ids).logits, rtol=0.1, atol=0.1)


# ---- bad input


def test_a_plain_trainer_is_refused(tmp_path: Path) -> None:
    args = make(tmp_path).args
    trainer = Trainer(
        tiny_model(), args, train_dataset=answers(), callbacks=[TrimCallback(config(), calibration_dataset=[1])]
    )
    with pytest.raises(ValueError, match=r"Expected a TrimTrainer for distill_weight=0.3, got Trainer"):
        trainer.train()
    assert trainer.model.config.num_hidden_layers == 6


@pytest.mark.parametrize("other", ["seed", "depth"])
def test_another_teacher_is_refused_on_resume(other: str, uninterrupted: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = uninterrupted
    if other == "seed":
        model: Any = tiny_model(seed=1, attention_dropout=0.1)
    else:
        model = LlamaForCausalLM.from_pretrained(folder / "checkpoint-3")
    with pytest.raises(ValueError, match=r"whole and untrained, as the teacher, got another one"):
        make(tmp_path, model).train(resume_from_checkpoint=str(folder / "checkpoint-3"))


@pytest.mark.parametrize(
    "labels",
    [None, torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)],
    ids=["none", "several classes a row", "of another shape"],
)
def test_labels_that_are_no_classes_are_refused(labels: Any) -> None:
    logits = torch.zeros(2, 4, 3) if labels is None or labels.dim() == 1 else torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"Expected a class as the label of each of the logits.*Set distill_weight=0"):
        labelled_positions(logits, {} if labels is None else {"labels": labels}, causal=False)
