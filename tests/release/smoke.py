"""What a person does first with an installed wheel, without a package that it does not require: trim, save, load, `trimllm`.

    python tests/release/smoke.py [TAG]

A tag has to be that of the installed version. Run it where the repository is not on the path: `make smoke` does.
"""

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

NOT_REQUIRED = ("datasets", "evaluate", "deepspeed", "matplotlib", "peft", "trl")
sys.modules.update(dict.fromkeys(NOT_REQUIRED))  # importing one of them raises ImportError

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

import trimllm_hf  # noqa: E402

if sys.argv[1:] and sys.argv[1] != f"v{trimllm_hf.__version__}":
    raise SystemExit(f"Expected the tag v{trimllm_hf.__version__} for this version, got {sys.argv[1]}.")
assert version("trimllm_hf") == trimllm_hf.__version__
assert Path(trimllm_hf.__file__).is_relative_to(sys.prefix) or "--elsewhere" in sys.argv, trimllm_hf.__file__

shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=6)).eval()
ids = torch.arange(8)[None]
scores = trimllm_hf.score_layers(model, [{"input_ids": ids, "labels": ids}], importance="block_influence")
trimllm_hf.drop_layers(model, scores.argsort()[:2].tolist())
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    trimllm_hf.write_card(folder, trimllm_hf.TrimCardData(), measured=False)  # its template is in the wheel
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.num_hidden_layers == 4
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    for arguments in (["--help"], ["inspect", folder], ["inspect", folder, "--what-if"], ["doctor", folder]):
        command = [sys.executable, "-m", "trimllm_hf.cli", *arguments]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert shown, arguments
print(f"trimllm_hf {trimllm_hf.__version__} works: {Path(trimllm_hf.__file__).parent}")
