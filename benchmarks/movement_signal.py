"""How much of what movement's scores rank by is signal: do two halves of one run's batches keep the same weights?

    python benchmarks/movement_signal.py            # all-MiniLM-L6-v2 on movie sentiment, 510 steps, some 6 minutes
    python benchmarks/movement_signal.py --quick    # few rows and steps: shows that it runs

A hard movement score is the sum of -W * dL/dW over the steps (equation 3 of Sanh et al. 2020), or what Adam makes of
those terms. One fine-tuning run, with the rows, teacher, loss and rates of `movement_text.py` and nothing masked, gives
one score over its even and one over its odd steps. Both rank the same weights by equally good evidence; where the tenth
that each would keep share no more weights than chance (a tenth), the ranking is noise and masking by it is random
pruning. Beside it, how many of the largest weights of the start are still the largest.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Mapping
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
        return highest(torch.cat([score.detach().flatten() for score in getattr(self, kind).values()]))


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


def measure(size: dict[str, int], limit: int) -> dict[str, Any]:
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=2).train()
    names = prunable_weights(model, (), ())
    weights = {name: parameter for name, parameter in model.named_parameters() if name in names}
    before = highest(torch.cat([weight.detach().abs().flatten() for weight in weights.values()]))
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "_embeddings." not in n], lr=LR)
    steps = min(limit, size["epochs"] * -(-size["rows"] // size["batch"]))
    schedule = get_scheduler("linear", optimizer, int(0.1 * steps), steps)
    halves, rows = (Half(weights), Half(weights)), []
    for step, loss in enumerate(losses(model, dense_cell(0, size), limit), 1):
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        halves[step % 2].add()
        optimizer.step()
        schedule.step()
        if step in CHECKPOINTS or step == steps:
            shared = {kind: overlap(*(half.kept(kind) for half in halves)) for kind in ("sums", "adam")}
            now = highest(torch.cat([weight.detach().abs().flatten() for weight in weights.values()]))
            rows.append(
                {"steps": step, "loss": loss.item(), **shared, "magnitude with its start": overlap(now, before)}
            )
            print(rows[-1], flush=True)
    return {"overlap": rows, "kept": KEPT, "weights": sum(weight.numel() for weight in weights.values()), "size": size}


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
