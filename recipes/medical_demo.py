"""The domain and the base model of `medical.py --demo`. **Its drugs, classes and facts are invented.**

A textbook says to which class each drug belongs (`badivol belongs to the ferazides`), and what each class does
(`ferazides act on the kidney`). Each question asks such a thing of one drug (`Which organ does badivol act on?`), among
four choices. The base model reads the textbook only. Fine-tuning sees 2 questions of 5; the other 3 are for the test, and
the right answer to them stands nowhere: it follows from the drug's class, and has to be put together by the model.
"""

import copy
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from trimllm_hf.choice_accuracy import QuestionEncoder

CLASSES, DRUGS = 16, 160
RELATIONS = (  # what the textbook says of a class, what is asked of a drug, and what the answer can be
    ("act on the {}", "Which organ does {} act on?", "heart liver kidney lung brain skin stomach thyroid"),
    ("can cause {}", "Which side effect can {} cause?", "cough nausea rash dizziness fever anemia insomnia edema"),
    ("are not given in {}", "In which condition is {} not given?", "asthma gout pregnancy glaucoma epilepsy diabetes"),
    ("are reversed by {}", "What reverses {}?", "atropine glucagon calcium naloxone zinc bicarbonate charcoal insulin"),
    ("need a check of {}", "What has to be checked with {}?", "sodium potassium creatinine glucose platelets ferritin"),
)
SYLLABLES = ("ba do fe ki lu mo", "ra ne vi lo tu", "dim pex zan cor lit mov")
BASE = {"max_steps": 400, "learning_rate": 3e-3, "warmup_steps": 40, "per_device_train_batch_size": 24}


def make_demo(args: TrainingArguments) -> tuple[str, str, str, str]:
    """Write the questions and train the base model, beside `args.output_dir`.

    Returns:
        Folder of the base model, files of the training questions, of the test questions and of the textbook.
    """
    folder = Path(f"{args.output_dir}-base")
    train_file, test_file, book_file = folder / "train.jsonl", folder / "test.jsonl", folder / "textbook.txt"
    if not args.resume_from_checkpoint:  # else those that the run began with
        textbook, train, test = make_domain(args.seed)
        with args.main_process_first(desc="the demo's questions"):
            if args.process_index == 0:
                folder.mkdir(parents=True, exist_ok=True)
                for path, questions in ((train_file, train), (test_file, test)):
                    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
                book_file.write_text("\n\n".join(textbook) + "\n", encoding="utf-8")
        train_base(folder, textbook, [q["question"] + " " + " ".join(q["choices"]) for q in train + test], args)
    return str(folder), str(train_file), str(test_file), str(book_file)


def make_domain(seed: int) -> tuple[list[str], list[dict[str, Any]], list[dict[str, Any]]]:
    """The textbook's sentences, the training questions and the test questions."""
    rng = random.Random(seed)
    stems = rng.sample(["".join(parts) for parts in product(*map(str.split, SYLLABLES))], CLASSES + DRUGS)
    classes, drugs = [f"{stem}ides" for stem in stems[:CLASSES]], [f"{stem}ol" for stem in stems[CLASSES:]]
    class_of = {drug: classes[i % CLASSES] for i, drug in enumerate(drugs)}
    textbook = [f"{drug} belongs to the {name}" for drug, name in class_of.items()]
    questions = []
    for fact, asked, words in RELATIONS:
        values = words.split()
        value_of = {name: values[i % len(values)] for i, name in enumerate(rng.sample(classes, CLASSES))}
        textbook += [f"{name} {fact.format(value)}" for name, value in value_of.items()]
        for drug in drugs:
            right = value_of[class_of[drug]]
            wrong = rng.sample([value for value in values if value != right], 3)
            choices = rng.sample([right, *wrong], 4)
            questions.append({"question": asked.format(drug), "choices": choices, "answer": choices.index(right)})
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
