"""Exact match of written answers. `evaluate` copies and runs this file: one import per line, none of ours."""

import math

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    """Share of the answers that are the reference, letter case and white space aside."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of the written answers that are the reference, letter case and white space aside.",
            citation="",
            inputs_description="predictions: what was written, a text each. references: what is right, a text each.",
            features=datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        if not references:
            raise ValueError("Expected at least one answer, got none.")
        pairs = zip(predictions, references, strict=True)
        same = sum(written.casefold().split() == right.casefold().split() for written, right in pairs)
        share = same / len(references)
        return {"exact_match": share, "standard_error": math.sqrt(share * (1 - share) / len(references))}
