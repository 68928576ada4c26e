r"""Fine-tune a language model on financial news while it loses half of its layers, and measure what that did.

    python recipes/finance.py --demo                      # no network, no download, two minutes on two CPU cores
    python recipes/finance.py --drop_overlap              # SmolLM2-135M on financial tweets, from the Hub
    torchrun --nproc_per_node 2 recipes/finance.py --drop_overlap --target_layers 15 --num_train_epochs 2
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/finance.py --output_dir runs/finance \
        --drop_overlap --target_ratio 0.5 --push_to_hub --hub_model_id you/model
    python recipes/finance.py --model_name_or_path path/to/model --target_layers 3 --train_file news/train.jsonl \
        --validation_file news/valid.jsonl --off_domain_file anatomy_test.csv law_test.csv --max_steps 300

From the Hub:

    zeroshot/twitter-financial-news-sentiment   9,543 texts to train, 2,388 to validate and test (MIT); the default. One
                                                stands in both, so it takes --drop_overlap
    gbharti/finance-alpaca                      68,912 instructions with answers, a thousand held out; what TrimLLM (arXiv
                                                2412.11242) trained on: rank the answer against three others (read its card
                                                for what it is made of and what that allows)

Two of three news texts are neutral: read an accuracy beside what always the same answer reaches, in the line below the
table.

Local files are of the same shape:

    {"text": "$BANK falls a tenth after its outlook is cut", "label": "bearish"}

The other shapes of rows, how answers are ranked, the splits, the flags and the card at the end are the same in every
domain: medical.py says it. **The demo's bonds, funds and facts are invented**: it shows trimming at work, not finance.
"""

import sys
from typing import Any

from domain import Demo, Domain, HubData, run


def news(row: dict[str, Any]) -> dict[str, Any]:
    """A row of zeroshot/twitter-financial-news-sentiment."""
    return {"text": row["text"], "label": ("bearish", "bullish", "neutral")[row["label"]]}


def alpaca(row: dict[str, Any]) -> dict[str, Any]:
    """A row of gbharti/finance-alpaca."""
    asked = " ".join(filter(None, (row["instruction"], row["input"])))
    return {"question": asked, "answer": row["output"], "qtype": "any", "focus": asked}


FINANCE = Domain(
    name="finance",
    subject="financial news, bearish, bullish or neutral",
    hub={
        "zeroshot/twitter-financial-news-sentiment": HubData("mit", to_row=news),
        "gbharti/finance-alpaca": HubData("unknown", to_row=alpaca),
    },
    asks="Is this bearish, bullish or neutral?",
    demo=Demo(
        member="bond",
        family="fund",
        belongs="the {} is held by the {}",
        relations=(
            ("pays in {}", "In what does the {} pay?", "dollars euros yen pounds francs rupees won pesos"),
            ("is traded in {}", "Where is the {} traded?", "london tokyo zurich paris mumbai oslo toronto sydney"),
            ("rises with {}", "With what does the {} rise?", "inflation exports oil rates housing employment"),
            ("is backed by {}", "What backs the {}?", "mortgages gold wheat taxes copper patents rents timber"),
            ("is audited by a {}", "Who audits the {}?", "bank court ministry notary cooperative university"),
        ),
    ),
    not_for=("For investment decisions: it tells the tone of a text, and was checked on tweets of one period only.",),
)

if __name__ == "__main__":
    run(FINANCE, sys.argv[1:])
