"""The image half of the demo: train a small ResNet on Fashion-MNIST, remove half of its multiply-adds, save, reload.

    make demo               # after the text half; make demo-quick: both with few rows
    accelerate launch examples/demo_images.py

The data comes from a Debian package (`make data-images` unpacks it without root).
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

import hf_prune
from hf_prune import MagnitudeConfig, PruneTrainer, metrics
from hf_prune.cli.bench import bench
from hf_prune.demo_data import load_fashion_mnist
from hf_prune.graph import trace
from hf_prune.report.card import About, write_card

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tiny", action="store_true", help="a few hundred rows, so that it ends within a minute")
parser.add_argument("--rows", type=int, default=12_000, help="training rows")
parser.add_argument(
    "--epochs", type=float, default=2, help="passes over the rows, for the dense model and again to prune"
)
parser.add_argument("--flops", type=float, default=0.5, help="fraction of the multiply-adds to keep")
parser.add_argument("--output", type=Path, default=Path("runs/demo_images"))
parser.add_argument("--cards", type=Path, help="folder for the model cards; model_cards, or beside a tiny run")
options = parser.parse_args()
if options.tiny:
    options.rows = 1024
options.cards = options.cards or (options.output if options.tiny else Path("model_cards"))
logging.set_verbosity_error()


def pixels(batch):
    images = [torch.tensor(list(image.tobytes()), dtype=torch.float32).view(1, 28, 28) for image in batch["image"]]
    return {"pixel_values": (torch.stack(images) / 255 - 0.5) / 0.25, "labels": batch["label"]}


data = load_fashion_mnist(limit=options.rows).map(
    pixels, batched=True, batch_size=500, remove_columns=["image", "label"]
)
data = data.with_format("torch")
example = {"pixel_values": data["train"][:2]["pixel_values"]}
compute_metrics = metrics.compute_metrics_for("accuracy")


def common(name, model, learning_rate):
    """The arguments that a Trainer and a PruneTrainer share."""
    arguments = TrainingArguments(
        str(options.output / name), num_train_epochs=options.epochs, learning_rate=learning_rate, warmup_steps=0.1,
        per_device_train_batch_size=64, per_device_eval_batch_size=250, weight_decay=0.01, save_strategy="no",
        logging_steps=50, report_to="none",
    )  # fmt: skip
    return {
        "model": model, "args": arguments, "train_dataset": data["train"], "eval_dataset": data["validation"],
        "compute_metrics": compute_metrics,
    }  # fmt: skip


def run(name, trainer):
    """Train, save, reload with plain `from_pretrained`, score the reloaded model on test; a row of the table."""
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    folder = options.output / name / "model"
    hf_prune.save_pretrained(trainer.model, folder, report=getattr(trainer, "report", None))
    reloaded = AutoModelForImageClassification.from_pretrained(folder)
    score = Trainer(model=reloaded, args=trainer.args, compute_metrics=compute_metrics).predict(data["test"]).metrics
    price, size = trace(reloaded.eval(), example).price(), sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return [
        name,
        f"{price.multiply_adds / 1e6:.1f}",
        f"{size / 1e6:.2f}",
        f"{score['test_accuracy']:.3f}",
        f"{seconds:.0f}",
    ]


def write_model_card(name, trainer):
    """Score the finished model and time it, which fills its report, and write the card that a push would."""
    folder = options.output / name / "model"
    trainer.evaluate()
    trainer.predict(data["test"])
    trainer.save_model(str(folder))
    bench([str(options.output / "dense" / "model"), str(folder)], image_size=28, save=True)
    about = About(name=f"resnet-fashion-{name.replace(' ', '-').lower()}")
    write_card(folder, about, to=options.cards / f"{about.name}.md")


set_seed(0)
sizes = {"num_channels": 1, "embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2], "num_labels": 10}
dense = ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic", downsample_in_first_stage=False))
table = Table("model", "multiply-adds, M", "file, MB", "accuracy", "seconds", title="Fashion-MNIST, test rows")
table.add_row(*run("dense", Trainer(**common("dense", dense, 3e-3))))
for name, scope in (("global L1", "global"), ("uniform L1", "per_group")):
    pruning = MagnitudeConfig(target_flops=options.flops, scope=scope, begin=0.0, end=0.3)
    trainer = PruneTrainer(**common(name, copy.deepcopy(dense), 1e-3), pruning=pruning)
    table.add_row(*run(name, trainer))
    write_model_card(name, trainer)
Console().print(table)
