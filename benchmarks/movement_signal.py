"""How much of what movement's scores rank by is signal: do two halves of one run's batches keep the same weights?

    python benchmarks/movement_signal.py            # all-MiniLM-L6-v2 on movie sentiment, 510 steps, some 10 minutes
    python benchmarks/movement_signal.py --quick    # few rows and steps: shows that it runs

A hard movement score is the sum of -W * dL/dW over the steps (equation 3 of Sanh et al. 2020), or what Adam makes of
those terms. One fine-tuning run, with the rows, teacher, loss and rates of `movement_text.py` and nothing masked, gives
one score over its even and one over its odd steps. Both rank the same weights by equally good evidence; where the tenth
that each would keep share no more weights than chance (a tenth), the ranking is noise and masking by it is random
pruning. Beside it, how many of the largest weights of the start are still the largest.

Then, what it does to the model that is being tuned to lose the lowest of each ranking, at random as well: a weight with
a low movement score is one that the gradient pulls towards zero, and dropping many of those at once is one step of
gradient descent as long as all these weights, in a direction that is right for short steps alone.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from cells import CACHE, RESULTS, Cell, Store
from movement_text import FULL, QUICK, Remembering, dense_cell, teacher_answers, tokenized_rows
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, get_scheduler, set_seed

from hf_prune.demo_data import minilm_path
from hf_prune.parts.distillation import kl_divergence
from hf_prune.parts.prunable import prunable_weights

KEPT = 0.1
LR, SCORE_LR, ALPHA, TEMPERATURE = 2e-4, 1e-2, 0.9, 2.0
CHECKPOINTS = (8, 32, 128, 512)
REMOVED_AT, REMOVED = (128, 512), (0.02, 0.05, 0.1, 0.2)
"""Steps after which the lowest of each ranking are taken away, and which fractions of all weights."""
VALIDATION_ROWS = 464


class Half:
    """Movement scores of all weights by every other step: the plain sum, and Adam's path through the same terms."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.weights = weights
        self.sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.adam = {name: nn.Parameter(torch.zeros_like(weight)) for name, weight in weights.items()}
        self.optimizer = torch.optim.Adam(self.adam.values(), lr=SCORE_LR)

    @torch.no_grad()
    def add(self) -> None:
        """Take the gradients that the weights have now."""
        for name, weight in self.weights.items():
            assert weight.grad is not None
            self.adam[name].grad = weight * weight.grad
            self.sums[name] -= self.adam[name].grad
        self.optimizer.step()

    def kept(self, kind: str) -> Tensor:
        """The `KEPT` highest of all weights together, as one bool vector."""
        return highest(flat(getattr(self, kind).values()))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def rankings(weights: Mapping[str, nn.Parameter], halves: Sequence[Half]) -> dict[str, Tensor]:
    """Scores of all weights together, over all steps so far."""
    magnitude = flat(weights.values()).abs()
    return {
        "random": torch.rand(len(magnitude), generator=torch.Generator().manual_seed(0)),
        "magnitude": magnitude,
        "movement, plain sums": sum(flat(half.sums.values()) for half in halves),
        "movement, Adam": sum(flat(half.adam.values()) for half in halves),
    }


@torch.no_grad()
def without_lowest(
    model: nn.Module, weights: Mapping[str, nn.Parameter], scores: Tensor, fraction: float, batches: Sequence[Any]
) -> dict[str, float]:
    """Loss and accuracy without the lowest `fraction` of all weights; they come back."""
    before = [weight.detach().clone() for weight in weights.values()]
    gone = torch.zeros(len(scores), dtype=torch.bool)
    gone[scores.topk(int(fraction * len(scores)), largest=False).indices] = True
    for weight, part in zip(weights.values(), gone.split([len(each.flatten()) for each in before]), strict=True):
        weight.masked_fill_(part.view_as(weight), 0.0)
    model.eval()
    outputs = [(model(**batch), batch["labels"]) for batch in batches]
    model.train()
    for weight, old in zip(weights.values(), before, strict=True):
        weight.copy_(old)
    rows = sum(len(labels) for _, labels in outputs)
    return {
        "loss": sum(len(labels) * float(output.loss) for output, labels in outputs) / rows,
        "accuracy": 100 * sum(int((output.logits.argmax(-1) == labels).sum()) for output, labels in outputs) / rows,
    }


def highest(scores: Tensor) -> Tensor:
    keep = torch.zeros(len(scores), dtype=torch.bool)
    return keep.index_fill_(0, scores.topk(int(KEPT * len(scores))).indices, True)


def overlap(ours: Tensor, theirs: Tensor) -> float:
    """Share of one half's kept weights that the other keeps too; chance is `KEPT`."""
    return int((ours & theirs).sum()) / int(ours.sum())


def losses(model: nn.Module, cell: Cell, limit: int) -> Iterator[Tensor]:
    """The loss of every batch of every epoch, at most `limit` of them."""
    tokenizer, data = tokenized_rows(cell["rows"])
    teacher = Remembering(cell)
    loader = DataLoader(data["train"], cell["batch"], shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    for batch in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader, cell["epochs"])), limit):
        outputs = model(**batch)
        distilled = kl_divergence(outputs.logits, teacher(**batch)["logits"], TEMPERATURE)
        yield (1 - ALPHA) * outputs.loss + ALPHA * distilled


def validation_batches(size: dict[str, int]) -> list[Any]:
    tokenizer, data = tokenized_rows(size["rows"])
    rows = data["validation"].select(range(min(VALIDATION_ROWS, len(data["validation"]))))
    return list(DataLoader(rows, 58, collate_fn=DataCollatorWithPadding(tokenizer)))


def measure(size: dict[str, int], limit: int) -> dict[str, Any]:
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=2).train()
    names = prunable_weights(model, (), ())
    weights = {name: parameter for name, parameter in model.named_parameters() if name in names}
    before = highest(flat(weights.values()).abs())
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "_embeddings." not in n], lr=LR)
    steps = min(limit, size["epochs"] * -(-size["rows"] // size["batch"]))
    schedule = get_scheduler("linear", optimizer, int(0.1 * steps), steps)
    halves, rows, removals = (Half(weights), Half(weights)), [], []
    validation = validation_batches(size)
    for step, loss in enumerate(losses(model, dense_cell(0, size), limit), 1):
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        halves[step % 2].add()
        optimizer.step()
        schedule.step()
        if step in CHECKPOINTS or step == steps:
            shared = {kind: overlap(*(half.kept(kind) for half in halves)) for kind in ("sums", "adam")}
            now = highest(flat(weights.values()).abs())
            rows.append(
                {"steps": step, "loss": loss.item(), **shared, "magnitude with its start": overlap(now, before)}
            )
            print(rows[-1], flush=True)
        if step in REMOVED_AT or step == steps:
            for name, scores in rankings(weights, halves).items():
                for fraction in (0.0, *REMOVED):
                    found = without_lowest(model, weights, scores, fraction, validation)
                    removals.append({"steps": step, "ranking": name, "removed": fraction, **found})
                    print(removals[-1], flush=True)
    return {
        "overlap": rows,
        "removals": removals,
        "kept": KEPT,
        "weights": sum(weight.numel() for weight in weights.values()),
        "size": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = QUICK if options.quick else FULL
    if not teacher_answers(dense_cell(0, size)).exists():
        raise SystemExit("the teacher's answers are not there; run benchmarks/movement_text.py (same options) first.")
    begin = time.perf_counter()
    result = measure(size, 16 if options.quick else 10**9)
    folder = CACHE if options.quick else RESULTS
    Store(folder / "movement_signal.json").write(**result, seconds=round(time.perf_counter() - begin))


if __name__ == "__main__":
    main()
