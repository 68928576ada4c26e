"""Multiple-choice accuracy by log-likelihood. `evaluate` copies and runs this file: one import per line, none of ours."""

import math

import datasets
import evaluate

_DESCRIPTION = """
Accuracy on multiple-choice questions of a language model that is not asked to write a letter: the choice to which it
gives the highest log-likelihood is its answer. The protocol of TrimLLM (arXiv 2412.11242) and of the usual harnesses.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: For each question the log-likelihoods of its choices (summed over the choice's tokens, natural log).
    references: For each question the index of the right choice.
    lengths: For each question the lengths of its choices, in tokens or characters. If given, log-likelihoods are divided
        by them, so that long answers are not at a disadvantage.

Returns:
    accuracy: Share of the questions whose right choice has the highest log-likelihood (of equal ones the first counts).
    standard_error: Binomial standard error of the accuracy.
    questions: Number of questions.

Examples:
    >>> metric = evaluate.load(trimllm_hf.choice_accuracy.FOLDER)
    >>> metric.compute(predictions=[[-1.0, -2.0], [-3.0, -0.5]], references=[0, 0])
    {'accuracy': 0.5, 'standard_error': 0.3535533905932738, 'questions': 2}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ChoiceAccuracy(evaluate.Metric):
    """Share of the questions whose right choice has the highest log-likelihood."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[int], lengths: list[list[int]] | None = None
    ) -> dict[str, float]:
        if not references:
            raise ValueError("Expected at least one question, got none.")
        if lengths is None:
            lengths = [[1] * len(scores) for scores in predictions]
        if len(lengths) != len(predictions):
            raise ValueError(f"Expected lengths for {len(predictions)} questions, got them for {len(lengths)}.")
        right = 0
        for number, (scores, reference, sizes) in enumerate(zip(predictions, references, lengths, strict=True)):
            if len(scores) < 2 or len(scores) != len(sizes) or min(sizes) <= 0 or not 0 <= reference < len(scores):
                raise ValueError(
                    "Expected at least two choices a question, a length above 0 for each, and a reference that is the "
                    f"index of one of them, got log-likelihoods {scores}, lengths {list(sizes)} and reference "
                    f"{reference} for question {number}."
                )
            if any(math.isnan(score) for score in scores):
                raise ValueError(
                    f"Expected numbers as log-likelihoods, got {scores} for question {number}. A model that gives NaN "
                    "has no answer: look at its training loss."
                )
            values = [score / size for score, size in zip(scores, sizes, strict=True)]
            right += values.index(max(values)) == reference
        accuracy = right / len(references)
        return {
            "accuracy": accuracy,
            "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(references)),
            "questions": len(references),
        }
