"""A training loop of one's own, with accelerate: five lines are the pruner's.

accelerate launch examples/accelerate_loop.py
python examples/accelerate_loop.py --tiny        # within seconds
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import hf_prune
from hf_prune import MovementConfig, Pruner

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--output", type=Path, default=Path("runs/accelerate_loop"))
options = parser.parse_args()

set_seed(0)
# Sequences of numbers; the class says whether the first number comes again.
ids = torch.randint(1, 20, (256 if options.tiny else 4096, 12))
rows = [{"input_ids": row, "labels": (row[1:] == row[0]).any().long()} for row in ids]
loader = DataLoader(rows, batch_size=32, shuffle=True)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = BertForSequenceClassification(BertConfig(vocab_size=20, **sizes))

accelerator = Accelerator()
epochs = 1 if options.tiny else 10
pruner = Pruner(model, MovementConfig(final_sparsity=0.8, freeze_embeddings=False))
pruner.attach()  # before accelerator.prepare
optimizer = pruner.wrap(torch.optim.AdamW(model.parameters(), lr=1e-3))
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
total_steps, step = epochs * len(loader), 0
pruner.step(0, total_steps)
for epoch in range(epochs):
    for batch in loader:
        outputs = model(**batch)
        loss = pruner.loss(outputs.loss, outputs, batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        pruner.step(step, total_steps)
    accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}, sparsity {pruner.sparsity:.2f}")
model = accelerator.unwrap_model(model)
report = pruner.finalize()  # the model is plain from here on

if accelerator.is_main_process:
    hf_prune.save_pretrained(model, options.output, report=report)
    loaded = AutoModelForSequenceClassification.from_pretrained(options.output).to(accelerator.device).eval()
    with torch.no_grad():
        right = (loaded(input_ids=ids.to(accelerator.device)).logits.argmax(-1).cpu() == torch.stack(
            [row["labels"] for row in rows]
        )).float().mean()  # fmt: skip
    print(f"{report.sparsity:.0%} of the weights removed, {right:.0%} of the rows right")
