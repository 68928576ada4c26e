"""`measure_latency`: what a trimmed model buys, measured beside its base, and how close to the limit that is."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch.utils.benchmark.utils.timer import timer  # waits for the accelerator before it reads the clock
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from ..surgery.blocks import find_blocks
from ..utils import evaluating
from .environment import environment_of
from .report import LatencyReport, Run, Speedup, Spread, median_interval
from .sizes import byte_bound, sizes_of


def measure_latency(
    model: PreTrainedModel,
    base: PreTrainedModel | None = None,
    *,
    batch_sizes: Sequence[int] = (1,),
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeats: int = 10,
    warmup: int = 2,
    cache: str = "dynamic",
    compile: bool = False,
    progress: bool = False,
) -> LatencyReport:
    """Measure a model, or a model and its base in turn so that a machine's drift cancels.

    A model that generates is measured by `generate()`, greedy, on random tokens, prefill and decoding apart; any other
    by its forward pass. The models stay as they are, and so does global random state.

    Args:
        model: The (trimmed) model, on its device, unwrapped.
        base: Its base model, on the same device and of the same dtype. Latency depends on the weights' shapes alone:
            one made from the base's config will do.
        batch_sizes: Sequences at a time; one run for each.
        prompt_tokens: Length of the prompt (of the input, for a model that does not generate).
        new_tokens: Tokens to generate; at least 2, of which the first counts as prefill.
        repeats: Timed rounds; below 6 the interval of a speed-up cannot reach 95%.
        warmup: Rounds before them that are not timed.
        cache: "dynamic" or "static".
        compile: Let `generate()` compile the decoding step; needs cache="static" and an accelerator.
        progress: Whether to show a bar, a step a round.

    Raises:
        ValueError: On settings that cannot be measured, a model whose blocks are not those of its config (as when two
            models share one config object and one is trimmed), or a base on another device or of another dtype.
    """
    _check(model, base, batch_sizes, prompt_tokens, new_tokens, repeats, warmup, cache, compile)
    models = [model] if base is None else [base, model]
    generates = model.can_generate()
    all_runs: list[list[Run]] = [[] for _ in models]
    speedups: list[Speedup] = []
    sizes = [sizes_of(each) for each in models]
    bound = None if base is None else byte_bound(*sizes)
    settings: dict[str, Any] = {"prompt_tokens": prompt_tokens, "repeats": repeats, "warmup": warmup}
    if generates:
        settings |= {"new_tokens": new_tokens, "cache": cache, "compile": compile}
    generation = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        decoder_start_token_id=0 if model.config.is_encoder_decoder else None,
        cache_implementation="static" if cache == "static" else None,
        disable_compile=not compile,
    )
    rounds = len(batch_sizes) * (warmup + repeats)
    with _ready(models), tqdm(total=rounds, desc="Measuring latency", disable=not progress) as bar:
        for batch_size in batch_sizes:
            tokens = _random_tokens(model, batch_size, prompt_tokens)
            once = [_once(each, tokens, generation if generates else None) for each in models]
            for _ in range(warmup):
                for run in once:
                    run()
                bar.update()
            peaks = [sizes[i].weight_bytes + _peak_growth(model.device, run) for i, run in enumerate(once)]
            times: list[list[dict[str, float]]] = [[] for _ in models]
            for round_ in range(repeats):
                order = range(len(once)) if round_ % 2 == 0 else reversed(range(len(once)))
                for i in order:
                    times[i].append(once[i]())
                bar.update()
            for i, runs in enumerate(all_runs):
                runs.append(_summary(batch_size, times[i], peaks[i]))
            if base is not None:
                speedups += [
                    _speedup(what, batch_size, times[0], times[1], bound if what == "decode" else None)
                    for what in times[0][0]
                ]
    return LatencyReport(
        settings,
        environment_of(model),
        sizes[-1],
        tuple(all_runs[-1]),
        None if base is None else sizes[0],
        () if base is None else tuple(all_runs[0]),
        tuple(speedups),
    )


class _FirstToken(StoppingCriteria):
    """Never stops; notes when the first token is there."""

    def __init__(self) -> None:
        self.time: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.time is None:
            self.time = timer()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _once(
    model: PreTrainedModel, tokens: torch.Tensor, generation: GenerationConfig | None
) -> Callable[[], dict[str, float]]:
    """A function that runs the model once and gives its times in ms."""
    mask = torch.ones_like(tokens)

    def generate() -> dict[str, float]:
        run: Callable[..., Any] = model.generate  # type: ignore[assignment]  # nn.Module types it as a Tensor
        first = _FirstToken()
        start = timer()
        output = run(
            tokens,
            attention_mask=mask,
            generation_config=generation,
            stopping_criteria=StoppingCriteriaList([first]),
            synced_gpus=False,  # under ZeRO-3 it would wait for processes that do not measure
        )
        end = timer()
        # an encoder-decoder gives back what it has written, after the token that it starts with
        steps = output.shape[1] - (1 if model.config.is_encoder_decoder else tokens.shape[1]) - 1
        assert first.time is not None
        return {"prefill": (first.time - start) * 1e3, "decode": (end - first.time) * 1e3 / steps}

    def forward() -> dict[str, float]:
        start = timer()
        model(input_ids=tokens, attention_mask=mask)
        return {"forward": (timer() - start) * 1e3}

    return forward if generation is None else generate


def _random_tokens(model: PreTrainedModel, batch_size: int, length: int) -> torch.Tensor:
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    tokens = torch.randint(vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(0))
    return tokens.to(model.device)


@contextmanager
def _ready(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Evaluation mode, no gradients, and no generation settings of the models' own (they may stop early)."""
    own: list[Any] = [getattr(model, "generation_config", None) for model in models]
    for model in models:
        model.generation_config = GenerationConfig()
    try:
        with evaluating(models), torch.inference_mode():
            yield
    finally:
        for model, config in zip(models, own, strict=True):
            model.generation_config = config


def _peak_growth(device: torch.device, run: Callable[[], Any]) -> int:
    """Bytes that a run takes above what was held before it."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        run()
        torch.accelerator.synchronize()
        return int(torch.accelerator.max_memory_allocated() - before)
    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    process, done, peak = psutil.Process(os.getpid()), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak[0]


def _summary(batch_size: int, times: Sequence[dict[str, float]], peak: int) -> Run:
    def spread(what: str) -> Spread | None:
        return Spread.of([time[what] for time in times]) if what in times[0] else None

    decode = spread("decode")
    return Run(
        batch_size=batch_size,
        prefill_ms=spread("prefill"),
        decode_ms_per_token=decode,
        decode_tokens_per_s=None if decode is None else batch_size * 1e3 / decode.p50,
        forward_ms=spread("forward"),
        peak_memory_bytes=peak,
    )


def _speedup(
    what: str,
    batch_size: int,
    of_base: Sequence[dict[str, float]],
    of_model: Sequence[dict[str, float]],
    bound: float | None,
) -> Speedup:
    ratios = [base[what] / model[what] for base, model in zip(of_base, of_model, strict=True)]
    ratio = median(ratios)
    low, high, coverage = median_interval(ratios)
    return Speedup(what, batch_size, ratio, low, high, coverage, bound, None if bound is None else ratio / bound)


def _check(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    batch_sizes: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    warmup: int,
    cache: str,
    compile: bool,
) -> None:
    for each in (model, base):
        if each is not None:
            find_blocks(each)  # refuses a model that has other blocks than its config says: it would run only some
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"Expected batch_sizes of at least 1, at least one of them, got {list(batch_sizes)}.")
    for name, value, least in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("repeats", repeats, 1),
        ("warmup", warmup, 0),
    ):
        if value < least:
            raise ValueError(f"Expected {name} of at least {least}, got {value}.")
    if cache not in ("dynamic", "static"):
        raise ValueError(f"Expected cache 'dynamic' or 'static', got {cache!r}.")
    if compile and (cache != "static" or model.device.type == "cpu"):
        raise ValueError(
            f"Expected compile=True with cache='static' on an accelerator (generate() compiles nowhere else), got "
            f"cache={cache!r} on {model.device.type}. Set compile=False."
        )
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = prompt_tokens + (new_tokens if model.can_generate() else 0)
    if longest is not None and length > longest:
        raise ValueError(
            f"Expected at most the {longest} positions that the model has, got {length} tokens. Lower prompt_tokens "
            "or new_tokens."
        )
    if base is None:
        return
    for what, of_base, of_model in (
        ("device", base.device, model.device),
        ("dtype", base.dtype, model.dtype),
        ("kind", base.can_generate(), model.can_generate()),
    ):
        if of_base != of_model:
            raise ValueError(f"Expected base and model of the same {what}, got {of_base} and {of_model}.")
