"""Fine-tune a sentence classifier and remove 85 % of its weights meanwhile, with movement pruning and a teacher.

python examples/text_classification.py          # all-MiniLM-L6-v2 on movie reviews (make data-text)
python examples/text_classification.py --tiny   # a small untrained model on few rows, within seconds
"""

import argparse
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    pipeline,
    set_seed,
)

from hf_prune import DistillConfig, MovementConfig, PruneTrainer, metrics
from hf_prune.demo_data import load_movie_sentiment, minilm_path

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--output", type=Path, default=Path("runs/text_classification"))
options = parser.parse_args()

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(minilm_path())
data = load_movie_sentiment(limit=128 if options.tiny else 3200).map(
    lambda batch: tokenizer(batch["text"], truncation=True, max_length=64), batched=True
)
names = data["train"].features["label"].names
labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
if options.tiny:
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(minilm_path(), **small, **labels))
else:
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path(), **labels)

arguments = TrainingArguments(
    str(options.output), num_train_epochs=1 if options.tiny else 4, learning_rate=2e-4, warmup_steps=0.1,
    per_device_train_batch_size=32, per_device_eval_batch_size=64, save_strategy="no", logging_steps=20,
)  # fmt: skip
trainer = PruneTrainer(
    model=model, args=arguments, train_dataset=data["train"], eval_dataset=data["validation"],
    data_collator=DataCollatorWithPadding(tokenizer), processing_class=tokenizer,
    compute_metrics=metrics.compute_metrics_for("accuracy"),
    pruning=MovementConfig(final_sparsity=0.85, variant="soft", score_lr=3e-2),
    teacher="self", distillation=DistillConfig(alpha=0.1),
)  # fmt: skip
trainer.train()  # trainer.model is plain from here on, and trainer.report says what went
print(trainer.evaluate())
trainer.save_model()

classify = pipeline("text-classification", str(options.output))
print(classify("A film of rare wit and warmth."))
