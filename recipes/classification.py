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
error of the best, or the one of `--publish_depth`. The demo's texts are invented (domain/demo.py).
"""

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate.utils import wait_for_everyone
from domain.card import fill
from domain.demo import make_demo
from domain.run import make_encoder, one_line_once
from domain.settings import Domain, DomainArguments, HubData, resumable, with_defaults
from domain.splits import load_splits
from domain.table import save, show
from domain.ways import Classifier, Verbalizer, Way, is_decoder
from finance import FINANCE
from medical import MEDICAL
from transformers import AutoConfig, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from trimllm_hf import TrimCardData, TrimConfig, TrimTrainer, push_to_hub, write_card
from trimllm_hf.choice_accuracy import Question

logger = logging.get_logger("transformers.trimllm_hf")

NEWS = "zeroshot/twitter-financial-news-sentiment"
CLASSIFICATION = Domain(
    name="classification",
    subject="telling what a text is",
    hub={"fancyzhx/ag_news": HubData("unknown"), NEWS: FINANCE.hub[NEWS]},
    asks="What is this about?",
    demo=MEDICAL.demo,
    not_for=("Texts of another kind than those it was trained on.",),
)
DEMO_FLAGS = """--output_dir runs/classification-demo --depths 12 8 4 2 1 --max_steps 150 --warmup_steps 15
    --learning_rate 2e-3 --weight_decay 0.1 --per_device_train_batch_size 24 --per_device_eval_batch_size 128
    --logging_steps 50 --save_strategy no""".split()


@dataclass
class ClassificationArguments(DomainArguments):
    """What this recipe takes besides `TrainingArguments`."""

    depths: list[int] | None = field(default=None, metadata={"help": "How many of the first blocks to keep. Default: all."})
    head: str = field(default="auto", metadata={"help": "'verbalizer' (decoders), 'classifier' (encoders), or 'auto'."})
    asks: str = CLASSIFICATION.asks
    verbalizer: str | None = field(default=None, metadata={"help": 'The word of each label, as JSON: \'{"pos": "good"}\'.'})
    publish_depth: int | None = None


def parse(argv: Sequence[str]) -> tuple[ClassificationArguments, TrainingArguments]:
    """The two groups of settings. A flag that is given wins over the demo's."""
    flags = DEMO_FLAGS if "--demo" in argv else ["--output_dir", "runs/classification"]
    recipe, args = HfArgumentParser((ClassificationArguments, TrainingArguments)).parse_args_into_dataclasses(
        [*flags, *argv]
    )
    return with_defaults(recipe, CLASSIFICATION), resumable(args)


def way_of(recipe: ClassificationArguments) -> Way:
    """How the base is to classify: a decoder by words, any other by a head, unless `--head` says which.

    Raises:
        ValueError: If `--head` names no way.
    """
    name, base = recipe.head, recipe.model_name_or_path
    if name == "auto":
        name = "verbalizer" if is_decoder(base) else "classifier"
    if name == "verbalizer":
        return Verbalizer(base, make_encoder(recipe), recipe.verbalizer)
    if name == "classifier":
        return Classifier(base, recipe.max_length)
    raise ValueError(f"Expected --head auto, verbalizer or classifier, got {name!r}.")


# ---- k against accuracy


def depths_of(recipe: ClassificationArguments) -> tuple[int, list[int]]:
    """The base's depth, and the depths to try.

    Raises:
        ValueError: If one is not from 1 to the base's depth.
    """
    base: int = AutoConfig.from_pretrained(recipe.model_name_or_path).get_text_config().num_hidden_layers
    depths = list(range(base, 0, -1)) if recipe.depths is None else sorted(set(recipe.depths), reverse=True)
    wrong = [k for k in [*depths, recipe.publish_depth or base] if not 1 <= k <= base]
    if wrong or not depths:
        raise ValueError(f"Expected depths from 1 to {base}, the depth of {recipe.model_name_or_path}, got {wrong}.")
    if recipe.publish_depth is not None and recipe.publish_depth not in depths:
        raise ValueError(f"Expected --publish_depth to be one of --depths {depths}, got {recipe.publish_depth}.")
    return base, depths


def fine_tune(
    k: int, base: int, task: Way, args: TrainingArguments, questions: Mapping[str, Sequence[Question]]
) -> dict[str, Any]:
    """Fine-tune the first k blocks and score them: a row of the table, empty on other processes than the main one."""
    own = copy.copy(args)
    own.output_dir, own.push_to_hub = f"{args.output_dir}/{k}-of-{base}", False
    set_seed(args.seed)  # the same new head and the same order of the examples at every depth
    examples = {split: [task.example(q) for q in part] for split, part in questions.items()}
    model = task.model(sorted(questions["train"][0].choices))
    common = {
        "train_dataset": examples["train"],
        "eval_dataset": examples["validation"],
        "data_collator": task.collate,
        "processing_class": task.tokenizer,
    }
    trainer: Trainer
    if k < base:
        first_k = TrimConfig(target_layers=k, importance="last", drop_every="once", protect_last=0)
        trainer = TrimTrainer(model, own, trim=first_k, **common)
    else:
        trainer = Trainer(model, own, **common)
    took = trainer.train().metrics["train_runtime"]
    trainer.save_model()
    wait_for_everyone()  # the main process saves; all of them load
    score, saved = task.score(own.output_dir, questions["test"], args)
    parameters = saved.num_parameters()
    return {"layers": k, **score, "parameters": parameters, "seconds": took, "folder": own.output_dir} if score else {}


def chosen(rows: Sequence[Mapping[str, Any]], wanted: int | None) -> Mapping[str, Any]:
    """The row of the wanted depth; else of the shallowest model within one standard error of the best."""
    best = max(rows, key=lambda row: row["accuracy"])
    good = [row for row in rows if row["accuracy"] >= best["accuracy"] - best["standard_error"]]
    return min((row for row in rows if row["layers"] == wanted), default=good[-1], key=lambda row: row["layers"])


def publish(
    row: Mapping[str, Any],
    full: Mapping[str, Any] | None,
    recipe: ClassificationArguments,
    args: TrainingArguments,
    task: Way,
    questions: Mapping[str, Sequence[Question]],
) -> None:
    """Write the card of the chosen model; send both to the Hub, if asked to."""
    data = TrimCardData()
    fill(data, {"trimmed": row, **({"full": full} if full else {})}, recipe, CLASSIFICATION, questions)
    data.quality = [replace(quality, note=task.how) for quality in data.quality]
    if isinstance(task, Classifier):
        data.usage_prompt = questions["test"][0].context
    write_card(row["folder"], data)
    logger.info(f"The card of the model that keeps {row['layers']} blocks: {row['folder']}/README.md")
    if args.push_to_hub:
        name = args.hub_model_id or Path(str(args.output_dir)).name
        push_to_hub(row["folder"], name, token=args.hub_token, private=args.hub_private_repo)


def main(argv: Sequence[str]) -> None:
    """Data, a model for each depth, the table, the card."""
    recipe, args = parse(argv)
    one_line_once(args)
    if recipe.demo:
        recipe.model_name_or_path, files = make_demo(CLASSIFICATION.demo, args, asks=recipe.asks)
        recipe.train_file, recipe.test_file = files["train"], files["test"]
    base, depths = depths_of(recipe)
    task = way_of(recipe)
    found = load_splits(recipe, replace(CLASSIFICATION, asks=recipe.asks), task, args.seed)
    if "train" not in found or any(not question.context for part in found.values() for question in part):
        raise ValueError('Expected labelled texts to train on, rows of {"text", "label"}, got others. See medical.py.')
    questions = {split: task.prepare(part, f"the {split} split") for split, part in found.items()}
    rows = [fine_tune(k, base, task, args, questions) for k in depths]
    if args.process_index == 0:
        save(rows, args)
        show(rows, questions["test"], depth="k")
        row = chosen(rows, recipe.publish_depth)
        print(f"Within one standard error of the best, and the shallowest: k = {chosen(rows, None)['layers']}.")
        if row["layers"] < base:
            publish(row, rows[0] if depths[0] == base else None, recipe, args, task, questions)
    wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1:])
