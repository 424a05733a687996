"""The contract that every method keeps, as checks that a method of your own can take too.

>>> from hf_prune.testing import CHECKS, tiny_cases
>>> for case in tiny_cases("movement"):          # doctest: +SKIP
...     for check in CHECKS:
...         check(case)

A check is a function of one `Case` that raises AssertionError. A method that cannot keep one says so in its module:
`EXCUSES = {(variant, check name): reason}`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from hf_prune import methods
from hf_prune.config import PruneConfig
from hf_prune.pruner import Pruner
from hf_prune.tiny_models import TINY_MODELS, tiny_batch

STEPS = 10

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Case:
    """One method under one of its tiny configs, with a model and data made anew from fixed seeds at each call."""

    method: str
    variant: str
    config: PruneConfig

    def __str__(self) -> str:
        return f"{self.method}-{self.variant}"

    @property
    def module(self) -> ModuleType:
        """The method's module."""
        return methods.load(self.method)

    def excuse(self, check: Callable[[Case], None]) -> str | None:
        """Why the method need not keep `check` under this config, or None."""
        excuses: dict[tuple[str, str], str] = getattr(self.module, "EXCUSES", {})
        return excuses.get((self.variant, check.__name__.removeprefix("check_")))

    def model(self, seed: int = 0) -> PreTrainedModel:
        """A new tiny model of the kind that the method prunes."""
        kind = getattr(self.module, "TINY_MODEL", "text")
        return TINY_MODELS[getattr(self.module, "TINY_MODELS", {}).get(self.variant, kind)](seed)

    def batches(self, model: PreTrainedModel, count: int, size: int = 8) -> list[dict[str, Tensor]]:
        """`count` batches of labelled inputs that `model` takes."""
        return [tiny_batch(model, size, seed) for seed in range(count)]

    def pruner(self, model: PreTrainedModel) -> Pruner:
        """A pruner of `model`, not yet attached."""
        data = self.batches(model, 2)
        example = {k: v for k, v in data[0].items() if k != "labels"}
        return Pruner(model, self.config, example_inputs=example, data=data, evaluate=partial(_metrics, batch=data[1]))


def tiny_cases(method: str) -> Iterator[Case]:
    """One case for each entry of the method's `TINY`."""
    for variant, config in methods.load(method).TINY.items():
        yield Case(method, variant, config)


class Run:
    """A plain training loop of one case, step by step."""

    def __init__(self, case: Case, *, accumulation: int = 1, steps: int = STEPS) -> None:
        self.case, self.accumulation, self.steps = case, accumulation, steps
        self.model = case.model().train()
        self.pruner = case.pruner(self.model)
        self.pruner.attach()
        inner = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.optimizer = self.pruner.wrap(inner)
        self.batches = case.batches(self.model, steps)
        self.done = 0
        self.pruner.step(0, steps)

    def advance(self, to: int | None = None) -> Run:
        """Train up to step `to`, or to the end; gives itself back."""
        while self.done < (self.steps if to is None else to):
            self._one_step(self.batches[self.done])
            self.done += 1
            self.pruner.step(self.done, self.steps)
        return self

    def _one_step(self, batch: dict[str, Tensor]) -> None:
        self.optimizer.zero_grad()
        for part in _split(batch, self.accumulation):
            (self.pruner.batch_loss(self.model, part) / self.accumulation).backward()
        self.optimizer.step()


def _split(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    chunks = {name: values.chunk(parts) for name, values in batch.items()}
    return [{name: values[i] for name, values in chunks.items()} for i in range(parts)]


@torch.no_grad()
def _metrics(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    output = model(**batch)
    return {"loss": float(output.loss), "accuracy": float((output.logits.argmax(-1) == batch["labels"]).float().mean())}


@torch.no_grad()
def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    training = model.training
    logits = model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
    model.train(training)
    return logits


def check_config_round_trips(case: Case) -> None:
    """A config written as JSON and read again is the same config."""
    text = case.config.to_json()
    again = type(case.config).from_json(text)
    assert again == case.config and again.to_json() == text
    assert methods.config_from_dict(case.config.to_dict()) == case.config


def check_unknown_key_names_the_closest(case: Case) -> None:
    """A misspelled key is refused, and the right one named."""
    message = ""
    try:
        type(case.config).from_dict({**case.config.to_dict(), "final_sparcity": 0.5})
    except ValueError as error:
        message = str(error)
    assert "final_sparsity" in message, message or "an unknown key was accepted"


def check_new_gates_change_nothing(case: Case) -> None:
    """The attached model computes what the plain one did."""
    model = case.model()
    batch = case.batches(model, 1)[0]
    before = _logits(model, batch)
    pruner = case.pruner(model)
    pruner.attach()
    pruner.step(0, STEPS)
    after = _logits(model, batch)
    assert (before - after).abs().max() <= 1e-6


def check_goal_is_met(case: Case) -> None:
    """The report says that the goal was reached, or at least that something was pruned and something stayed."""
    run = Run(case).advance()
    report = run.pruner.finalize()
    goal = case.config.goal
    if goal is not None and goal.name == "final_sparsity":
        assert abs(report.sparsity - goal.value) <= 0.01, f"{report.sparsity} instead of {goal.value}"
    assert 0.0 < report.sparsity < 1.0


def check_finalize_keeps_outputs(case: Case) -> None:
    """Masked model == folded and shrunk model."""
    run = Run(case).advance()
    batch = run.batches[0]
    masked = _logits(run.model, batch)
    run.pruner.finalize()
    assert (masked - _logits(run.model, batch)).abs().max() <= 1e-5


def check_nothing_left_behind(case: Case) -> None:
    """The finished model has its own parameters and no hooks."""
    dense = dict(case.model().named_parameters())
    run = Run(case).advance()
    run.pruner.finalize()
    assert dict(run.model.named_parameters()).keys() <= dense.keys()
    assert all(p.requires_grad == dense[n].requires_grad for n, p in run.model.named_parameters())
    for name, module in run.model.named_modules():
        assert not parametrize.is_parametrized(module), f"{name} is still parametrized"
        assert not module._forward_hooks and not module._forward_pre_hooks, f"{name} still has hooks"


def check_resume_is_exact(case: Case) -> None:
    """A run stopped half-way and resumed in a new model ends bit for bit where the whole run ends."""
    whole = Run(case).advance()
    broken = Run(case).advance(to=STEPS // 2)
    model_state = {name: value.clone() for name, value in broken.model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimizer.pt"
        torch.save(broken.optimizer.state_dict(), path)
        optimizer_state = torch.load(path, weights_only=True)
    resumed = Run(case)
    resumed.model.load_state_dict(model_state)
    resumed.optimizer.load_state_dict(optimizer_state)
    resumed.done = STEPS // 2
    resumed.advance()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def check_baked_copy_leaves_the_run_alone(case: Case) -> None:
    """A copy baked half-way computes what the masked model does, and the run ends as if none had been taken."""
    whole, disturbed = Run(case).advance(), Run(case).advance(to=STEPS // 2)
    copied, _ = disturbed.pruner.baked()
    batch = disturbed.batches[0]
    assert (_logits(copied, batch) - _logits(disturbed.model, batch)).abs().max() <= 1e-5
    assert not any(parametrize.is_parametrized(module) for module in copied.modules())
    disturbed.advance()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, disturbed.model.state_dict()[name]), name


def check_accumulation_changes_nothing(case: Case) -> None:
    """The same batch in one, two or four parts gives the same sparsity and the same plan."""
    runs = [_frozen_statistics(Run(case, accumulation=parts)).advance() for parts in (1, 2, 4)]
    for other in runs[1:]:
        assert runs[0].pruner.sparsity == other.pruner.sparsity
        for name, keep in runs[0].pruner.plan.items():
            differing = (keep != other.pruner.plan[name]).float().mean()
            # Sums of other parts round differently, which may swap units whose scores agree to the last digits.
            assert differing <= 0.02, f"{name}: {differing:.1%} of the units differ"


def _frozen_statistics(run: Run) -> Run:
    """Batch norms on their running statistics: those of a batch and of its parts differ by themselves."""
    for module in run.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return run


def check_excluded_modules_are_not_masked(case: Case) -> None:
    """A layer named in `exclude` keeps every weight, and its size."""
    model = case.model()
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    excluded, goal = names[1], case.config.goal
    # Next to nothing may be left to prune beside a layer in the middle, so the goal must be an easy one.
    easy = {goal.name: 0.9} if goal is not None and goal.name.startswith("target_") else {}
    config = type(case.config).from_dict({**case.config.to_dict(), **easy, "exclude": (excluded,)})
    run = Run(Case(case.method, case.variant, config)).advance()
    run.pruner.finalize()
    weight, dense = (cast(Tensor, net.get_submodule(excluded).weight) for net in (run.model, case.model()))
    assert weight.shape == dense.shape
    assert bool((weight != 0).all())


def aligned(model: Model) -> Model:
    """`model`, as just loaded, its weights copied to memory as aligned as that of weights made by torch.

    They are mapped from a file that aligns them to 8 bytes, where some CPU kernels sum in another order.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def check_save_and_load(case: Case) -> None:
    """The saved model, opened with `from_pretrained`, gives the same outputs bit for bit."""
    from hf_prune.checkpoint import save_pretrained

    run = Run(case).advance()
    report = run.pruner.finalize()
    batch = run.batches[0]
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(run.model, folder, report=report)
        loaded = type(run.model).from_pretrained(folder)
    assert torch.equal(_logits(run.model, batch), _logits(aligned(loaded), batch))


CHECKS: tuple[Callable[[Case], None], ...] = (
    check_config_round_trips,
    check_unknown_key_names_the_closest,
    check_new_gates_change_nothing,
    check_goal_is_met,
    check_finalize_keeps_outputs,
    check_nothing_left_behind,
    check_resume_is_exact,
    check_baked_copy_leaves_the_run_alone,
    check_accumulation_changes_nothing,
    check_excluded_modules_are_not_masked,
    check_save_and_load,
)
