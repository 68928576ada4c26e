"""A recipe's run: settings, data, training, table, card."""

import copy
import logging as levels
from collections.abc import Mapping, Sequence

from accelerate.utils import wait_for_everyone
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging

from trimllm_hf import TrimConfig, TrimTrainer
from trimllm_hf.choice_accuracy import Question, QuestionEncoder

from .card import write_card
from .demo import make_demo
from .settings import Domain, DomainArguments, RecipeArguments, parse
from .splits import load_off_domain, load_splits
from .table import Tests, compare, load

logger = logging.get_logger("transformers.trimllm_hf")


def run(domain: Domain, argv: Sequence[str]) -> None:
    """All that a recipe does.

    Raises:
        ValueError: If the settings or the data are not right; nothing has been trained then.
    """
    recipe, trim, args = parse(domain, argv)
    one_line_once(args)
    if recipe.demo:
        recipe.model_name_or_path, files = make_demo(domain.demo, args)
        recipe.train_file, recipe.validation_file, recipe.general_file = files["train"], files["test"], files["textbook"]
    encoder = make_encoder(recipe)
    questions = load_splits(recipe, domain, encoder, args.seed)
    tests = Tests(
        questions["test"], encoder, load_off_domain(recipe, domain, encoder, args.seed), general_file=recipe.general_file
    )
    if not trains(args):
        compare({"as it is": recipe.model_name_or_path}, tests, args)
        return
    trainer, tuned = fine_tune(recipe, trim, args, questions, encoder)
    rows = compare({"base, before fine-tuning": recipe.model_name_or_path, **tuned}, tests, args)
    write_card(trainer, rows, recipe, domain, questions)


def one_line_once(args: TrainingArguments) -> None:
    """Let the main process log a line a drop, and the others errors only."""
    logger.setLevel(levels.INFO if args.process_index == 0 else levels.ERROR)


def trains(args: TrainingArguments) -> bool:
    """Whether anything is trained: not with `--do_eval` alone (which `eval_strategy` sets by itself)."""
    return bool(args.do_train or not args.do_eval or args.eval_strategy != "no")


def make_encoder(recipe: DomainArguments) -> QuestionEncoder:
    """The base's tokenizer, and as many tokens as the base and the settings allow."""
    config = AutoConfig.from_pretrained(recipe.model_name_or_path).get_text_config()
    context = getattr(config, "max_position_embeddings", recipe.max_length)
    return QuestionEncoder(AutoTokenizer.from_pretrained(recipe.model_name_or_path), min(recipe.max_length, context))


def fine_tune(
    recipe: RecipeArguments,
    trim: TrimConfig,
    args: TrainingArguments,
    questions: Mapping[str, Sequence[Question]],
    encoder: QuestionEncoder,
) -> tuple[TrimTrainer, dict[str, str]]:
    """Fine-tune and trim; if asked for, fine-tune at full depth as well. The Trainer; names of models, where they are."""
    if "train" not in questions:
        raise ValueError("Expected training questions, got test questions only. Give --train_file, or --do_eval.")
    examples = {split: [encoder.example(q, q.right) for q in part] for split, part in questions.items()}
    common = {
        "eval_dataset": examples["validation"],
        "data_collator": encoder.collate,
        "processing_class": encoder.tokenizer,
    }
    trainer = TrimTrainer(load(recipe.model_name_or_path), args, trim=trim, train_dataset=examples["train"], **common)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    push, args.push_to_hub = args.push_to_hub, False  # not before it is scored: the card says how well it does
    trainer.save_model()
    args.push_to_hub = push
    models = {"trimmed and fine-tuned": str(args.output_dir)}
    if recipe.compare_full_depth:
        stock = copy.copy(args)
        stock.output_dir, stock.push_to_hub, stock.eval_strategy = f"{args.output_dir}-full", False, "no"
        # without the calibration examples here too: both train on the same questions
        full = Trainer(load(recipe.model_name_or_path), stock, train_dataset=trainer.train_dataset, **common)
        full.train()
        full.save_model()
        models = {"full depth, fine-tuned": stock.output_dir, **models}
    wait_for_everyone()  # the main process saves; all of them load
    return trainer, models
