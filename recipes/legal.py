r"""Fine-tune a language model on legal text while it loses half of its layers, and measure what that did.

    python recipes/legal.py --demo                    # no network, no download, two minutes on two CPU cores
    python recipes/legal.py --drop_overlap            # SmolLM2-135M on CaseHOLD, from the Hub
    torchrun --nproc_per_node 2 recipes/legal.py --drop_overlap --target_layers 15 --num_train_epochs 1
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/legal.py --output_dir runs/legal \
        --drop_overlap --target_ratio 0.5 --max_train_samples 20000 --push_to_hub --hub_model_id you/model
    python recipes/legal.py --model_name_or_path path/to/model --target_layers 3 --train_file clauses/train.jsonl \
        --validation_file clauses/valid.jsonl --test_file clauses/test.jsonl --max_choices 8 --drop_overlap

From the Hub: `case_hold` of `coastalcph/lex_glue` (45,000 rows to train, 3,900 to validate, 3,600 to test; CC BY 4.0),
TrimLLM's legal task (arXiv 2412.11242): which of five holdings does a decision cite, where the text says <HOLDING>?
Holdings are sentences of different lengths: ranked by log-likelihood per token. `--drop_overlap` leaves rows out of the
training data that stand in the test data too, if there are any; without it they would be refused.

Local files: contract clauses with their type, as in CUAD, are asked which type they are, among all types of the training
file or `--max_choices` of them (contracts copy clauses from each other, so `--drop_overlap` may be needed):

    {"text": "This Agreement shall be governed by the laws of …", "label": "Governing Law"}

The other shapes of rows, how answers are ranked, the splits, the flags and the card at the end are the same in every
domain: medical.py says it. **The demo's deeds, codes and rules are invented**: it shows trimming at work, not law.
"""

import sys
from typing import Any

from domain import Demo, Domain, HubData, run


def case_hold(row: dict[str, Any]) -> dict[str, Any]:
    """A row of coastalcph/lex_glue, case_hold."""
    asked = {"question": "Which holding is cited?", "context": row["context"], "per_token": True}
    return {**asked, "choices": row["endings"], "answer": row["label"]}


LEGAL = Domain(
    name="legal",
    subject="legal text: contract clauses and holdings",
    hub={"coastalcph/lex_glue": HubData("cc-by-4.0", "case_hold", case_hold)},
    asks="Which type of clause is this?",
    demo=Demo(
        member="deed",
        family="code",
        belongs="a {} is made under the {}",
        relations=(
            ("is heard by the {} court", "Which court hears a {}?", "county appeal navy tax probate federal patent labour"),
            ("asks for a {}", "What does a {} ask for?", "seal witness notary stamp oath deposit register signature"),
            ("puts the costs on the {}", "Who bears the costs of a {}?", "buyer seller tenant landlord bank insurer"),
            ("gives {}", "Which remedy does a {} give?", "damages rescission injunction restitution penalty eviction lien"),
            ("ends with {}", "With what does a {} end?", "notice death payment breach merger dissolution"),
        ),
    ),
    not_for=("As legal advice: no answer of it was checked by anybody who knows the law.",),
)

if __name__ == "__main__":
    run(LEGAL, sys.argv[1:])
