"""Pairs of sentences: do both reviews like their film? Whole rows of the feed-forward layers go, and all get narrower.

python examples/sentence_pairs.py           # all-MiniLM-L6-v2 on pairs of movie reviews (make data-text)
python examples/sentence_pairs.py --tiny    # a small untrained model on few rows, within seconds
"""

import argparse
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from hf_prune import MovementConfig, PruneTrainer, metrics
from hf_prune.demo_data import load_movie_sentiment, minilm_path

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--output", type=Path, default=Path("runs/sentence_pairs"))
options = parser.parse_args()

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(minilm_path())


def pairs(batch):
    """Each row with the next: label 1 where both are of one opinion."""
    first, second = batch["text"], [*batch["text"][1:], batch["text"][0]]
    same = [int(a == b) for a, b in zip(batch["label"], [*batch["label"][1:], batch["label"][0]], strict=True)]
    return {**tokenizer(first, second, truncation=True, max_length=96), "labels": same}


data = load_movie_sentiment(limit=128 if options.tiny else 6400)
data = data.map(pairs, batched=True, remove_columns=data["train"].column_names)
if options.tiny:
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(minilm_path(), **small))
else:
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path())
dense = sum(parameter.numel() for parameter in model.parameters())

arguments = TrainingArguments(
    str(options.output), num_train_epochs=1 if options.tiny else 3, learning_rate=1e-4, warmup_steps=0.1,
    per_device_train_batch_size=32, per_device_eval_batch_size=64, save_strategy="no", logging_steps=20,
)  # fmt: skip
trainer = PruneTrainer(
    model=model, args=arguments, train_dataset=data["train"], eval_dataset=data["validation"],
    data_collator=DataCollatorWithPadding(tokenizer), processing_class=tokenizer,
    compute_metrics=metrics.compute_metrics_for("f1"),
    pruning=MovementConfig(final_sparsity=0.5, structure="neuron"),
)  # fmt: skip
trainer.train()
print(trainer.evaluate())
trainer.save_model()
kept = sum(parameter.numel() for parameter in trainer.model.parameters())
print(f"{dense:,} parameters before, {kept:,} after")
