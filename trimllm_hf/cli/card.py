"""`trimllm card`: writes the model card of a trimmed model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Json, answer, app


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a trimmed model.")],
    base: Annotated[str | None, typer.Option(help="Its base, if its map does not name it or it has moved.")] = None,
    domain: Annotated[str | None, typer.Option(help="What it was fine-tuned for: 'medical questions'.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    license: Annotated[str | None, typer.Option(help="Its licence; by default the base's.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="A language, like en; can be repeated.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the usage example asks.")] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure latency and run the example.")] = True,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code stored beside the weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write README.md, its pictures and trim_report.json; measure what has not been measured yet.

    Edits by hand are kept: only the sections between `<!-- trimllm_hf: … -->` markers are rewritten.

    **Example:** `trimllm card runs/medical --domain 'medical questions' --prompt 'What causes gout?'`
    """
    from ..publish.card import read_report, write_card
    from ..publish.card_data import TrimCardData
    from ..publish.figures import summary

    said = TrimCardData(domain=domain, model_name=name, license=license, language=language, usage_prompt=prompt)
    path = write_card(folder, said, base=base, measured=measure, trust_remote_code=trust_remote_code, progress=not as_json)
    report = read_report(folder)
    assert report is not None
    missing = [
        what
        for what, lacking in (
            ("a domain (--domain)", not report.domain),
            ("quality in the domain (TrimCardData.quality)", not report.quality),
            ("quality outside the domain (TrimCardData.outside)", not report.outside),
            ("latency", not report.latency or "not_measured" in report.latency),
            ("a usage example that ran", not report.usage or "not_run" in report.usage),
            ("the base's id on the Hub", not (report.base or {}).get("id")),
            ("a licence (--license)", not report.to_dict().get("license")),
            ("pictures (pip install 'trimllm_hf[plot]')", not report.pictures),
        )
        if lacking
    ]
    plain = {"card": str(path), "summary": summary(report), "missing": missing}
    answer(plain, as_json, lambda: [str(path), summary(report), *(f"  lacks {what}" for what in missing)])
