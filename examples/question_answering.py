"""Extractive question answering on data of its own, scored by exact match and span F1; half of the weights go.

python examples/question_answering.py           # a small model from scratch, some minutes
python examples/question_answering.py --tiny    # few rows, within seconds
"""

import argparse
import itertools
import random
from pathlib import Path

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast, TrainingArguments, set_seed

from hf_prune import MovementConfig, PruneTrainer, metrics

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--output", type=Path, default=Path("runs/question_answering"))
options = parser.parse_args()

set_seed(0)
PEOPLE, THINGS, PLACES = "ann bob eve joe".split(), "bike book lamp piano".split(), "oslo paris rome york".split()
COLOURS = "red green blue black".split()
stories = []
for who, colour, what, where in itertools.product(PEOPLE, COLOURS, THINGS, PLACES):
    context = f"{who} bought a {colour} {what} in {where}"
    stories.append((context, f"where was {who}", where))
    stories.append((context, f"what did {who} buy", f"{colour} {what}"))
random.Random(0).shuffle(stories)

words = ["[PAD]", "[UNK]", *sorted({word for story in stories for word in " ".join(story[:2]).split()})]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def encode(context, question, answer):
    inputs = tokenizer(question, context, padding="max_length", max_length=16, return_offsets_mapping=True)
    begin = context.index(answer)
    inside = [
        i for i, (low, high) in enumerate(inputs.pop("offset_mapping"))
        if inputs.sequence_ids()[i] == 1 and begin <= low and high <= begin + len(answer)
    ]  # fmt: skip
    return {**inputs, "start_positions": inside[0], "end_positions": inside[-1]}


rows = Dataset.from_list([encode(*story) for story in stories[: 64 if options.tiny else None]])
train, test = rows.select(range(len(rows) // 4, len(rows))), rows.select(range(len(rows) // 4))
span_f1 = metrics.load("span_f1")


def compute_metrics(evaluation):
    begins, ends = (np.argmax(logits, axis=-1) for logits in evaluation.predictions)
    spans = zip(test["input_ids"], begins, ends, strict=True)
    texts = [tokenizer.decode(ids[begin : end + 1]) for ids, begin, end in spans]
    return span_f1.compute(predictions=texts, references=[[answer] for _, _, answer in stories[: len(test)]])


sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = BertForQuestionAnswering(BertConfig(vocab_size=len(words), pad_token_id=0, **sizes))
arguments = TrainingArguments(
    str(options.output), num_train_epochs=2 if options.tiny else 40, learning_rate=3e-3, warmup_steps=0.1,
    per_device_train_batch_size=32, save_strategy="no", label_names=["start_positions", "end_positions"],
)  # fmt: skip
trainer = PruneTrainer(
    model=model, args=arguments, train_dataset=train, eval_dataset=test, processing_class=tokenizer,
    compute_metrics=compute_metrics, pruning=MovementConfig(final_sparsity=0.5, freeze_embeddings=False),
)  # fmt: skip
trainer.train()
print(trainer.evaluate())
trainer.save_model()
