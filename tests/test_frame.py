"""A method written in this file alone runs in a plain loop and in PruneTrainer: the frame needs no change for it.

The toy puts a scalar on every row of the encoder's layers, shrinks them by a penalty while the weights rest, ranks rows
by their scalar, and tunes what is left in a second phase. It uses every field of `Recipe`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import TrainingArguments

from hf_prune import PruneConfig, Pruner, PruneTrainer, methods
from hf_prune.parts import schedules, structures
from hf_prune.parts.prunable import prunable_weights
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.selection import top_k
from hf_prune.testing import CHECKS, Case, Run, tiny_cases
from hf_prune.tiny_models import tiny_text_model
from hf_prune.types import Paper, Phase, Structure


@dataclass(frozen=True)
class ToyConfig(PruneConfig):
    """Rows by a learned scalar."""

    method = "toy"
    gate_lr: float = 0.05


class RowScale(nn.Module):
    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure
        self.scale = nn.Parameter(torch.ones(structure.units))
        self.register_buffer("kept", torch.ones(structure.units, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.structure.expand(self.scale * self.kept, self.structure.name)


class RowGate:
    def __init__(self, structure: Structure) -> None:
        self.name, self.module = structure.name, RowScale(structure)

    def _place(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.name.removesuffix(".weight"))

    def insert(self, model: nn.Module) -> None:
        parametrize.register_parametrization(self._place(model), "weight", self.module)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "gates", self.module.scale

    def set_keep(self, keep: Tensor) -> None:
        self.module.kept.copy_(keep)

    def keep(self) -> Tensor:
        return self.module.kept

    def fold(self, model: nn.Module) -> None:
        if parametrize.is_parametrized(self._place(model)):
            parametrize.remove_parametrizations(self._place(model), "weight")


class TwoPhases:
    """First the gates alone under their penalty, then everything else at half the rate without it."""

    def __init__(self, seen: list[Any]) -> None:
        self.progress, self.seen = 0.0, seen

    def phase(self, step: int) -> Phase:
        if self.progress < 0.5:
            return Phase("gates", trainable=lambda name: name.endswith(".scale"))
        return Phase("tune", lambda name: not name.endswith(".scale"), penalties_active=False, lr_scale=0.5)

    def observe(self, metrics: Mapping[str, float]) -> None:
        self.progress = metrics.get("progress", self.progress)
        self.seen.append(dict(metrics))

    def state_dict(self) -> dict[str, Any]:
        return {"progress": self.progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.progress = state["progress"]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that a method's file would be, in the table."""
    module = ModuleType("toy_method")
    module.seen = {"transform": 0, "project": 0, "passes": 0, "penalty": [], "metrics": []}

    def build(model: nn.Module, graph: Any, config: ToyConfig) -> Recipe:
        weights = prunable_weights(model, config.include, config.exclude)
        rows = structures.row_structures(weights)
        gates = [RowGate(each) for each in rows]

        def only_shrink(grad: Tensor) -> Tensor:
            module.seen["transform"] += 1
            return grad.clamp(min=0.0)

        def no_negative_scale() -> None:
            module.seen["project"] += 1
            for gate in gates:
                gate.module.scale.data.clamp_(min=0.0)

        def penalty(progress: float) -> Tensor:
            module.seen["penalty"].append(progress)
            return 0.1 * torch.stack([gate.module.scale.mean() for gate in gates]).mean()

        def twice(pruner: Pruner, called: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
            module.seen["passes"] += 1
            answers = [called(**inputs, **pruner.student_inputs) for _ in range(2)]
            return torch.stack([pruner.loss(each.loss, each, inputs) for each in answers]).mean()

        return Recipe(
            structures=rows,
            scores=lambda: {gate.name: gate.module.scale.detach() for gate in gates},
            selection=top_k(rows, config.goal, scope=config.scope, min_keep=config.min_keep),
            schedule=schedules.cubic(config.begin, config.end),
            fixed_from=config.end,
            gates=gates,
            penalties={"scales": penalty},
            transforms={gate.module.scale: only_shrink for gate in gates},
            projections=[no_negative_scale],
            controller=TwoPhases(module.seen["metrics"]),
            optimizers={"gates": lambda scales: torch.optim.SGD(scales, lr=config.gate_lr, momentum=0.9)},
            passes=twice,
            frozen=["bert.embeddings.word_embeddings.weight"],
        )

    module.Config, module.build, module.NEEDS_TRAINING = ToyConfig, build, True
    module.PAPER = Paper(title="Toy", authors="", year=2020, bibtex="@misc{toy}")
    module.GOALS = ("final_sparsity",)
    module.TINY = {"rows": ToyConfig(final_sparsity=0.5, begin=0.1, end=0.5)}
    monkeypatch.setitem(sys.modules, "toy_method", module)
    monkeypatch.setitem(methods.METHODS, "toy", "toy_method")
    return module


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract_of_every_method(check: Callable[[Case], None]) -> None:
    (case,) = tiny_cases("toy")
    check(case)


def test_every_part_does_its_work_in_a_plain_loop(toy: ModuleType) -> None:
    (case,) = tiny_cases("toy")
    run = Run(case, steps=10)
    scales = [p for n, p in run.model.named_parameters() if n.endswith(".scale")]
    assert len(scales) == 12
    assert [len(group["params"]) for group in run.optimizer.extras[0].param_groups] == [12]
    weights = {n: p for n, p in run.model.named_parameters() if not n.endswith(".scale")}
    start = {n: p.detach().clone() for n, p in weights.items()}

    run.advance(to=5)
    assert run.pruner.phase.name == "tune"
    assert all(torch.equal(start[n], p) for n, p in weights.items()), "only the gates train in the first phase"
    assert all((scale < 1).any() and (scale >= 0).all() for scale in scales)
    assert (toy.seen["transform"], toy.seen["project"], toy.seen["passes"]) == (5 * 12, 5, 5)
    assert max(toy.seen["penalty"]) == 0.4
    half_way, plan = [s.detach().clone() for s in scales], {n: k.clone() for n, k in run.pruner.plan.items()}

    run.advance()
    assert all(torch.equal(a, b) for a, b in zip(half_way, scales, strict=True)), "the gates rest in the second phase"
    moved = {n for n, p in weights.items() if not torch.equal(start[n], p)}
    assert "classifier.weight" in moved and "bert.embeddings.word_embeddings.weight" not in moved
    assert max(toy.seen["penalty"]) == 0.4, "no penalty in the second phase"
    assert all(torch.equal(plan[n], keep) for n, keep in run.pruner.plan.items()), "the plan is fixed from `end` on"
    assert [m["progress"] for m in toy.seen["metrics"]] == [i / 10 for i in range(11)]
    assert run.optimizer.extras[0].param_groups[0]["lr"] == 0.05, "the rate is scaled for the step alone"


def test_phases_leave_alone_what_is_not_the_models(toy: ModuleType) -> None:
    """A loss may have parameters of its own in the same optimizer; no phase knows their names."""
    model, own = tiny_text_model(), nn.Parameter(torch.ones(()))
    pruner = Pruner(model, toy.TINY["rows"])
    pruner.attach()
    optimizer = pruner.wrap(torch.optim.SGD([*model.parameters(), own], lr=0.1))
    pruner.step(0, 10)
    ids = torch.randint(0, 40, (4, 6))
    (own * pruner.batch_loss(model, {"input_ids": ids, "labels": ids[:, 0] % 3})).backward()
    optimizer.step()
    assert own.item() != 1.0


def test_it_runs_in_prune_trainer(toy: ModuleType, tmp_path: Path) -> None:
    ids = torch.randint(0, 40, (32, 6))
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3})
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_steps=1, eval_strategy="steps", eval_steps=4,
    )  # fmt: skip
    model = tiny_text_model()
    frozen = model.bert.embeddings.word_embeddings.weight.detach().clone()
    trainer = PruneTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, pruning=toy.TINY["rows"], teacher="self"
    )
    trainer.train()
    assert toy.seen["passes"] == 16  # two micro-batches a step
    assert trainer.report.sparsity == pytest.approx(0.5, abs=0.01)
    assert torch.equal(trainer.model.bert.embeddings.word_embeddings.weight, frozen)
    evaluated = [metrics for metrics in toy.seen["metrics"] if "eval_loss" in metrics]
    assert len(evaluated) == 2, "the controller sees every evaluation"
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all("distill_logits" in entry for entry in logged)
    assert ["scales" in entry for entry in logged] == [True] * 4 + [False] * 4
    assert trainer.evaluate()["eval_loss"] > 0
