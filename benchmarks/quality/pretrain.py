"""Train the small base that the methods are compared on, from scratch, on public text.

    python benchmarks/quality/pretrain.py --data ../shared/data --output_dir ~/.cache/trimllm_hf/base
    python benchmarks/quality/pretrain.py --layers 24 --width 384 --vocabulary 8192 --batch_size 256 --learning_rate 1e-3

By default a Llama of 12 blocks, width 96 and 3,072 byte-pair tokens: 1.7 million parameters, of which each block has 120
thousand, for a CPU. The second line is for a GPU (it uses one if there is one): 24 blocks, 49 million parameters.

The text is that of the training splits of MedQuAD, PubMedQA, CUAD (whole contracts) and of financial tweets, without their
labels; children's stories; and books. One book is held out, to say what a model still knows of general English. The rows of
the test splits are not read.

`base.json` in the output folder says what it was trained on (hashes), how the loss fell, and where it ran. Stopped, it goes
on from its last checkpoint. The weights stay out of the repository: whoever wants them runs this.
"""

import argparse
import hashlib
import json
import platform
import random
import time
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

END = "<|endoftext|>"
HELD_OUT = "pg11.txt"  # a book
CONTEXT = 128  # tokens


def documents(data: Path) -> Iterator[tuple[str, str]]:
    """Every document of the training text, with the name of the file that it stands in."""
    for name, fields in (
        ("medquad", ("question", "answer")),
        ("pubmedqa", ("question", "context", "long_answer")),
        ("cuad_contracts", ("text",)),
        ("twitter_financial_news", ("text",)),
    ):
        file = data / name / "train.jsonl"
        with file.open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                yield str(file.relative_to(data)), "\n".join(row[field] for field in fields)
    stories = data / "tinystories/stories.txt"
    for story in stories.read_text(encoding="utf-8").split(END):
        yield str(stories.relative_to(data)), story.strip()
    for book in sorted((data / "general_books").glob("*.txt")):
        if book.name != HELD_OUT:
            yield str(book.relative_to(data)), book.read_text(encoding="utf-8")


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-pair tokens of these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=CONTEXT)


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.Tensor:
    """The texts in random order, one after the other, cut into pieces of the context's length: `[n, CONTEXT]`."""
    random.Random(seed).shuffle(texts)
    ids = [token for row in tokenizer(texts, verbose=False).input_ids for token in (*row, tokenizer.eos_token_id)]
    return torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)


def make_model(layers: int, width: int, vocabulary: int) -> LlamaForCausalLM:
    """A Llama with random weights, whose end of text is token 0.

    It is not told that this token pads as well, or its row would begin as zeros. A piece that begins with it would then be
    zero in every block, where a norm multiplies the gradient by 1000: infinite after a few blocks.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            vocab_size=vocabulary,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
    )


class StopAtNaN(TrainerCallback):
    """Ends a run whose gradient is no number: nothing comes of it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if not isfinite(logs.get("grad_norm", 0.0)):
            raise FloatingPointError(f"The gradient's norm is {logs['grad_norm']} at step {state.global_step}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output_dir", type=Path, default=Path.home() / ".cache/trimllm_hf/base")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--vocabulary", type=int, default=3072)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # cuDNN's attention gives NaN gradients on a Hopper GPU with torch 2.11: pytorch/pytorch#196678
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high")

    out = args.output_dir
    found = [(name, text) for name, text in documents(args.data) if text]
    texts = [text for _, text in found]
    tokenizer = make_tokenizer(texts, args.vocabulary)
    tokenizer.save_pretrained(out)
    rows = pack(texts, tokenizer, args.seed)
    held_out = pack([(args.data / "general_books" / HELD_OUT).read_text(encoding="utf-8")], tokenizer, args.seed)

    set_seed(args.seed)
    model = make_model(args.layers, args.width, len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id  # only now: see make_model
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        weight_decay=0.05,
        adam_beta2=0.95,
        logging_steps=max(1, args.steps // 40),
        save_steps=250,
        save_total_limit=1,
        bf16=torch.cuda.is_available(),
        report_to="none",
        seed=args.seed,
    )

    def examples(pieces: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": piece, "labels": piece} for piece in pieces]

    trainer = Trainer(
        model, arguments, train_dataset=examples(rows), eval_dataset=examples(held_out), callbacks=[StopAtNaN()]
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=any((out / "checkpoints").glob("checkpoint-*")))
    seconds = time.perf_counter() - start
    model.save_pretrained(out)
    told: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "tokens_seen": args.steps * args.batch_size * CONTEXT,
        "tokens_of_text": rows.numel(),
        "loss": {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row},
        "held_out_loss": trainer.evaluate()["eval_loss"],
        "held_out": HELD_OUT,
        "sha256": {
            name: hashlib.sha256((args.data / name).read_bytes()).hexdigest() for name in dict.fromkeys(n for n, _ in found)
        },
        "settings": {key: value for key, value in vars(args).items() if key not in ("data", "output_dir")},
        "seconds_since_last_start": seconds,
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (out / "base.json").write_text(json.dumps(told, indent=2) + "\n")
    print(f"{told['parameters']:,} parameters, loss on {HELD_OUT}: {told['held_out_loss']:.3f}, in {seconds:.0f} s")


if __name__ == "__main__":
    main()
