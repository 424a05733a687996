"""Image classification with ResRep: a ResNet forgets half of its multiply-adds while it trains, then is cut exactly.

python examples/image_classification.py           # a small ResNet on Fashion-MNIST (make data-images)
python examples/image_classification.py --tiny    # few rows, within seconds
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_prune import PruneTrainer, ResRepConfig, metrics
from hf_prune.demo_data import load_fashion_mnist
from hf_prune.graph import trace

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--output", type=Path, default=Path("runs/image_classification"))
options = parser.parse_args()

set_seed(0)


def pixels(batch):
    images = [torch.tensor(list(image.tobytes()), dtype=torch.float32).view(1, 28, 28) for image in batch["image"]]
    return {"pixel_values": (torch.stack(images) / 255 - 0.5) / 0.25, "labels": batch["label"]}


data = load_fashion_mnist(limit=256 if options.tiny else 12_000)
data = data.map(pixels, batched=True, batch_size=500, remove_columns=["image", "label"]).with_format("torch")
sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]} if options.tiny else {
    "embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2]
}  # fmt: skip
model = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, layer_type="basic", **sizes))
example = {"pixel_values": data["train"][:2]["pixel_values"]}
dense = trace(model.eval(), example).price().multiply_adds


def arguments(name, epochs, **more):
    return TrainingArguments(
        str(options.output / name), num_train_epochs=epochs, per_device_train_batch_size=64, save_strategy="no",
        per_device_eval_batch_size=250, warmup_steps=0.1, **more,
    )  # fmt: skip


Trainer(model=model, args=arguments("dense", 1, learning_rate=3e-3), train_dataset=data["train"]).train()

# The authors train for 180 epochs; in a few hundred steps channels must go at once, and only those that go are pulled.
pace = {"pull": "forgotten", "compactor_lr": 0.1, "lasso_weight": 0.015, "compactor_momentum": 0.9}
choice = {"begin": 0.06, "end": 0.4, "mask_interval_steps": 4, "begin_granularity": 24}
trainer = PruneTrainer(
    model=model, args=arguments("pruned", 1 if options.tiny else 3, learning_rate=1e-3, max_grad_norm=0.0),
    train_dataset=data["train"], eval_dataset=data["validation"],
    compute_metrics=metrics.compute_metrics_for("accuracy"),
    pruning=ResRepConfig(target_flops=0.5, **pace, **choice),
)  # fmt: skip
trainer.train()
print(trainer.evaluate())
trainer.save_model()
loaded = AutoModelForImageClassification.from_pretrained(options.output / "pruned").eval()
print(f"{trace(loaded, example).price().multiply_adds / dense:.0%} of the multiply-adds are left")
