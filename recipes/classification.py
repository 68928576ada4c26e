r"""Keep the first k blocks of a model, fine-tune it to classify texts, and see how many it takes: k against accuracy.

    python recipes/classification.py --demo                   # no network, no download, two minutes on two CPU cores
    python recipes/classification.py --drop_overlap           # SmolLM2-135M on AG News, 30 blocks down to 1
    torchrun --nproc_per_node 2 recipes/classification.py --drop_overlap --depths 30 15 8 4 2 1 --max_train_samples 2000
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/classification.py --drop_overlap \
        --dataset_name zeroshot/twitter-financial-news-sentiment --model_name_or_path google-bert/bert-base-uncased
    python recipes/classification.py --model_name_or_path path/to/model --train_file train.jsonl --test_file test.jsonl \
        --asks "What does the author feel?" --verbalizer '{"pos": "good", "neg": "bad"}' --num_train_epochs 3

This is "Why Lift so Heavy?" (Yuan et al., arXiv 2402.11700): the top blocks go before training, and what is left is
fine-tuned. Decoders are tuned by a prompt: after the text and a question (`--asks`) the model says a word, the label's
by the verbalizer (by default the label itself), and answers with the likeliest one. Encoders get a classification head,
and decoders too with `--head classifier`. At every depth training sees the same texts for the same steps from the same
seed, and every depth starts anew from the base. The table stands in `results.json`; each model in a folder of its own.

From the Hub: `fancyzhx/ag_news` (120,000 texts to train, 7,600 to test; its card names no licence: for research), one of the
paper's data sets, or `zeroshot/twitter-financial-news-sentiment` (MIT). Rows of a JSON Lines file: {"text", "label"}.

At the end a card is written for, and with `--push_to_hub` there goes to the Hub, the shallowest model within one standard
error of the best, or the one of `--publish_depth`. The demo's texts are invented (questions/demo.py).
"""

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import evaluate
import torch
from accelerate.utils import wait_for_everyone
from finance import HUB as FINANCE
from medical import DEMO
from questions import choice_accuracy
from questions.choice_accuracy import Question, QuestionEncoder, gather, score_questions
from questions.data import DataArguments, HubData, load_questions
from questions.demo import make_demo
from questions.table import describe, show
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from trimllm_hf import TrimCardData, TrimConfig, TrimTrainer, push_to_hub, write_card

logger = logging.get_logger("transformers.trimllm_hf")

Questions = Mapping[str, Sequence[Question]]
HUB = {"fancyzhx/ag_news": HubData("unknown"), **{name: data for name, data in FINANCE.items() if "twitter" in name}}
DEMO_FLAGS = """--output_dir runs/classification-demo --depths 12 8 4 2 1 --max_steps 150 --warmup_steps 15
    --learning_rate 2e-3 --weight_decay 0.1 --per_device_train_batch_size 24 --per_device_eval_batch_size 128
    --logging_steps 50 --save_strategy no""".split()


@dataclass
class Arguments(DataArguments):
    """The flags of the data, and those of this recipe."""

    dataset_name: str = "fancyzhx/ag_news"
    depths: list[int] | None = field(default=None, metadata={"help": "How many of the first blocks to keep. Default: all."})
    head: str = field(default="auto", metadata={"help": "'verbalizer' (decoders), 'classifier' (encoders), or 'auto'."})
    asks: str = "What is this about?"
    verbalizer: str | None = field(default=None, metadata={"help": 'The word of each label, as JSON: \'{"pos": "good"}\'.'})
    publish_depth: int | None = None


def parse(argv: Sequence[str]) -> tuple[Arguments, TrainingArguments]:
    """The two groups of settings. A flag that is given wins over the demo's."""
    flags = DEMO_FLAGS if "--demo" in argv else ["--output_dir", "runs/classification"]
    return HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses([*flags, *argv])


# ---- two ways to classify: by a word that the model says, or by a head


class Verbalizer:
    """After text and question the model says the label's word."""

    how = "The label whose word has the highest log-likelihood is the answer"

    def __init__(self, base: str, max_length: int, words: str | None = None) -> None:
        self.base, self.words = base, words
        self.encoder = QuestionEncoder(AutoTokenizer.from_pretrained(base), max_length)
        self.fitting, self.collate, self.tokenizer = self.encoder.fitting, self.encoder.collate, self.encoder.tokenizer

    def prepare(self, questions: Sequence[Question], source: str) -> list[Question]:
        """The questions with words in place of labels."""
        labels = sorted({choice for question in questions for choice in question.choices})
        words = verbalize(labels, self.words)
        said = [replace(q, choices=tuple(words[choice] for choice in q.choices)) for q in questions]
        return self.encoder.fitting(said, source)

    def model(self, labels: Sequence[str]) -> Any:
        """The base, to train."""
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    def example(self, question: Question) -> dict[str, Any]:
        """A training example: loss on the word."""
        return self.encoder.example(question, question.right)

    def score(self, folder: str, questions: Sequence[Question], args: TrainingArguments) -> tuple[dict[str, float], Any]:
        """Accuracy of a saved model, loaded as anybody would; nothing on other processes than the main one."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device)
        return score_questions(model, questions, self.encoder, args.per_device_eval_batch_size), model


class Classifier:
    """A classification head on the text alone."""

    how = "The label with the highest logit is the answer"

    def __init__(self, base: str, max_length: int) -> None:
        self.base, self.max_length = base, max_length
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.collate = DataCollatorWithPadding(self.tokenizer)

    def fitting(self, questions: Sequence[Question], source: str) -> list[Question]:
        """All of them: a text that is too long loses its end."""
        return list(questions)

    prepare = fitting

    def model(self, labels: Sequence[str]) -> Any:
        """The base with a new head, to train."""
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}
        settings = {"dtype": torch.float32, "pad_token_id": self.tokenizer.pad_token_id}
        return AutoModelForSequenceClassification.from_pretrained(self.base, **settings, **names)

    def example(self, question: Question) -> dict[str, Any]:
        """A training example: the text and the number of its label."""
        ids = self.tokenizer(question.context, truncation=True, max_length=self.max_length).input_ids
        return {"input_ids": ids, "labels": sorted(question.choices).index(question.right)}

    @torch.no_grad()
    def score(self, folder: str, questions: Sequence[Question], args: TrainingArguments) -> tuple[dict[str, float], Any]:
        """As the other way to classify: each process classifies its share."""
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
        size = args.per_device_eval_batch_size

        def logits_of(part: list[Question]) -> list[list[float]]:
            logits: list[list[float]] = []
            for start in range(0, len(part), size):
                batch = self.collate([self.example(question) for question in part[start : start + size]]).to(args.device)
                batch.pop("labels")
                logits += model(**batch).logits.tolist()
            return logits

        if (predictions := gather(logits_of, questions)) is None:
            return {}, model
        references = [sorted(question.choices).index(question.right) for question in questions]
        metric = evaluate.load(choice_accuracy.__file__, keep_in_memory=True)
        return metric.compute(predictions=predictions, references=references), model


def verbalize(labels: Sequence[str], given: str | None) -> dict[str, str]:
    """The word of each label; a ValueError if one has none or two the same, or a word has no label."""
    try:
        words = {label: label for label in labels} if given is None else json.loads(given)
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected --verbalizer as JSON, {{label: word}}, got {given!r}.") from error
    if not isinstance(words, dict) or set(words) != set(labels) or len(set(words.values())) < len(words):
        raise ValueError(f"Expected in --verbalizer a word of its own for each label of {list(labels)}, got {given}.")
    return words


def way_of(recipe: Arguments) -> Verbalizer | Classifier:
    """How the base is to classify: a decoder by words, any other by a head, unless `--head` says which."""
    name, config = recipe.head, AutoConfig.from_pretrained(recipe.model_name_or_path)
    max_length = min(recipe.max_length, getattr(config.get_text_config(), "max_position_embeddings", recipe.max_length))
    if name == "auto":  # BERT has a class that writes on, and is no decoder: it has to end in one of these names
        causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()).intersection(config.architectures or ())
        writes_on = any(architecture.endswith(("ForCausalLM", "LMHeadModel")) for architecture in causal)
        name = "verbalizer" if writes_on else "classifier"
    if name == "verbalizer":
        return Verbalizer(recipe.model_name_or_path, max_length, recipe.verbalizer)
    if name == "classifier":
        return Classifier(recipe.model_name_or_path, max_length)
    raise ValueError(f"Expected --head auto, verbalizer or classifier, got {name!r}.")


# ---- k against accuracy


def depths_of(recipe: Arguments) -> tuple[int, list[int]]:
    """The base's depth, and the depths to try; a ValueError if one is not from 1 to the base's depth."""
    base: int = AutoConfig.from_pretrained(recipe.model_name_or_path).get_text_config().num_hidden_layers
    depths = list(range(base, 0, -1)) if recipe.depths is None else sorted(set(recipe.depths), reverse=True)
    wrong = [k for k in [*depths, recipe.publish_depth or base] if not 1 <= k <= base]
    if wrong or not depths:
        raise ValueError(f"Expected depths from 1 to {base}, the depth of {recipe.model_name_or_path}, got {wrong}.")
    if recipe.publish_depth is not None and recipe.publish_depth not in depths:
        raise ValueError(f"Expected --publish_depth to be one of --depths {depths}, got {recipe.publish_depth}.")
    return base, depths


def fine_tune(
    k: int, base: int, way: Verbalizer | Classifier, args: TrainingArguments, questions: Questions
) -> dict[str, Any]:
    """Fine-tune the first k blocks and score them: a row of the table, empty on other processes than the main one."""
    own = copy.copy(args)
    own.output_dir, own.push_to_hub = f"{args.output_dir}/{k}-of-{base}", False
    set_seed(args.seed)  # the same new head and the same order of the examples at every depth
    train, validation = ([way.example(q) for q in questions[split]] for split in ("train", "validation"))
    common = {"data_collator": way.collate, "processing_class": way.tokenizer}
    common |= {"train_dataset": train, "eval_dataset": validation}
    model = way.model(sorted(questions["train"][0].choices))
    trainer: Trainer
    if k < base:
        first_k = TrimConfig(target_layers=k, importance="last", drop_every="once", protect_last=0, repair="none")
        trainer = TrimTrainer(model, own, trim=first_k, **common)
    else:
        trainer = Trainer(model, own, **common)
    took = trainer.train().metrics["train_runtime"]
    trainer.save_model()
    wait_for_everyone()  # the main process saves; all of them load
    score, saved = way.score(own.output_dir, questions["test"], args)
    parameters = saved.num_parameters()
    return {"layers": k, **score, "parameters": parameters, "seconds": took, "folder": own.output_dir} if score else {}


def chosen(rows: Sequence[Mapping[str, Any]], wanted: int | None) -> Mapping[str, Any]:
    """The row of the wanted depth; else of the shallowest model within one standard error of the best."""
    best = max(rows, key=lambda row: row["accuracy"])
    good = [row for row in rows if row["accuracy"] >= best["accuracy"] - best["standard_error"]]
    return min((row for row in rows if row["layers"] == wanted), default=good[-1], key=lambda row: row["layers"])


def publish(
    rows: Mapping[str, Any], recipe: Arguments, args: TrainingArguments, way: Verbalizer | Classifier, questions: Questions
) -> None:
    """Write the card of the row "trimmed", beside "full" if that was run; send both to the Hub, if asked to."""
    data, folder, asked = TrimCardData(), rows["trimmed"]["folder"], questions["test"][0]
    describe(data, rows, recipe, questions)
    data.domain = f"{'an invented domain in place of ' * recipe.demo}telling what a text is"
    data.quality = [replace(quality, note=way.how) for quality in data.quality]
    data.not_for = ["Texts of another kind than those it was trained on."]
    data.not_for += ["For anything in earnest: every name and fact that it was taught is invented."] * recipe.demo
    asks = f"\n{choice_accuracy.PROMPT.format(question=asked.text)}" * isinstance(way, Verbalizer)
    data.usage_prompt = f"{asked.context}{asks}"
    write_card(folder, data)
    logger.info(f"The card of the model that keeps {rows['trimmed']['layers']} blocks: {folder}/README.md")
    if args.push_to_hub:
        name = args.hub_model_id or Path(str(args.output_dir)).name
        push_to_hub(folder, name, token=args.hub_token, private=args.hub_private_repo)


def as_label(row: dict[str, Any]) -> dict[str, Any] | None:
    """A question of the demo's first relation as a text, labelled with the right answer."""
    right = row["choices"][row["answer"]]
    return {"text": row["question"], "label": right} if right in DEMO.relations[0][2].split() else None


def main(argv: Sequence[str]) -> None:
    """Data, a model for each depth, the table, the card."""
    recipe, args = parse(argv)
    logger.setLevel(logging.INFO if args.process_index == 0 else logging.ERROR)
    if recipe.demo:
        make_demo(DEMO, recipe, args, recipe.asks, as_label)
    base, depths = depths_of(recipe)
    way = way_of(recipe)
    recipe.off_domain_file = None  # labels of another kind than those that are learned
    found = load_questions(recipe, HUB, recipe.asks, way, args.seed)
    if "train" not in found or any(not question.context for part in found.values() for question in part):
        raise ValueError('Expected labelled texts to train on, rows of {"text", "label"}, got others. See medical.py.')
    questions = {split: way.prepare(part, f"the {split} split") for split, part in found.items()}
    rows = [fine_tune(k, base, way, args, questions) for k in depths]
    if args.process_index == 0:
        show(rows, questions["test"], str(args.output_dir), depth="k")
        row = chosen(rows, recipe.publish_depth)
        print(f"Within one standard error of the best, and the shallowest: k = {chosen(rows, None)['layers']}.")
        if row["layers"] < base:
            publish({"trimmed": row} | ({"full": rows[0]} if depths[0] == base else {}), recipe, args, way, questions)
    wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1:])
