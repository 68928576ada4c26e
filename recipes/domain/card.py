"""The model card of a recipe's trimmed model, from the rows of the recipe's own table."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimllm_hf import TrimCardData, TrimTrainer
from trimllm_hf.choice_accuracy import Question
from trimllm_hf.publish.card_data import DataUse, Quality, Score

from .settings import Domain, DomainArguments

Rows = Sequence[dict[str, Any]]


def write_card(
    trainer: TrimTrainer,
    rows: Rows,
    recipe: DomainArguments,
    domain: Domain,
    questions: Mapping[str, Sequence[Question]],
) -> None:
    """Fill in what the Trainer does not know, then measure and write the card (and push both, with `--push_to_hub`).

    Args:
        trainer: The Trainer, after training, its model saved.
        rows: Of the base, of the model fine-tuned at full depth (if there is one), and of the trimmed model; none on other
            processes than the main one.
        recipe: The recipe's settings.
        domain: The recipe's domain.
        questions: The questions of each split.
    """
    if rows:
        of = {"base": rows[0], "trimmed": rows[-1]} | ({"full": rows[1]} if len(rows) == 3 else {})
        fill(trainer.card_data, of, recipe, domain, questions)
        if trainer.calibration_set_aside:
            training, *others = trainer.card_data.data
            trainer.card_data.data = [replace(training, note="The calibration examples are of them"), *others]
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()


def fill(
    data: TrimCardData,
    of: Mapping[str, Mapping[str, Any]],
    recipe: DomainArguments,
    domain: Domain,
    questions: Mapping[str, Sequence[Question]],
) -> None:
    """What a card says of a domain: subject, data, quality, and what the model is not for.

    Args:
        data: What is filled.
        of: Rows of the table, by "trimmed", and "base" and "full" where there are such.
        recipe: The recipe's settings.
        domain: The recipe's domain.
        questions: The questions of each split.
    """
    test = questions["test"]
    on_hub = not (recipe.train_file or recipe.validation_file or recipe.test_file)
    hub = {"dataset_id": recipe.dataset_name, "revision": recipe.dataset_revision} if on_hub else {}
    given = recipe.test_file or recipe.validation_file
    names = {use: str(recipe.dataset_name) if on_hub else _short(file or "") for use, file in (
        ("training", recipe.train_file), ("test", given or recipe.train_file),
    )}  # fmt: skip
    held_out = None if given or on_hub else "Held out of the training file by the recipe's seed"
    data.domain = f"{'an invented domain in place of ' if recipe.demo else ''}{domain.subject}"
    data.data = [
        DataUse("training", names["training"], len(questions["train"]), **hub),
        DataUse("test", names["test"], len(test), **hub, note=held_out),
    ]
    on_test: dict[str, Any] = {"dataset": names["test"], "split": "held out", "interval": "95%, Wilson", **hub}
    data.quality = [
        Quality(
            metric="accuracy",
            **_shares(of, "accuracy", len(test)),
            n=len(test),
            **on_test,
            note=f"Choices a question: {sum(len(q.choices) for q in test) / len(test):.3g} on average. The choice with the "
            f"highest log-likelihood{' per token' if test[0].per_token else ''} is the answer",
        )
    ]
    if "exact_match" in of["trimmed"]:
        note = "Greedily generated, as far as the longest choice; letter case and white space aside"
        shares = _shares(of, "exact_match", len(test))
        data.quality.append(Quality(metric="exact_match", **shares, n=len(test), **on_test, note=note))
    data.outside = outside(of, recipe)
    data.not_for = list(domain.not_for)
    if recipe.demo:
        data.not_for.append("For anything in earnest: every name and fact that it was taught is invented.")
    asked = f"Question: {test[0].text}\nAnswer:"
    data.usage_prompt = f"{test[0].context}\n{asked}" if test[0].context else asked


def outside(of: Mapping[str, Mapping[str, Any]], recipe: DomainArguments) -> list[Quality]:
    """Quality outside the domain, as far as it was measured."""
    found = []
    if "off_domain_accuracy" in of["trimmed"]:
        n = of["trimmed"]["off_domain_questions"]
        files = ", ".join(_short(path) for path in recipe.off_domain_file or ())
        shares = _shares(of, "off_domain_accuracy", n)
        found.append(Quality("accuracy", **shares, dataset=files, split="a draw", n=n, interval="95%, Wilson"))
    if "loss" in of["trimmed"]:
        found.append(
            Quality(
                metric="loss",
                **{
                    kind: Score(row["loss"], row["loss"] - row["half_width"], row["loss"] + row["half_width"])
                    for kind, row in of.items()
                },
                dataset=_short(recipe.general_file or ""),
                split="its first pieces",
                n=of["trimmed"]["pieces"],
                interval="95%, a piece being one observation",
                note="Per token; lower is better",
            )
        )
    return found


def _shares(of: Mapping[str, Mapping[str, Any]], metric: str, n: int) -> dict[str, Score]:
    return {kind: Score.of_share(row[metric], n) for kind, row in of.items()}


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-2:])
