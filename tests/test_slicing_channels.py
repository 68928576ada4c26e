"""MLP channels: what stays is the model without the others, refitted; where all widths are equal, it is a stock model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from sliced import calibration, model_to_slice
from tiny import tiny_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from trimllm_hf import SliceMap, slice_model, write_remote_code
from trimllm_hf.slicing.channel_shapes import find_channels, keep
from trimllm_hf.slicing.channels import choose
from trimllm_hf.slicing.principal import Covariance


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(tokens()).logits
    return found


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2", "gpt_neox"])
def test_uniform_widths_are_a_stock_model(name: str, tmp_path: Path) -> None:
    model = model_to_slice(name)
    before = logits(model)
    kind = type(model)
    found = slice_model(model, calibration(), 0.25, "uniform", what="mlp", progress=False)
    assert type(model) is kind and not hasattr(model.config, "slicing")
    width = {"gpt2": 128, "gpt_neox": 64}.get(name, 64)
    assert (found.width, set(found.widths), found.what) == (width, {width * 3 // 4}, "mlp")
    assert (logits(model) - before).abs().max() > 0
    model.save_pretrained(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_widths_by_redundancy_have_a_class_of_their_own(tmp_path: Path) -> None:
    model = model_to_slice()
    found = slice_model(model, calibration(), 0.25, spread=1.0, what="mlp", progress=False)
    assert len(set(found.widths)) > 2 and abs(found.mean_share - 0.25) < 0.005
    assert [block.mlp.down_proj.in_features for block in model.model.layers] == list(found.widths)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert SliceMap.from_config(loaded.config) == found
    plain = json.loads((tmp_path / "config.json").read_text())["slicing"]
    assert plain["per_layer_config"]["1"] == {"intermediate_size": found.widths[1]}
    named = LlamaForCausalLM.from_pretrained(tmp_path).eval()  # gets what the folder holds
    assert torch.equal(logits(named), logits(model))
    write_remote_code(tmp_path)
    compile((tmp_path / "modeling_trimllm.py").read_text(), "modeling_trimllm.py", "exec")


def test_an_unused_channel_costs_nothing() -> None:
    """Channels that are always zero go first, and what is left is the model."""
    model = model_to_slice()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[::4] = 0
    before = logits(model)
    slice_model(model, calibration(), 0.25, "uniform", what="mlp", progress=False)
    # but for the ridge, which pulls towards zero
    assert (logits(model) - before).abs().max() < 0.05 * before.abs().max()


def test_what_is_refitted_is_the_least_squares_fit() -> None:
    model = model_to_slice()
    channels = find_channels(model)[0]
    module = model.get_submodule(channels.block)
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(500, 8, generator=generator, dtype=torch.float64) @ torch.randn(8, 64, generator=generator).double()
    values = mixed + 0.05 * torch.randn(500, 64, generator=generator)
    covariance = Covariance(64)
    covariance.add(values[None])
    kept, weight = choose(module, channels, covariance, values.abs().sum(0), 48)
    stock = module.mlp.down_proj.weight.detach().double()
    want, plain = values @ stock.T, values[:, kept] @ stock[:, kept].T
    got = values[:, kept] @ weight.T

    def cost(fit: torch.Tensor) -> float:
        ridge = 0.01 * covariance.sum[kept][:, kept].diagonal().mean()
        return ((want - values[:, kept] @ fit.T).pow(2).sum() + ridge * fit.pow(2).sum()).item()

    assert (want - got).pow(2).sum() < 0.5 * (want - plain).pow(2).sum()
    nudges = [1e-3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64) for _ in range(20)]
    assert all(cost(weight) < cost(weight + nudge) for nudge in nudges)


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2"])
def test_the_order_of_channels_does_not_matter(name: str) -> None:
    model = model_to_slice(name)
    before = logits(model)
    for channels in find_channels(model):
        order = torch.randperm(channels.width, generator=torch.Generator().manual_seed(1))
        keep(model.get_submodule(channels.block), channels, order)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)


def test_it_reaches_architectures_whose_hidden_states_cannot_be_sliced() -> None:
    model = tiny_model("gemma2")
    found = slice_model(model, calibration(), 0.25, "uniform", what="mlp", progress=False)
    assert model.config.intermediate_size == found.widths[0] == 48


def test_what_cannot_be_cut_is_refused_with_nothing_changed() -> None:
    model = tiny_model("mixtral")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Its channels cannot be cut\. Nothing was changed"):
        slice_model(model, calibration(), what="mlp", progress=False)
    mixing = model_to_slice()
    mixing.model.layers[1].mlp.act_fn = nn.Softmax(dim=-1)  # does not mix by order: softmax is even-handed
    mixing.model.layers[2].mlp.act_fn = Rolled()
    untouched = copy.deepcopy(mixing.state_dict())
    with pytest.raises(ValueError, match=r"channels of model\.layers\.2 to be independent"):
        slice_model(mixing, calibration(), what="mlp", progress=False)
    for found, kept in ((model, before), (mixing, untouched)):
        assert all(torch.equal(found.state_dict()[key], value) for key, value in kept.items())
    with pytest.raises(ValueError, match="what to be one of"):
        slice_model(model_to_slice(), calibration(), what="heads", progress=False)


def test_blocks_that_take_several_hidden_states_per_token_are_refused() -> None:
    model = model_to_slice()
    model.model.layers[0].register_forward_pre_hook(lambda _, args: (args[0][None], *args[1:]))
    with pytest.raises(ValueError, match=r"\(rows, tokens, width\), got \(1, 4, 16, 32\) for \(4, 16\) tokens"):
        slice_model(model, calibration(), what="mlp", progress=False)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("allocation", ["uniform", "redundancy"])
def test_a_ratio_that_leaves_less_than_eight_channels_is_refused(allocation: str, multiple: int) -> None:
    model = model_to_slice()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="at least 8 wide"):
        slice_model(model, calibration(), 0.95, allocation, what="mlp", multiple=multiple, progress=False)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


class Rolled(nn.Module):
    """A channel that depends on its neighbour."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.sigmoid() * values.roll(1, -1)
