"""Load a pruned model as any other: Auto classes, half precision, training on, pruning again. One import is new.

python examples/load_and_use.py [--model FOLDER_OR_HUB_ID]    # without one, a tiny model is pruned first
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import hf_prune  # the only new line: it teaches from_pretrained to open pruned checkpoints
from hf_prune import MagnitudeConfig

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tiny", action="store_true", help="what it does anyway")
parser.add_argument("--model", help="folder or Hub id of a pruned text classifier")
parser.add_argument("--output", type=Path, default=Path("runs/load_and_use"))
options = parser.parse_args()

if options.model is None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=1000, **sizes)).eval()
    _, report = hf_prune.prune(model, MagnitudeConfig(target_params=0.6))
    hf_prune.save_pretrained(model, options.output / "pruned", report=report)
    options.model = str(options.output / "pruned")

model = AutoModelForSequenceClassification.from_pretrained(options.model)
ids = torch.arange(1, 13).view(1, -1)
with torch.no_grad():
    print("logits:", model(ids).logits)
    print(
        "in bfloat16:", AutoModelForSequenceClassification.from_pretrained(options.model, dtype="bfloat16")(ids).logits
    )

# It trains as any other model ...
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model.train()(ids, labels=torch.tensor([1])).loss.backward()
optimizer.step()
model.eval()

# ... stock save_pretrained writes a folder that loads ...
model.save_pretrained(options.output / "trained")
again = AutoModelForSequenceClassification.from_pretrained(options.output / "trained")
assert torch.equal(again(ids).logits, model(ids).logits)

# ... and it can be pruned once more.
_, report = hf_prune.prune(model, MagnitudeConfig(final_sparsity=0.5))
hf_prune.save_pretrained(model, options.output / "twice", report=report)
print(f"{report.sparsity:.0%} of the weights that were left are zero now")
