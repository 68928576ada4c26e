"""The model card of a recipe's trimmed model, from the rows of the recipe's own table; shared by the recipes."""

from pathlib import Path
from typing import Any

from trimllm_hf import TrimCardData, TrimTrainer
from trimllm_hf.choice_accuracy import Question
from trimllm_hf.publish.card_data import DataUse, Quality, Score


def write_card(trainer: TrimTrainer, rows: list[dict[str, Any]], recipe: Any, questions: dict[str, list[Question]]) -> None:
    """Fill in what the Trainer does not know, then measure and write the card (and push both, with `--push_to_hub`).

    Args:
        trainer: The Trainer, after training, its model saved.
        rows: Of the base, of the model fine-tuned at full depth (if there is one), and of the trimmed model; none on other
            processes than the main one.
        recipe: The recipe's settings.
        questions: The questions of both splits.
    """
    if rows:
        _fill(trainer.card_data, rows, recipe, questions)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()


def _fill(data: TrimCardData, rows: list[dict[str, Any]], recipe: Any, questions: dict[str, list[Question]]) -> None:
    hub = {} if recipe.train_file else {"dataset_id": recipe.dataset_name, "revision": recipe.dataset_revision}
    files = {"training": recipe.train_file, "test": recipe.validation_file or recipe.train_file}
    names = {use: "/".join(Path(file).parts[-2:]) if file else recipe.dataset_name for use, file in files.items()}
    held_out = "" if recipe.validation_file or hub else "A fifth of the training file, held out by the recipe's seed"
    test = questions["validation"]
    data.domain = recipe.domain
    data.data = [
        DataUse("training", names["training"], len(questions["train"]), **hub, note="The calibration examples are of them"),
        DataUse("test", names["test"], len(test), **hub, note=held_out or None),
    ]
    of = {"base": rows[0], "trimmed": rows[-1]} | ({"full": rows[1]} if len(rows) == 3 else {})
    data.quality = [
        Quality(
            metric="accuracy",
            **{kind: Score.of_share(row["accuracy"], row["questions"]) for kind, row in of.items()},
            dataset=names["test"],
            split="held out",
            n=len(test),
            interval="95%, Wilson",
            **hub,
            note=f"Choices a question: {sum(len(q.choices) for q in test) / len(test):.3g} on average. The choice with the "
            f"highest log-likelihood{' per token' if test[0].per_token else ''} is the answer",
        )
    ]
    if recipe.general_file:
        bounds = {kind: (row["loss"], row["half_width"]) for kind, row in of.items()}
        data.outside = [
            Quality(
                metric="loss",
                **{kind: Score(loss, loss - half, loss + half) for kind, (loss, half) in bounds.items()},
                dataset="/".join(Path(recipe.general_file).parts[-2:]),
                split="its first pieces",
                n=rows[0]["pieces"],
                interval="95%, a piece being one observation",
                note="Per token; lower is better",
            )
        ]
    data.not_for = ["As a source of advice: no answer of it was checked by anybody who knows the subject."]
    if recipe.demo:
        data.not_for.append("For anything in earnest: its drugs, classes and facts are invented.")
    data.usage_prompt = f"Question: {test[0].text}\nAnswer:"
