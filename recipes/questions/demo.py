"""The domain and the base model of `--demo`. **Its names and facts are invented.**

A textbook says to which class each member belongs (`badivol belongs to the ferazides`), and what each class does
(`ferazides act on the kidney`). Each question asks such a thing of one member (`Which organ does badivol act on?`), among
four choices. The base model reads the textbook only. Fine-tuning sees 2 questions of 5; the other 3 are for the test, and
the right answer to them stands nowhere: it follows from the member's class, and has to be put together by the model.
"""

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from trimllm_hf.choice_accuracy import QuestionEncoder

CLASSES, MEMBERS = 16, 160
SYLLABLES = ("ba do fe ki lu mo", "ra ne vi lo tu", "dim pex zan cor lit mov")
BASE = {"max_steps": 400, "learning_rate": 3e-3, "warmup_steps": 40, "per_device_train_batch_size": 24}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Demo:
    """The words of an invented domain.

    Attributes:
        member: How the name of a member ends, e.g. "ol" for a drug.
        family: How the name of a class ends.
        belongs: What the textbook says of a member; {} for the member and for its class.
        relations: What the textbook says of a class, what is asked of a member, and what the answer can be.
    """

    member: str
    family: str
    belongs: str
    relations: Sequence[tuple[str, str, str]]


def make_demo(demo: Demo, args: TrainingArguments, asks: str | None = None) -> tuple[str, dict[str, str]]:
    """Write the questions and train the base model, beside `args.output_dir`.

    Args:
        demo: The domain's words.
        args: The run's arguments.
        asks: What will be asked of labelled texts: the rows are then such texts, of the first relation only, and not
            questions with choices.

    Returns:
        Folder of the base model; the files "train", "test" and "textbook".
    """
    folder = Path(f"{args.output_dir}-base")
    files = {"train": folder / "train.jsonl", "test": folder / "test.jsonl", "textbook": folder / "textbook.txt"}
    if not args.resume_from_checkpoint:  # else those that the run began with
        textbook, train, test = make_domain(demo, args.seed)
        words = [q["question"] + " " + " ".join(q["choices"]) for q in train + test]
        if asks is not None:
            words.append(asks)
            train, test = as_labels(demo, train), as_labels(demo, test)
        with args.main_process_first(desc="the demo's questions"):
            if args.process_index == 0:
                folder.mkdir(parents=True, exist_ok=True)
                for name, rows in (("train", train), ("test", test)):
                    files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                files["textbook"].write_text("\n\n".join(textbook) + "\n", encoding="utf-8")
        train_base(folder, textbook, words, args)
    return str(folder), {name: str(path) for name, path in files.items()}


def make_domain(demo: Demo, seed: int) -> tuple[list[str], Rows, Rows]:
    """The textbook's sentences, the training questions and the test questions."""
    rng = random.Random(seed)
    stems = rng.sample(["".join(parts) for parts in product(*map(str.split, SYLLABLES))], CLASSES + MEMBERS)
    classes = [f"{stem}{demo.family}" for stem in stems[:CLASSES]]
    members = [f"{stem}{demo.member}" for stem in stems[CLASSES:]]
    class_of = {member: classes[i % CLASSES] for i, member in enumerate(members)}
    textbook = [demo.belongs.format(member, name) for member, name in class_of.items()]
    questions = []
    for fact, asked, words in demo.relations:
        values = words.split()
        value_of = {name: values[i % len(values)] for i, name in enumerate(rng.sample(classes, CLASSES))}
        textbook += [f"{name} {fact.format(value)}" for name, value in value_of.items()]
        for member in members:
            right = value_of[class_of[member]]
            wrong = rng.sample([value for value in values if value != right], 3)
            choices = rng.sample([right, *wrong], 4)
            questions.append({"question": asked.format(member), "choices": choices, "answer": choices.index(right)})
    rng.shuffle(questions)
    split = len(questions) * 2 // 5
    return textbook, questions[:split], questions[split:]


def as_labels(demo: Demo, questions: Rows) -> Rows:
    """The questions of the first relation as texts, labelled with the right answer."""
    values = set(demo.relations[0][2].split())
    return [
        {"text": q["question"], "label": q["choices"][q["answer"]]} for q in questions if q["choices"][q["answer"]] in values
    ]


def train_base(folder: Path, textbook: list[str], more_words: list[str], args: TrainingArguments) -> None:
    """Train a 12-layer Llama on the textbook, from random weights; a word is a token."""
    split = pre_tokenizers.Whitespace()
    texts = ["Question: Answer:", *textbook, *more_words]
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))]
    word_level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    word_level.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_level, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    set_seed(args.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=12,
            num_attention_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            initializer_range=0.06,  # half of 1/sqrt(width); with 0.02, the default, 12 narrow layers learn slowly
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    pretraining = copy.copy(args)
    for name, value in {**BASE, "output_dir": str(folder), "eval_strategy": "no", "push_to_hub": False}.items():
        setattr(pretraining, name, value)
    ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in textbook]
    trainer = Trainer(
        model,
        pretraining,
        train_dataset=[{"input_ids": sentence, "labels": sentence} for sentence in ids],
        data_collator=QuestionEncoder(tokenizer, 64).collate,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
