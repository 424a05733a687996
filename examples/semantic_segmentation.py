"""Semantic segmentation: a Segformer learns to find squares and discs, and loses 40 % of its multiply-adds meanwhile.

python examples/semantic_segmentation.py           # a small Segformer from scratch, some minutes
python examples/semantic_segmentation.py --tiny    # few rows, within seconds
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    TrainingArguments,
    set_seed,
)

from hf_prune import MagnitudeConfig, PruneTrainer
from hf_prune.graph import trace

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--output", type=Path, default=Path("runs/semantic_segmentation"))
options = parser.parse_args()

set_seed(0)
SIZE, CLASSES = 32, {0: "ground", 1: "square", 2: "disc"}
generator = np.random.default_rng(0)
y, x = np.mgrid[:SIZE, :SIZE]


def scene():
    """Noise with a bright square and a dark disc, (3, SIZE, SIZE), and the class of each pixel, (SIZE, SIZE)."""
    image, labels = generator.normal(0, 0.3, (3, SIZE, SIZE)), np.zeros((SIZE, SIZE), dtype=np.int64)
    (top, left), (down, right) = generator.integers(0, SIZE - 12, 2), generator.integers(6, SIZE - 6, 2)
    labels[top : top + 10, left : left + 10] = 1
    labels[(y - down) ** 2 + (x - right) ** 2 < 30] = 2
    image[:, labels == 1] += 1
    image[:, labels == 2] -= 1
    return {"pixel_values": image.astype(np.float32), "labels": labels}


rows = Dataset.from_list([scene() for _ in range(48 if options.tiny else 1600)]).with_format("torch")
split = rows.train_test_split(1 / 4, shuffle=False)


def compute_metrics(evaluation):
    """Mean over classes of intersection over union; logits come at a quarter of the resolution."""
    found = evaluation.predictions.argmax(1).repeat(4, axis=1).repeat(4, axis=2)
    pairs = [(found == i, evaluation.label_ids == i) for i in CLASSES]
    return {"mean_iou": float(np.mean([(a & b).sum() / max(1, (a | b).sum()) for a, b in pairs]))}


sizes = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32}
heads = {"num_attention_heads": [1, 2, 2, 4], "sr_ratios": [4, 2, 1, 1]}
model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=len(CLASSES), id2label=CLASSES, **sizes, **heads))
example = {"pixel_values": rows[:2]["pixel_values"]}
dense = trace(model.eval(), example).price().multiply_adds
arguments = TrainingArguments(
    str(options.output), num_train_epochs=1 if options.tiny else 10, learning_rate=2e-3, warmup_steps=0.1,
    per_device_train_batch_size=16, save_strategy="no", logging_steps=20,
)  # fmt: skip
trainer = PruneTrainer(
    model=model, args=arguments, train_dataset=split["train"], eval_dataset=split["test"],
    compute_metrics=compute_metrics, pruning=MagnitudeConfig(target_flops=0.6, begin=0.2, end=0.7),
)  # fmt: skip
trainer.train()
print(trainer.evaluate())
trainer.save_model()
loaded = AutoModelForSemanticSegmentation.from_pretrained(options.output).eval()
print(f"{trace(loaded, example).price().multiply_adds / dense:.0%} of the multiply-adds are left")
