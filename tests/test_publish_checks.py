"""What is found out about a folder before anything is sent: its files, its model, its card, its secrets."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_model

from trimllm_hf import LayerMap, drop_layers, push_to_hub
from trimllm_hf.publish.card_check import check_card
from trimllm_hf.publish.card_data import tag_name
from trimllm_hf.publish.contents import contents_of
from trimllm_hf.publish.credentials import secrets_of_environment
from trimllm_hf.publish.hub import _nothing_sent
from trimllm_hf.publish.model_check import check_model
from trimllm_hf.publish.target import PushError
from trimllm_hf.surgery.remote_code import write_remote_code
from trimllm_hf.utils import format_bytes

CARD = "---\nlibrary_name: transformers\nbase_model: org/base\ntags: [pruned]\n---\n# A model\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model()
    drop_layers(model, [1, 4])
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def check(folder: Path) -> None:
    contents = contents_of(folder, {"the token": "a-token-of-some-length"})
    check_card(contents, check_model(contents))


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_map(folder: Path, **changes: object) -> None:
    edit_json(folder / "config.json", trim={**json.loads((folder / "config.json").read_text())["trim"], **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_and_a_missing_layer_does_not(family: str, tmp_path: Path) -> None:
    """By transformers' own loading, so that names and shapes which it converts are no false alarm."""
    model = tiny_model(family)
    drop_layers(model, [1, 4])
    model.save_pretrained(tmp_path)
    layer_map = check_model(contents_of(tmp_path))
    assert (layer_map.num_layers, tag_name(layer_map)) == (4, "trim-4of6")
    weights = load_file(tmp_path / "model.safetensors")
    last = {name: tensor for name, tensor in weights.items() if ".3." not in name}
    assert len(last) < len(weights)
    save_file(last, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"to fit its config of 4 layers, got \d+ tensors that the config asks for"):
        check_model(contents_of(tmp_path))


def test_a_good_folder_passes_and_no_weight_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(folder)
    for shard in folder.glob("model-*"):  # the same headers over a hole: any value read would be a zero
        with shard.open("r+b") as opened:
            header = 8 + int.from_bytes(opened.read(8), "little")
            size = shard.stat().st_size
            opened.truncate(header)
            opened.truncate(size)
    check(folder)


def spoil_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def spoil_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def spoil_no_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def spoil_only_pickles(folder: Path) -> None:
    spoil_no_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def spoil_no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def spoil_half_index(folder: Path) -> None:
    (folder / INDEX).write_text((folder / INDEX).read_text()[:200])


def spoil_missing_shard(folder: Path) -> None:
    next(folder.glob("model-00002*")).unlink()


def spoil_shard_elsewhere(folder: Path) -> None:
    plain = json.loads((folder / INDEX).read_text())
    edit_json(folder / INDEX, weight_map={name: f"../{file}" for name, file in plain["weight_map"].items()})


def spoil_short_shard(folder: Path) -> None:
    shard = next(folder.glob("model-00001*"))
    shard.write_bytes(shard.read_bytes()[:-100])


def spoil_half_config(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text()[:100])


def spoil_two_saves(folder: Path) -> None:
    """A save of a shallower model that was killed after its first shard."""
    weights = load_file(next(folder.glob("model-00001*")))
    weights.popitem()
    save_file(weights, next(folder.glob("model-00001*")), metadata={"format": "pt"})


def spoil_config_of_another_depth(folder: Path) -> None:
    """The config of the next save over the weights of the last one."""
    edit_json(folder / "config.json", num_hidden_layers=3)
    edit_map(folder, kept_layers=[0, 2, 3])


def spoil_other_shape(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=48)


def spoil_map_of_another_depth(folder: Path) -> None:
    edit_map(folder, kept_layers=[0, 2, 3])


def spoil_map_out_of_range(folder: Path) -> None:
    edit_map(folder, kept_layers=[0, 2, 3, 10**9])


def spoil_state_says_otherwise(folder: Path) -> None:
    kept = {**json.loads((folder / "config.json").read_text())["trim"], "kept_layers": [0, 1, 2, 3]}
    state = {"stateful_callbacks": {"TrimCallback": {"attributes": {"layer_map": kept}}}}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def spoil_unknown_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="not_in_transformers")


def spoil_unknown_class(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["NotInTransformers"])


def spoil_custom_code(folder: Path) -> None:
    """The folder's own code is not run: the layers are counted."""
    edit_json(folder / "config.json", auto_map={"AutoConfig": "own.Config"}, num_hidden_layers=3)
    edit_map(folder, kept_layers=[0, 2, 3])


def spoil_report_of_other_layers(folder: Path) -> None:
    (folder / "trim_report.json").write_text(json.dumps({"trimmed": {"map": {"kept_layers": [0, 1, 2, 3]}}}))


def spoil_report_of_other_weights(folder: Path) -> None:
    shard = next(folder.glob("model-00001*"))
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    report = {"trimmed": {"sha256": {shard.name: digest, "config.json": "of an earlier version, which is no matter"}}}
    (folder / "trim_report.json").write_text(json.dumps(report))
    check(folder)
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})


def spoil_no_card(folder: Path) -> None:
    (folder / "README.md").unlink()


def change_card(old: str, new: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "README.md").write_text(CARD.replace(old, new))

    return spoil


def add_to(name: str, text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        with (folder / name).open("a") as opened:
            opened.write(text)

    return spoil


NO_TASK = "[{name: m, results: [{metrics: [{type: f1}]}]}]"
FAKE = "hf_" + "Ab1" * 12  # the form of a token

SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing there": (spoil_nothing_there, "which is not a folder"),
    "no config": (spoil_no_config, "config.json, got .* without one"),
    "an adapter": (spoil_adapter, "holds an adapter: merge it"),
    "no weights": (spoil_no_weights, f"model.safetensors or {INDEX} in .*, got neither"),
    "only pickles": (spoil_only_pickles, "pytorch_model.bin, a pickle"),
    "no index": (spoil_no_index, "without their index, so a save was not finished"),
    "half an index": (spoil_half_index, "Expected JSON in .*index.json, got"),
    "a missing shard": (spoil_missing_shard, "got none called model-00002"),
    "a shard elsewhere": (spoil_shard_elsewhere, r"got none called \.\./model"),
    "a short shard": (spoil_short_shard, "Expected whole safetensors weights in .*model-00001"),
    "half a config": (spoil_half_config, "Expected JSON in .*config.json, got"),
    "two saves": (spoil_two_saves, "The shards are of two saves"),
    "a config of another depth": (spoil_config_of_another_depth, "config of 3 layers, got 9 tensors that a file holds"),
    "another shape": (spoil_other_shape, "tensors of another shape than the config says"),
    "a map of another depth": (spoil_map_of_another_depth, "depth of 4, got 3"),
    "a map out of range": (spoil_map_out_of_range, "Expected kept_layers from 0 to 5"),
    "a state that says otherwise": (spoil_state_says_otherwise, r"got kept layers \[0, 2, 3, 5\] by config.json"),
    "an unknown architecture": (spoil_unknown_architecture, "Expected a config that transformers reads"),
    "an unknown class": (spoil_unknown_class, r"got \['NotInTransformers'\]"),
    "code of its own": (spoil_custom_code, "the config's 3 layers, got none numbered 0 to 2"),
    "a report of other layers": (spoil_report_of_other_layers, "measurements of others .* differs in the kept layers"),
    "a report of other weights": (spoil_report_of_other_weights, "measurements of others .* differs in model-00001"),
    "no card": (spoil_no_card, "Expected a model card in .*README.md, got none"),
    "no metadata": (change_card("---\n", ""), "got no metadata"),
    "half a card": (change_card("tags: [pruned]\n---\n", "tags: [pru"), "got no metadata"),
    "broken metadata": (change_card("tags: [pruned]", "tags: [pru"), "Expected YAML metadata"),
    "an object in the metadata": (change_card("[pruned]", "!!python/object/apply:os.getcwd []"), "Expected YAML metadata"),
    "no library": (change_card("library_name: transformers\n", ""), "got no library_name"),
    "a local base": (change_card("org/base", "/home/me/base"), "base_model '/home/me/base', which is not a model id"),
    "a base that is a list": (change_card("org/base", "[org/base, ../mine]"), r"base_model '\.\./mine'"),
    "a relation": (change_card("tags:", "base_model_relation: pruned\ntags:"), "base_model_relation 'pruned'"),
    "tags as a text": (change_card("[pruned]", "pruned"), "tags 'pruned'"),
    "scores without a task": (change_card("tags:", f"model-index: {NO_TASK}\ntags:"), "Expected YAML metadata"),
    "a placeholder": (change_card("A model", "[More Information Needed]"), "More Information Needed.* in the text"),
    "an absent picture": (change_card("# A model", "![strip](strip.png)"), "picture 'strip.png'"),
    "a picture outside": (change_card("# A model", '<img src="../x.png">'), r"picture '\.\./x.png'"),
    "a token in the card": (add_to("README.md", f"\nlogin({FAKE})\n"), r"a Hugging Face token in README.md, line 8"),
    "a token in a config": (lambda f: edit_json(f / "config.json", hub_token=FAKE), "Hugging Face token in config.json"),
    "a key": (add_to("README.md", "AKIA" + "ABCDEFGH12345678"), "an AWS key in README.md"),
    "a private key": (add_to("README.md", "-----BEGIN OPENSSH PRIVATE KEY-----"), "a private key in README.md"),
    "a password": (add_to("README.md", "git clone https://me:pass0rd@host.org/x"), "a password in an address"),
    "the token itself": (add_to("README.md", "a-token-of-some-length"), "the token in README.md"),
}  # fmt: skip


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_folder_that_is_not_right(folder: Path, spoiled: str) -> None:
    spoil, message = SPOILED[spoiled]
    check(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=message) as raised:
        check(folder)
    assert FAKE not in str(raised.value)


def test_a_secret_in_a_header_is_found(folder: Path) -> None:
    shard = next(folder.glob("model-00001*"))
    save_file(load_file(shard), shard, metadata={"format": "pt", "made_with": FAKE})
    with pytest.raises(ValueError, match="a Hugging Face token in model-00001"):
        check(folder)


def test_a_checkpoint_that_was_not_finished(folder: Path) -> None:
    checkpoint = folder.rename(folder.with_name("checkpoint-10"))
    with pytest.raises(ValueError, match=r"complete checkpoint .* trainer_state.json"):
        check(checkpoint)


def test_only_a_models_files_go(folder: Path) -> None:
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        ".env",
        "notes.py",
        "credentials.json",
        "train.jsonl",
    ):
        (folder / name).write_bytes(b"x")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE.txt", "measurements.json"):
        (folder / name).write_text("{}")
    (folder / "runs").mkdir()
    (folder / "card").mkdir()
    (folder / "card" / "strip.png").write_bytes(b"png")
    (folder / "card" / "draft.png").write_bytes(b"png")
    (folder / "README.md").write_text(CARD + "![strip](card/strip.png) ![badge](https://example.org/badge.svg)")
    save_file({"old": torch.zeros(1)}, folder / "model-00003-of-00003.safetensors")
    contents = contents_of(folder)
    assert set(contents.left_out) == {
        "training_args.bin", "optimizer.pt", "rng_state.pth", ".env", "notes.py", "credentials.json", "train.jsonl", "runs/",
        "model-00003-of-00003.safetensors",
    }  # fmt: skip
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE.txt", "measurements.json", "card/strip.png"} <= set(
        contents.sizes
    )
    assert "card/draft.png" not in contents.sizes
    assert "left out: .env" in str(contents)


def test_one_file_wins_over_an_index(folder: Path) -> None:
    """As in from_pretrained; the index is left of an earlier save in shards."""
    model = tiny_model()
    drop_layers(model, [0, 1])
    model.save_pretrained(folder)
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    (folder / INDEX).write_text("{}")
    contents = contents_of(folder)
    assert contents.weights == ("model.safetensors",) and INDEX in contents.left_out
    assert check_model(contents).kept_layers == (2, 3, 4, 5)


def test_a_model_of_all_its_layers_has_no_tag(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert tag_name(check_model(contents_of(tmp_path))) is None
    model = tiny_model()
    drop_layers(model, [5, 8], unit="sublayer")
    model.save_pretrained(tmp_path)
    assert tag_name(check_model(contents_of(tmp_path))) == "trim-10of12-sublayers"  # though it has all its blocks


@pytest.mark.parametrize("code", [False, True], ids=["with the package", "with code beside it"])
def test_halves_of_blocks_are_counted_too(code: bool, tmp_path: Path) -> None:
    model = tiny_model()
    drop_layers(model, [5, 8], unit="sublayer")
    model.save_pretrained(tmp_path)
    if code:
        write_remote_code(tmp_path)
    layer_map = check_model(contents_of(tmp_path))
    assert layer_map.missing_sublayers == ((2, "mlp"), (4, "attention"))
    lacking = LayerMap(6, tuple(range(6)), "sublayer", kept_attention=(0, 1, 2, 3, 5), kept_mlp=(0, 1, 4, 5))
    edit_json(tmp_path / "config.json", trim=lacking.to_dict())  # as if the MLP of 3 were gone as well
    with pytest.raises(ValueError, match=r"exactly the sublayers that config\.trim keeps, got 4 unexpected_keys"):
        check_model(contents_of(tmp_path))


def test_what_is_no_secret(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary, a checksum, an address with a port: none is taken for a credential."""
    words = [
        "hf_",
        "hf_hub_download_some_very_long_function_name",
        "sk-learn",
        "a" * 40,
        "http://127.0.0.1:8000/x@y",
        FAKE[:20],
    ]
    (folder / "tokenizer.json").write_text(json.dumps(words))
    check(folder)
    monkeypatch.setenv("TEST_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert secrets_of_environment()["the value of TEST_API_KEY"].startswith("0123")
    assert "the value of SHORT_TOKEN" not in secrets_of_environment()


def test_sizes_are_told_as_people_read_them() -> None:
    assert [format_bytes(n) for n in (0, 999, 12_345, 13.5e9, 2e12)] == [
        "0 bytes",
        "999 bytes",
        "12.35 kB",
        "13.50 GB",
        "2.00 TB",
    ]


def test_without_a_network(folder: Path) -> None:
    """The tests' own environment says offline; tests/hub has the pushes themselves."""
    with pytest.raises(ValueError, match="Expected a network for a push, got offline mode"):
        push_to_hub(folder, "user/model", token="hf_any")


@pytest.mark.parametrize(
    ("made", "said"), [([], "which is as it was"), (["the repository"], "in which this push has created the rep")]
)
def test_an_error_before_the_commit_says_what_was_made(made: list[str], said: str) -> None:
    with pytest.raises(PushError, match=f"Nothing was sent to me/model, {said}.*no route"), _nothing_sent("me/model", made):
        raise OSError("no route to host")
