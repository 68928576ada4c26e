r"""Fine-tune a language model on medical questions while it loses half of its layers, and measure what that did.

    python recipes/medical.py --demo                      # no network, no download, two minutes on two CPU cores
    python recipes/medical.py --output_dir runs/medical   # SmolLM2-135M on PubMedQA, from the Hub
    torchrun --nproc_per_node 2 recipes/medical.py --target_layers 15 --num_train_epochs 3
    accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/medical.py --output_dir runs/medical \
        --dataset_name openlifescienceai/medmcqa --drop_overlap --bf16 --push_to_hub --hub_model_id you/model
    python recipes/medical.py --model_name_or_path path/to/model --target_layers 3 --train_file train.jsonl \
        --validation_file valid.jsonl --test_file test.jsonl --off_domain_file law_test.csv --max_steps 300
    python recipes/medical.py --do_eval --model_name_or_path runs/medical   # score a model, train nothing

All flags of `TrainingArguments` (`--resume_from_checkpoint`, `--push_to_hub`, …) and of `TrimConfig` work, under every
engine of `recipes/accelerate/`; without a target, half of the layers stay.

From the Hub, the data sets that TrimLLM (arXiv 2412.11242) trained and tested on; another one can be named if its rows
have a shape from below.

    qiaojin/PubMedQA           pqa_labeled, 1,000 rows, of which a fifth is held out (MIT); the default
    openlifescienceai/medmcqa  182,822 to train, 4,183 to validate; the answers to the test split are not public (Apache-2.0)
    allenai/sciq               11,679 to train, 1,000 to validate, 1,000 to test (CC BY-NC 3.0: not for commercial use)

Rows of a JSON Lines file have one of these shapes; a CSV file is as MMLU's are: question, choices, letter, no header.

    {"question", "context", "label"}           PubMedQA: yes, no or maybe
    {"question", "answer", "qtype", "focus"}   MedQuAD: rank the answer against three to the same type of question
    {"question", "choices", "answer"}          anything else, `context` if there is one; `answer` is the index of the right
    {"text", "label"}                          which of the labels?

Loss is taken on the answer alone. A context that is too long loses its beginning; a question whose answer does not fit
is left out and counted. A model answers with the choice to which it gives the highest log-likelihood (of whole sentences,
which differ in length: per token); where answers are short, the table also says how often it writes the right one.
Without validation data a fifth of the training data is held out; without test data the validation data are the test. Rows
of the training data that stand in the test data as well are refused with their number, or left out by `--drop_overlap`.

The demo makes its own domain and base model (domain/demo.py). **Its drugs, classes and facts are invented**: it shows
trimming at work, not medicine. Beside the model that goes from 12 to 6 layers, stock Trainer fine-tunes all 12 for the
same steps on the same questions (`--compare_full_depth`, which any run can have).

At its end the run writes a model card into its folder, with the figures of its own table, speed and memory measured, and
what happened outside the domain: accuracy on `--off_domain_file`, loss on the text of `--general_file`.
"""

import sys
from typing import Any

from domain import Demo, Domain, HubData, run


def pubmedqa(row: dict[str, Any]) -> dict[str, Any]:
    """A row of qiaojin/PubMedQA."""
    return {**row, "context": " ".join(row["context"]["contexts"]), "label": row["final_decision"]}


def medmcqa(row: dict[str, Any]) -> dict[str, Any]:
    """A row of openlifescienceai/medmcqa."""
    return {"question": row["question"], "choices": [row[f"op{letter}"] for letter in "abcd"], "answer": row["cop"]}


def sciq(row: dict[str, Any]) -> dict[str, Any]:
    """A row of allenai/sciq; its paragraph of evidence, where there is one, is the context."""
    right = row["correct_answer"]
    choices = sorted([right, row["distractor1"], row["distractor2"], row["distractor3"]])
    return {"question": row["question"], "context": row["support"], "choices": choices, "answer": choices.index(right)}


MEDICAL = Domain(
    name="medical",
    subject="medical questions",
    hub={
        "qiaojin/PubMedQA": HubData("mit", "pqa_labeled", pubmedqa),
        "openlifescienceai/medmcqa": HubData("apache-2.0", to_row=medmcqa, unlabelled=("test",)),
        "allenai/sciq": HubData("cc-by-nc-3.0", to_row=sciq),
    },
    asks="What is this about?",
    demo=Demo(
        member="ol",
        family="ides",
        belongs="{} belongs to the {}",
        relations=(
            ("act on the {}", "Which organ does {} act on?", "heart liver kidney lung brain skin stomach thyroid"),
            ("can cause {}", "Which side effect can {} cause?", "cough nausea rash dizziness fever anemia insomnia edema"),
            (
                "are not given in {}",
                "In which condition is {} not given?",
                "asthma gout pregnancy glaucoma epilepsy diabetes",
            ),
            (
                "are reversed by {}",
                "What reverses {}?",
                "atropine glucagon calcium naloxone zinc bicarbonate charcoal insulin",
            ),
            (
                "need a check of {}",
                "What has to be checked with {}?",
                "sodium potassium creatinine glucose platelets ferritin",
            ),
        ),
    ),
    not_for=("As a source of advice: no answer of it was checked by anybody who knows the subject.",),
)

if __name__ == "__main__":
    run(MEDICAL, sys.argv[1:])
