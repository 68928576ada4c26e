"""`Domain`, which a recipe fills in, and the flags that a person gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import HfArgumentParser, TrainingArguments

from trimllm_hf import TrimConfig

from .demo import Demo

Arguments = TypeVar("Arguments", bound="DomainArguments")


@dataclass(frozen=True)
class HubData:
    """A data set on the Hub.

    Attributes:
        licence: As its card says.
        config: Which of its configurations.
        to_row: A row as it is there, in one of the shapes of questions.py; None leaves the row out.
        unlabelled: Splits whose answers are not public.
    """

    licence: str
    config: str | None = None
    to_row: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda row: row
    unlabelled: Sequence[str] = ()


@dataclass(frozen=True)
class Domain:
    """What is different from one recipe to the next.

    Attributes:
        name: One word, for folders.
        subject: What the model is fine-tuned for, on its card.
        hub: The data sets on the Hub that the recipe knows, by id; the first is the default.
        asks: What is asked of a labelled text.
        demo: The words of the invented domain of `--demo`.
        not_for: What the model should not be used for, a sentence each, on its card.
    """

    name: str
    subject: str
    hub: Mapping[str, HubData]
    asks: str
    demo: Demo
    not_for: Sequence[str]


@dataclass
class DomainArguments:
    """What every recipe takes besides `TrainingArguments`."""

    model_name_or_path: str = "HuggingFaceTB/SmolLM2-135M"
    dataset_name: str | None = None  # by default the first that the recipe's docstring names
    dataset_config_name: str | None = None
    dataset_revision: str | None = None  # a branch, tag or commit; the commit that was read stands on the card
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    off_domain_file: list[str] | None = field(
        default=None, metadata={"help": "Questions of other domains: JSON Lines, or MMLU's CSV. More than one is taken."}
    )
    general_file: str | None = None  # a text outside the domain
    max_length: int = 1024  # tokens of context, question and answer; the model's own context is a limit as well
    max_choices: int | None = field(
        default=None, metadata={"help": "Labels to choose among, the right one and others drawn by the seed. Default: all."}
    )
    max_train_samples: int | None = None
    max_eval_samples: int = 500
    drop_overlap: bool = field(
        default=False, metadata={"help": "Leave training rows out that also stand in the test data, instead of refusing."}
    )
    demo: bool = False


@dataclass
class RecipeArguments(DomainArguments):
    """What the recipes of the three domains take besides."""

    compare_full_depth: bool = field(
        default=False, metadata={"help": "Fine-tune the base at full depth as well, for the same steps."}
    )


DEMO_FLAGS = """--compare_full_depth --max_steps 200 --warmup_steps 20 --learning_rate 2e-3 --weight_decay 0.1
    --per_device_train_batch_size 24 --per_device_eval_batch_size 128 --logging_steps 50 --save_strategy no
    --eval_strategy steps --eval_steps 10""".split()


def parse(domain: Domain, argv: Sequence[str]) -> tuple[RecipeArguments, TrimConfig, TrainingArguments]:
    """The three groups of settings. A flag that is given wins over the demo's, a target over the default one."""
    demo = "--demo" in argv
    target = ["--target_layers", "6"] if demo else ["--target_ratio", "0.5"]
    if any(flag.replace("_", "-").startswith("--target-") for flag in argv):
        target = []
    flags = [*(DEMO_FLAGS if demo else ["--output_dir", f"runs/{domain.name}"]), *target, *argv]
    if demo:
        flags = ["--output_dir", f"runs/{domain.name}-demo", *flags]
    parser = HfArgumentParser((RecipeArguments, TrimConfig, TrainingArguments))
    recipe, trim, args = parser.parse_args_into_dataclasses(flags)
    return with_defaults(recipe, domain), trim, resumable(args)


def with_defaults(recipe: Arguments, domain: Domain) -> Arguments:
    """The settings with the domain's own data set, where no other is named."""
    recipe.dataset_name = recipe.dataset_name or next(iter(domain.hub))
    if recipe.dataset_config_name is None and recipe.dataset_name in domain.hub:
        recipe.dataset_config_name = domain.hub[recipe.dataset_name].config
    return recipe


def resumable(args: TrainingArguments) -> TrainingArguments:
    """The arguments with `--resume_from_checkpoint true` as the word that the Trainer takes."""
    if args.resume_from_checkpoint in ("True", "true"):
        args.resume_from_checkpoint = True  # the newest checkpoint in output_dir
    return args
