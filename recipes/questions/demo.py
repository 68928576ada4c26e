"""The domain and the base model of `--demo`. **Its names and facts are invented.**

A textbook says to which class each member belongs (`badivol belongs to the ferazides`), and what each class does
(`ferazides act on the kidney`). Each question asks such a thing of one member (`Which organ does badivol act on?`), among
four choices. The base model reads the textbook only. Fine-tuning sees 2 questions of 5; the other 3 are for the test, and
the right answer to them stands nowhere: it follows from the member's class, and has to be put together by the model.
"""

import copy
import json
import random
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from questions.choice_accuracy import QuestionEncoder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

CLASSES, MEMBERS = 16, 160
SYLLABLES = ("ba do fe ki lu mo", "ra ne vi lo tu", "dim pex zan cor lit mov")
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12, "num_attention_heads": 2}
# half of 1/sqrt(width); with the default of 0.02, 12 narrow layers learn slowly
SHAPE |= {"max_position_embeddings": 64, "initializer_range": 0.06}
PRETRAINING = {"max_steps": 400, "learning_rate": 3e-3, "warmup_steps": 40, "per_device_train_batch_size": 24}
DEMO_FLAGS = """--compare_full_depth --max_steps 200 --warmup_steps 20 --learning_rate 2e-3
    --weight_decay 0.1 --per_device_train_batch_size 24 --per_device_eval_batch_size 128 --logging_steps 50
    --save_strategy no --eval_strategy steps --eval_steps 10""".split()


class Demo(NamedTuple):
    """The words of an invented domain."""

    member: str  # how the name of a member ends, e.g. "ol" for a drug
    family: str  # how the name of a class ends
    belongs: str  # what the textbook says of a member; {} for the member and for its class
    relations: Sequence[tuple[str, str, str]]  # what is said of a class, what is asked of a member, the answers


def make_demo(demo: Demo, recipe: Any, args: TrainingArguments, asks: str = "", to_row: Callable[..., Any] = dict) -> None:
    """Write the questions, as `to_row` makes rows of them, train the base model, and have the recipe use both."""
    folder = Path(f"{args.output_dir}-base")
    files = [folder / name for name in ("train.jsonl", "test.jsonl", "textbook.txt")]
    recipe.model_name_or_path = str(folder)
    recipe.train_file, recipe.validation_file, recipe.general_file = map(str, files)
    if args.resume_from_checkpoint:  # with those that the run began with
        return
    textbook, *questions = make_domain(demo, args.seed)
    if args.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for file, part in zip(files, questions, strict=False):
            file.write_text("".join(json.dumps(row) + "\n" for row in map(to_row, part) if row), encoding="utf-8")
        files[2].write_text("\n\n".join(textbook) + "\n", encoding="utf-8")
    words = [asks, *(q["question"] + " " + " ".join(q["choices"]) for part in questions for q in part)]
    train_base(folder, textbook, words, args)


def make_domain(demo: Demo, seed: int) -> tuple[list[str], list[Any], list[Any]]:
    """The textbook's sentences, the training questions and the test questions."""
    rng = random.Random(seed)
    stems = rng.sample(["".join(parts) for parts in product(*map(str.split, SYLLABLES))], CLASSES + MEMBERS)
    classes = [f"{stem}{demo.family}" for stem in stems[:CLASSES]]
    class_of = {f"{stem}{demo.member}": classes[i % CLASSES] for i, stem in enumerate(stems[CLASSES:])}
    textbook = [demo.belongs.format(member, name) for member, name in class_of.items()]
    questions = []
    for fact, asked, words in demo.relations:
        values = words.split()
        value_of = {name: values[i % len(values)] for i, name in enumerate(rng.sample(classes, CLASSES))}
        textbook += [f"{name} {fact.format(value)}" for name, value in value_of.items()]
        for member, name in class_of.items():
            right = value_of[name]
            wrong = rng.sample([value for value in values if value != right], 3)
            choices = rng.sample([right, *wrong], 4)
            questions.append({"question": asked.format(member), "choices": choices, "answer": choices.index(right)})
    rng.shuffle(questions)
    split = len(questions) * 2 // 5
    return textbook, questions[:split], questions[split:]


def train_base(folder: Path, textbook: list[str], more_words: list[str], args: TrainingArguments) -> None:
    """Train a 12-layer Llama on the textbook, from random weights; a word is a token."""
    split = pre_tokenizers.Whitespace()
    texts = ["Question: Answer:", *textbook, *more_words]
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))]
    word_level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    word_level.pre_tokenizer = split
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 64}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level, **special)
    set_seed(args.seed)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(words), tie_word_embeddings=True, **SHAPE, **ends)
    pretraining = copy.copy(args)
    for name, value in {**PRETRAINING, "output_dir": str(folder), "eval_strategy": "no", "push_to_hub": False}.items():
        setattr(pretraining, name, value)
    ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in textbook]
    rows = [{"input_ids": sentence, "labels": sentence} for sentence in ids]
    how: dict[str, Any] = {"data_collator": QuestionEncoder(tokenizer, 64).collate, "processing_class": tokenizer}
    trainer = Trainer(LlamaForCausalLM(config), pretraining, train_dataset=rows, **how)
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
