"""A Space: a trimmed model beside its base, the same prompt for both. TRIMMED_MODEL names it, BASE_MODEL its base.

It needs no trimllm_hf: a block-trimmed model loads in stock transformers.
"""

import os
import time
from typing import Any

import gradio as gr
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def names() -> tuple[str, str]:
    """The trimmed model and its base."""
    if not (trimmed := os.environ.get("TRIMMED_MODEL")):
        raise SystemExit("Expected the environment variable TRIMMED_MODEL, the id of a trimmed model on the Hub, got none.")
    layer_map = getattr(AutoConfig.from_pretrained(trimmed), "trim", None) or {}
    base = os.environ.get("BASE_MODEL") or layer_map.get("base_model")
    if not base:
        raise SystemExit(f"Expected the base in the kept-layer map of {trimmed}, got none. Set BASE_MODEL.")
    return trimmed, base


def load(name: str) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device).eval()


def answer(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> tuple[str, float]:
    """What a model writes, greedily, and the tokens that it generates in a second."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    start = time.perf_counter()
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=int(new_tokens), do_sample=False)
    made = written[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True), len(made) / (time.perf_counter() - start)


def main() -> gr.Blocks:
    """The page."""
    trimmed, base = names()
    tokenizer = AutoTokenizer.from_pretrained(trimmed)
    models = {name: load(name) for name in (base, trimmed)}
    for name in (trimmed, base):  # the first pass of a process is slow: not the prompt's fault
        answer(models[name], tokenizer, "a", 2)

    def compare(prompt: str, new_tokens: float) -> list[str]:
        if not prompt.strip():
            raise gr.Error("Write a prompt first.")
        shown = []
        for model in models.values():  # base, trimmed
            text, rate = answer(model, tokenizer, prompt, int(new_tokens))
            layers = model.config.get_text_config().num_hidden_layers
            shown += [text, f"{layers} layers, {model.num_parameters():,} parameters, {rate:.1f} tokens/s"]
        return shown

    with gr.Blocks(title="Trimmed beside its base") as page:
        gr.Markdown(f"# {trimmed}\nbeside its base, {base}")
        prompt = gr.Textbox(label="Prompt", lines=3)
        new_tokens = gr.Slider(1, 256, value=48, step=1, label="New tokens")
        button = gr.Button("Compare", variant="primary")
        with gr.Row():
            outputs: list[Any] = []
            for name in models:
                with gr.Column():
                    outputs += [gr.Textbox(label=name, lines=8), gr.Markdown()]
        button.click(compare, [prompt, new_tokens], outputs, api_name="compare")
    return page


if __name__ == "__main__":
    main().launch()
