"""Slicing: rotated, a model stays what it is; cut, it is the model whose hidden states are projected; and it loads."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sliced import ARCHITECTURES, calibration, model_to_slice
from tiny import tiny_model, tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from trimllm_hf import LayerMap, SliceMap, drop_layers, load_kept_layers, slice_model, write_remote_code
from trimllm_hf.slicing import signals, verify
from trimllm_hf.slicing.allocation import LARGEST_SHARE, allocate, redundancy_of, shares_of
from trimllm_hf.slicing.modules import shape_model
from trimllm_hf.slicing.principal import Covariance, random_basis
from trimllm_hf.slicing.rotation import read_gain
from trimllm_hf.slicing.signals import observe
from trimllm_hf.slicing.slice_model import PlannedSlice, apply, plan, read_gains
from trimllm_hf.slicing.wiring import find_wiring

WIDTH = 32


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    found: torch.Tensor = model(tokens() if ids is None else ids).logits
    return found


def planned(model: PreTrainedModel, ratio: float = 0.25, **settings: Any) -> PlannedSlice:
    found = {"allocation": "redundancy", "spread": 1.0, "mean": "layers", "multiple": 1, **settings}
    return plan(model, calibration(), ratio, **found)


def at_full_width(model: PreTrainedModel, seed: int) -> PlannedSlice:
    """A plan that rotates each layer into a random basis and cuts nothing."""
    wiring = find_wiring(type(model), model.config)
    bases = tuple(random_basis(WIDTH, seed + i).float() for i in range(7))
    return PlannedSlice(model, wiring, read_gains(model, wiring), bases, SliceMap(WIDTH, (WIDTH,) * 6))


# ---- the function


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rotated_and_uncut_the_logits_are_the_models(name: str) -> None:
    model = model_to_slice(name)
    before = logits(model)
    apply(at_full_width(model, seed=5))
    assert (logits(model) - before).abs().max() < 1e-4
    assert all(
        "norm" not in key and "ln_" not in key for key in model.state_dict() if "q_norm" not in key and "k_norm" not in key
    )


@torch.no_grad()
def projected_llama(model: LlamaForCausalLM, found: PlannedSlice, ids: torch.Tensor) -> torch.Tensor:
    """The reference: the stock model at full width, whose hidden states are projected where the sliced one is narrower."""
    cuts = [(basis.double() @ basis.double().T).float() for basis in found.bases]
    inner = model.model
    hidden = inner.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    for number, block in enumerate(inner.layers):
        hidden = hidden @ cuts[number]
        rotary = inner.rotary_emb(hidden, positions)
        attended = block.self_attn(block.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)[0]
        hidden = hidden + attended @ cuts[number]
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return model.lm_head(inner.norm(hidden @ cuts[-1]))


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_cut_it_is_the_model_whose_hidden_states_are_projected(name: str) -> None:
    model = model_to_slice(name)
    found = planned(model)
    want = projected_llama(model, found, tokens())
    before = logits(model)
    apply(found)
    assert len(set(found.slice_map.widths)) > 3
    torch.testing.assert_close(logits(model), want, atol=2e-5, rtol=1e-4)
    assert (want - before).abs().max() > 0.05  # the cut is one that shows


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox"])
def test_a_cut_takes_the_first_rows_and_columns_of_the_rotated_model(name: str) -> None:
    """And at 0% the model that a config of such widths builds is, with those weights, the rotated one bit for bit."""
    rotated, cut, built = model_to_slice(name), model_to_slice(name), model_to_slice(name)
    full = at_full_width(rotated, seed=1)
    shape_model(built, full.wiring, full.slice_map.widths)
    widths = (24, 20, 16, 28, 12, 9)
    bases = tuple(basis[:, :width] for basis, width in zip(full.bases, (*widths, 24), strict=True))
    apply(full)
    apply(replace(at_full_width(cut, seed=1), bases=bases, slice_map=SliceMap(WIDTH, widths)))
    whole = rotated.state_dict()
    for key, tensor in cut.state_dict().items():
        first = whole[key][tuple(slice(size) for size in tensor.shape)]
        torch.testing.assert_close(tensor, first, atol=1e-7, rtol=1e-6)
    assert built.load_state_dict(whole) and torch.equal(logits(built), logits(rotated))


@pytest.mark.parametrize("name", ["llama", "gpt2", "one norm for both"])
def test_more_kept_is_closer_to_the_model(name: str) -> None:
    ids = calibration()[1]["input_ids"]
    model = model_to_slice(name)
    before = logits(model, ids)
    far = []
    for ratio in (0.5, 0.25, 0.04):
        sliced = copy.deepcopy(model)
        slice_model(sliced, calibration(), ratio, multiple=1, progress=False)
        far.append((logits(sliced, ids) - before).pow(2).mean().item())
    assert far[0] > far[1] > far[2] > 0


def test_padding_does_not_count() -> None:
    batches = calibration()
    other = copy.deepcopy(batches)
    for batch in other:
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    one, two = model_to_slice(), model_to_slice()
    maps = [slice_model(m, b, multiple=1, spread=1.0, progress=False) for m, b in ((one, batches), (two, other))]
    assert maps[0] == maps[1]
    assert maps[0].tokens == 3 * 64 - 8 - 4
    torch.testing.assert_close(logits(one), logits(two), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"), [("opt", {"dropout": 0.5}), ("gpt2", {"resid_pdrop": 0.5}), ("phi3", {"resid_pdrop": 0.5})]
)
def test_dropout_behind_what_is_held_back_still_drops(name: str, changes: dict[str, float]) -> None:
    model = model_to_slice(name, **changes)
    slice_model(model, calibration(), progress=False)
    block = next(module for module in model.modules() if hasattr(module, "held_back"))
    hidden = torch.randn(1, 50, block.shortcut.in_features)
    rotary = {"position_embeddings": (torch.ones(1, 50, 8), torch.zeros(1, 50, 8))} if name == "phi3" else {}
    with torch.no_grad():
        block.shortcut.weight.zero_()  # what comes out is what was held back
        zeros = [(block.train(mode)(hidden, **rotary) == 0).float().mean().item() for mode in (True, False)]
    assert zeros[0] == pytest.approx(0.5, abs=0.1)
    assert zeros[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_is_verified_in_32_and_sliced(dtype: torch.dtype) -> None:
    model, whole = model_to_slice().to(dtype), model_to_slice()
    found = slice_model(model, calibration(), progress=False)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    slice_model(whole, calibration(), progress=False)
    assert found.mean_share == pytest.approx(0.25, abs=0.005)
    assert (logits(model).float() - logits(whole)).abs().mean() < 0.1 * logits(whole).abs().mean()


def test_a_slicing_leaves_gradients_and_modes_alone() -> None:
    model = model_to_slice().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    slice_model(model, calibration(), progress=False)
    assert model.training and model.model.layers[0].mlp.training
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad and model.model.layers[1].shortcut.weight.requires_grad
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ---- the bases and the widths


def test_no_other_rotation_keeps_more_of_the_signal() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, 64, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    found = Covariance(WIDTH)
    found.add(states)
    flat = states.flatten(0, 1).double()

    def lost(basis: torch.Tensor) -> float:
        return (flat - flat @ basis @ basis.T).pow(2).sum().item()

    for kept in (4, 16, 28):
        best = lost(found.basis(kept))
        assert all(best < lost(random_basis(WIDTH, seed)[:, :kept]) for seed in range(50))
        turned = found.basis(WIDTH)  # nor does the next-best set of its own directions
        assert best < lost(turned[:, [*range(kept - 1), kept]])
        eigenvalues = torch.linalg.eigvalsh(flat.T @ flat)
        assert math.isclose(best, eigenvalues[: WIDTH - kept].sum().item(), rel_tol=1e-6)  # Eckart and Young


def test_the_directions_are_those_of_the_sliced_signal() -> None:
    """The second block's basis is found on what the first, already cut, hands on."""
    model = model_to_slice()
    found = planned(model, ratio=0.5, allocation="uniform")
    inner = model.model
    ids = torch.cat([batch["input_ids"] for batch in calibration()])
    mask = torch.cat([batch["attention_mask"] for batch in calibration()])
    want = Covariance(WIDTH)
    with torch.no_grad():
        for batch in calibration():
            states: list[torch.Tensor] = []
            cut = (found.bases[0] @ found.bases[0].T).float()
            handles = [
                inner.layers[0].register_forward_pre_hook(lambda _, args, cut=cut: (args[0] @ cut,)),
                inner.layers[0].post_attention_layernorm.register_forward_pre_hook(
                    lambda _, args, cut=cut: (args[0] @ cut,)
                ),
                inner.layers[0].register_forward_pre_hook(lambda _, args, seen=states: seen.append(args[0])),
                inner.layers[0].mlp.register_forward_hook(lambda _, __, output, seen=states: seen.append(output)),
                inner.layers[0].self_attn.register_forward_hook(lambda _, __, output, seen=states: seen.append(output[0])),
                inner.layers[1].post_attention_layernorm.register_forward_pre_hook(
                    lambda _, args, seen=states: seen.append(args[0])
                ),
            ]
            second: list[torch.Tensor] = []
            handles.append(
                inner.layers[1].register_forward_pre_hook(
                    lambda _, args, seen=states, second=second, cut=cut: (
                        second.append(seen[0] + seen[1] @ cut + seen[2]) or (second[0],)
                    )
                )
            )
            model(**batch)
            for handle in handles:
                handle.remove()
            for signal in (second[0], states[3]):
                want.add(signal, batch["attention_mask"])
    assert ids.shape == mask.shape
    kept = found.slice_map.widths[1]
    overlap = torch.linalg.svdvals(want.basis(kept).T @ found.bases[1].double())
    assert overlap.min() > 0.999


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_of_many_batches_some_are_enough_for_the_influence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_to_slice(name), calibration(batches=5)
    whole, _ = observe(model, batches, lambda _: None)
    _, some = observe(model, batches[::3], lambda _: None)
    monkeypatch.setattr(signals, "INFLUENCE_TOKENS", 100)  # a third of the tokens
    calls, influence = observe(model, batches, lambda _: None)
    assert influence == some
    for call, full in zip(calls, whole, strict=True):  # the blocks that computed nothing were called with the same
        assert torch.equal(call.states, full.states)
        assert len(call.arguments) == len(full.arguments) == 6
        for (args, kwargs), (full_args, full_kwargs) in zip(call.arguments, full.arguments, strict=True):
            assert len(args) == len(full_args) and kwargs.keys() == full_kwargs.keys()
            mask, full_mask = kwargs.get("attention_mask"), full_kwargs.get("attention_mask")
            assert (mask is None) == (full_mask is None) and (mask is None or torch.equal(mask, full_mask))


def test_little_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two random rotations while a model is verified; of the hidden states two bytes a number."""
    held: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = []

    def counted(width: int, seed: int) -> torch.Tensor:
        most.append(len(held))
        made = random_basis(width, seed)
        held.add(made)
        return made

    monkeypatch.setattr(verify, "random_basis", counted)
    model = model_to_slice()
    wiring = find_wiring(type(model), model.config)
    verify.refuse_unequal(model, wiring, read_gains(model, wiring), tokens())
    assert len(most) == 7 and max(most) <= 2
    calls, _ = observe(model, calibration(), lambda _: None)
    assert all(call._states.element_size() == 2 and call.states.dtype == torch.float32 for call in calls)


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.55, 0.7])
def test_the_mean_cut_is_what_was_asked_for(spread: float, ratio: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for influence in (torch.rand(30, generator=generator).tolist(), [0.9, *[0.05] * 28, 0.5], [0.2] * 30):
        for width, multiple in ((576, 8), (4096, 64), (2049, 8)):
            redundancy = redundancy_of(influence)
            widths = allocate(redundancy, width, ratio, spread, multiple)
            cut = 1 - sum(widths) / (30 * width)
            assert abs(cut - ratio) < 0.005
            shares = shares_of(redundancy, ratio, spread)
            assert math.isclose(sum(shares) / 30, ratio, abs_tol=1e-9)
            assert all(-1e-12 <= share <= max(LARGEST_SHARE, ratio) + 1e-9 for share in shares)
            order = sorted(range(30), key=lambda layer: redundancy[layer])
            assert all(widths[a] >= widths[b] - multiple for a, b in pairwise(order))
            if spread == 0.0:
                assert max(widths) - min(widths) <= multiple


def test_shares_are_the_papers() -> None:
    """Three layers worked out by hand: redundancy 0, 1/2, 1; mean 0.2, base 0.1."""
    assert redundancy_of([0.3, 0.2, 0.1]) == pytest.approx([0, 0.5, 1])
    assert shares_of([0, 0.5, 1], 0.2, 0.5) == pytest.approx([0.1, 0.2, 0.3])
    assert shares_of([0, 0.5, 1], 0.4, 1.0) == pytest.approx([0.0 + 0.2 * 0.6 / 0.8, 0.45, 0.6])  # 0.2 clipped and shared


@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_the_mean_can_be_that_of_the_blocks_parameters(ratio: float) -> None:
    model = model_to_slice("llama", hidden_size=64, intermediate_size=256)

    def in_blocks(found: PreTrainedModel) -> int:
        return sum(p.numel() for p in found.model.layers.parameters())

    before = in_blocks(model)
    found = slice_model(model, calibration(), ratio, mean="parameters", multiple=1, progress=False)
    assert found.mean == "parameters"
    assert abs(1 - in_blocks(model) / before - ratio) < 0.02
    assert found.mean_share > ratio  # the shortcuts cost


# ---- saved and loaded


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox", "tied"])
def test_it_loads_and_generates(name: str, tmp_path: Path) -> None:
    model = model_to_slice(name)
    found = slice_model(model, calibration(), spread=1.0, multiple=1, progress=False)
    want = logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), want)
    assert SliceMap.from_config(loaded.config) == found
    assert type(loaded).__name__ == type(model).__name__
    cached = loaded.generate(tokens(), max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, loaded.generate(tokens(), max_new_tokens=8, do_sample=False, use_cache=False))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert json.loads((again / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(pickle.loads(pickle.dumps(loaded))), want)
    assert torch.equal(logits(copy.deepcopy(loaded)), want)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = model_to_slice()
    slice_model(model, calibration(), spread=1.0, multiple=1, progress=False)
    path = tmp_path_factory.mktemp("sliced")
    model.save_pretrained(path)
    torch.save(logits(model), path / "logits.pt")
    return path


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_it_loads_in_a_new_process(folder: Path) -> None:
    code = (
        "import trimllm_hf, torch; from transformers import AutoModelForCausalLM as A; "
        f"m = A.from_pretrained({str(folder)!r}).eval(); want = torch.load({str(folder / 'logits.pt')!r}); "
        f"assert torch.equal(m(torch.tensor({tokens().tolist()})).logits, want)"
    )
    found = run_python(code)
    assert found.returncode == 0, found.stderr


def test_stock_transformers_refuses_it(folder: Path) -> None:
    code = f"""
import sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM
for kind in (AutoModelForCausalLM, LlamaForCausalLM):
    try:
        kind.from_pretrained({str(folder)!r})
    except Exception as error:
        print(str(error).replace(chr(10), " "))
assert "trimllm_hf" not in sys.modules
"""
    found = run_python(code)
    assert found.returncode == 0, found.stderr
    of_auto, of_class = found.stdout.strip().splitlines()
    assert "trimllm_sliced" in of_auto and "does not recognize this architecture" in of_auto
    assert "run `import trimllm_hf`" in of_class


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_loads_by_the_code_beside_it(name: str, tmp_path: Path) -> None:
    model = model_to_slice(name)
    slice_model(model, calibration(), spread=1.0, multiple=1, progress=False)
    model.save_pretrained(tmp_path)
    write_remote_code(tmp_path)
    ids = tokens().tolist()
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
model.save_pretrained({str(tmp_path / "again")!r})
with torch.no_grad():
    ids = torch.tensor({ids})
    cached, plain = (model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, plain)
    torch.save(model(ids).logits, {str(tmp_path / "seen.pt")!r})
assert "trimllm_hf" not in sys.modules
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 0, found.stderr
    assert torch.equal(torch.load(tmp_path / "seen.pt"), logits(model))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()  # by the package
    assert torch.equal(logits(again), logits(model))


def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for key in ("model.layers.2.shortcut.weight", "lm_head.weight"):
        state = load_file(folder / "model.safetensors")
        del state[key]
        for file in folder.glob("*.json"):
            (tmp_path / file.name).write_text(file.read_text())
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"exactly the widths in config\.slicing, got 1 missing_keys"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


# ---- with trimming


def test_a_trimmed_model_can_be_sliced_and_keeps_its_map(tmp_path: Path) -> None:
    model = model_to_slice()
    drop_layers(model, [1, 3])
    reference = copy.deepcopy(model)
    found = planned(model)
    want = projected_llama(reference, found, tokens())
    apply(found)
    torch.testing.assert_close(logits(model), want, atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert LayerMap.from_config(loaded.config).kept_layers == (0, 2, 4, 5)
    assert SliceMap.from_config(loaded.config).num_layers == 4


def test_a_sliced_model_is_not_trimmed(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = copy.deepcopy(model.state_dict())
    for unit in ("block", "sublayer"):
        with pytest.raises(ValueError, match=r"not sliced, got one whose layers have .* widths.*then slice what is left"):
            drop_layers(model, [3], unit=unit)
    unchanged(model, before)
    with pytest.raises(ValueError, match="then slice what is left"):
        load_kept_layers(folder, [0, 1])


# ---- what is refused


def test_norms_that_are_neither_kind_are_refused() -> None:
    class Cube(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x.pow(3)

    with pytest.raises(ValueError, match="RMSNorm or a LayerNorm, got Cube"):
        read_gain(Cube(), 8, 1e-6)
    gain = read_gain(nn.LayerNorm(9), 9, 1e-5)
    assert gain.centred and gain.shift is not None
    assert not read_gain(nn.RMSNorm(9, eps=1e-5), 9, 1e-5).centred


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"ratio": 0.0}, "ratio between 0 and 1"),
        ({"ratio": 1.0}, "ratio between 0 and 1"),
        ({"ratio": -0.1}, "ratio between 0 and 1"),
        ({"ratio": float("nan")}, "ratio between 0 and 1"),
        ({"ratio": True}, "ratio between 0 and 1"),
        ({"ratio": 0.8}, "at least 8 wide"),
        ({"spread": 1.5}, "spread from 0"),
        ({"allocation": "random"}, "allocation to be one of"),
        ({"mean": "bytes"}, "mean to be one of"),
        ({"multiple": 0}, "multiple of at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(settings: dict[str, Any], error: str) -> None:
    model = model_to_slice()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=error):
        slice_model(model, calibration(), progress=False, **settings)
    unchanged(model, before)


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        ([], "at least 32 tokens.*got 0"),
        ([{"input_ids": tokens(2, 8)}], "at least 32 tokens.*got 16"),
        ([{"labels": tokens()}], "got none in batch 0"),
        ([*calibration(), {"input_ids": tokens(), "attention_mask": torch.zeros(2, 12)}], "only padding in batch 3"),
    ],
)
def test_batches_that_do_not_do_are_refused(batches: list[Any], error: str) -> None:
    model = model_to_slice()
    with pytest.raises(ValueError, match=error):
        slice_model(model, batches, progress=False)
    assert not hasattr(model.config, "slicing")


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "mixtral", "bert"])
def test_architectures_that_are_not_equal_are_refused(family: str) -> None:
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Nothing was changed"):
        slice_model(model, calibration(), progress=False)
    unchanged(model, before)


def test_what_reads_the_hidden_states_behind_the_wirings_back_is_caught_by_the_logits() -> None:
    model = model_to_slice()
    block = model.model.layers[2]
    stock = type(block.mlp).forward
    block.mlp.forward = lambda x: stock(block.mlp, x) + x.roll(1, -1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="stay the same when its hidden states are rotated, got a difference of"):
        slice_model(model, calibration(), progress=False)
    unchanged(model, before)


def test_a_head_that_may_not_be_untied_is_refused() -> None:
    tied, own = model_to_slice("tied"), model_to_slice()
    before = copy.deepcopy(tied.state_dict())
    with pytest.raises(ValueError, match="whose head is its embedding"):
        slice_model(tied, calibration(), untie=False, progress=False)
    unchanged(tied, before)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    slice_model(own, calibration(), untie=False, progress=False)
    slice_model(tied, calibration(), untie=False, what="mlp", progress=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_models_in_the_wrong_state_are_refused() -> None:
    def refused(model: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            slice_model(model, calibration(), progress=False)

    refused(nn.Sequential(model_to_slice()), "not wrapped, got Sequential")
    refused(model_to_slice().to("meta"), "on the meta device")
    lacking = model_to_slice()
    drop_layers(lacking, [3], unit="sublayer")
    refused(lacking, "that lacks some")
    sliced = model_to_slice()
    slice_model(sliced, calibration(), progress=False)
    refused(sliced, "not sliced, got")
    broken = model_to_slice()
    broken.model.embed_tokens.weight.data[5] = float("nan")
    refused(broken, "Nothing was changed")
    trained = model_to_slice()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    refused(trained, "not being trained")
    del optimizer
    adapted = get_peft_model(model_to_slice(), LoraConfig(target_modules=["q_proj"]))
    refused(adapted, "not wrapped, got PeftModel")
    refused(adapted.base_model.model, "without adapters")
    quantized = model_to_slice()
    quantized.is_quantized = True  # as transformers marks it
    refused(quantized, "a quantized LlamaForCausalLM")
    with_gradients = model_to_slice()
    with_gradients(input_ids=tokens(), labels=tokens()).loss.backward()
    refused(with_gradients, "not being trained")


def test_a_config_of_another_width_or_depth_is_refused(folder: Path, tmp_path: Path) -> None:
    plain = json.loads((folder / "config.json").read_text())
    for change, error in (
        ({"hidden_size": 64}, "hidden states of the config's size 64"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings to be false"),
        ({"base_model_type": "trimllm_sliced"}, "base_model_type"),
        ({"slicing": None}, "Expected a map of widths"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**plain, **change}))
        with pytest.raises(ValueError, match=error):
            AutoConfig.from_pretrained(tmp_path)
