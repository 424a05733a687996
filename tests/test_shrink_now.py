"""Units cut out while the run goes on: the same course of training as under masks, resumed bit for bit."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_prune import MovementConfig, PruneConfig, PruneError, Pruner, PruneTrainer, methods, testing
from hf_prune.graph import kept_entries
from hf_prune.parts import schedules, structures
from hf_prune.parts.gates import MaskGate
from hf_prune.parts.prunable import prunable_groups
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.scores import unit_norms
from hf_prune.parts.selection import top_k
from hf_prune.testing import Case, tiny_cases
from hf_prune.tiny_models import tiny_image_model, tiny_text_model
from hf_prune.types import Paper

STEPS = 12


@dataclass(frozen=True)
class ShrinkingConfig(PruneConfig):
    """L1 along a linear schedule, cut at three points."""

    method = "shrinking"
    normalised_groups: bool = False


@pytest.fixture(autouse=True)
def shrinking(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("shrinking_method")

    def build(model: nn.Module, graph: Any, config: ShrinkingConfig) -> Recipe:
        groups = prunable_groups(model, graph.groups, config.include, config.exclude, config.normalised_groups)
        units = [structures.group_structure(group, model) for group in groups]
        return Recipe(
            structures=units,
            scores=unit_norms(model, units, order=1),
            selection=top_k(units, config.goal, scope="per_group", min_keep=config.min_keep),
            schedule=schedules.linear(config.begin, config.end),
            fixed_from=config.end,
            shrink_at=(0.25, 0.5, 0.75),
            gates=[MaskGate(each, next(model.parameters()).device) for each in units],
        )

    module.Config, module.build, module.NEEDS_TRAINING = ShrinkingConfig, build, True
    module.PAPER = Paper(title="Shrinking", authors="", year=2020, bibtex="@misc{shrinking}")
    module.GOALS, module.TINY_MODEL = ("final_sparsity",), "image"
    module.TINY = {"channels": ShrinkingConfig(final_sparsity=0.6, begin=0.0, end=0.75)}
    monkeypatch.setitem(sys.modules, "shrinking_method", module)
    monkeypatch.setitem(methods.METHODS, "shrinking", "shrinking_method")
    return module


@pytest.mark.parametrize("check", [testing.check_resume_is_exact, testing.check_baked_copy_leaves_the_run_alone])
def test_the_frame_keeps_its_contract(check: Callable[[Case], None]) -> None:
    (case,) = tiny_cases("shrinking")
    check(case)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-2, amsgrad=True),
}


class Course:
    """A run in double precision with losses, cut or only masked."""

    def __init__(self, kind: str, optimizer: str, *, masked: bool = False, normalised: bool = False) -> None:
        self.model = {"text": tiny_text_model, "image": tiny_image_model}[kind]().double().train()
        config = ShrinkingConfig(final_sparsity=0.6, end=0.75, normalised_groups=normalised)
        batches = Case("shrinking", "channels", config).batches(self.model, STEPS)
        self.batches = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches]
        example = {name: value for name, value in self.batches[0].items() if name != "labels"}
        self.pruner = Pruner(self.model, config, example)
        self.pruner.attach()
        if masked:
            with pytest.warns(UserWarning, match="stay in the model as zeros until the run ends: for comparison"):
                self.pruner.keep_whole("for comparison")
        inner = OPTIMIZERS[optimizer](self.model.parameters())
        self.optimizer = self.pruner.wrap(inner)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / STEPS)
        self.losses: list[float] = []
        self.pruner.step(0, STEPS)

    def advance(self, to: int = STEPS) -> Course:
        while len(self.losses) < to:
            self.optimizer.zero_grad()
            loss = self.pruner.batch_loss(self.model, self.batches[len(self.losses)])  # lives on during the cut
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.losses.append(float(loss.detach()))
            self.pruner.step(len(self.losses), STEPS)
        return self

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.scheduler

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


@pytest.mark.parametrize(("kind", "optimizer"), [("image", "sgd"), ("image", "adamw"), ("text", "adamw")])
def test_cut_and_masked_courses_agree(kind: str, optimizer: str) -> None:
    cut, masked = Course(kind, optimizer), Course(kind, optimizer, masked=True)
    dense, sizes = cut.size, []
    for to in (3, 6, 9, STEPS):
        cut.advance(to), masked.advance(to)
        sizes.append(cut.size)
        assert cut.pruner.sparsity == masked.pruner.sparsity
    assert dense > sizes[0] > sizes[1] > sizes[2] == sizes[3] and masked.size == dense
    assert cut.losses == pytest.approx(masked.losses, abs=1e-10)
    reports = cut.pruner.finalize(), masked.pruner.finalize()
    assert reports[0] == reports[1]
    for name, value in masked.model.state_dict().items():
        assert torch.allclose(cut.model.state_dict()[name], value, rtol=0.0, atol=1e-6), name


def test_a_state_that_starts_anew_is_noticed() -> None:
    """The comparison above can tell sliced moments from lost ones."""
    cut, masked = Course("image", "sgd"), Course("image", "sgd", masked=True)
    cut.advance(6), masked.advance(6)
    cut.optimizer.inner.state.clear()
    cut.advance(), masked.advance()
    assert max(abs(a - b) for a, b in zip(cut.losses, masked.losses, strict=True)) > 1e-6


def test_moments_follow_their_units() -> None:
    run = Course("image", "adamw").advance(2)
    whole = dict(run.model.named_parameters())
    moments = {name: run.optimizer.state[p]["exp_avg"].clone() for name, p in whole.items()}
    groups = [group["params"] for group in run.optimizer.param_groups]
    run.pruner.shrink_now({name: torch.arange(len(keep)) % 2 == 0 for name, keep in run.pruner.plan.items()})
    after = dict(run.model.named_parameters())
    assert all(after[name] is parameter for name, parameter in whole.items())
    assert all(a is b for a, b in zip(groups, (g["params"] for g in run.optimizer.param_groups), strict=True))
    for name, parameter in after.items():
        plain = name.replace("parametrizations.", "").replace(".original", "")
        entries = kept_entries(run.pruner.graph.traced, run.pruner.plan).get(plain)
        expected = moments[name] if entries is None else moments[name][torch.meshgrid(*entries, indexing="ij")]
        assert torch.equal(run.optimizer.state[parameter]["exp_avg"], expected), name
        assert run.optimizer.state[parameter]["step"] == 2


def test_gone_units_never_come_back() -> None:
    run = Course("image", "sgd").advance(3)
    gone = {name: ~keep.clone() for name, keep in run.pruner.plan.items()}
    with torch.no_grad():  # whatever is left is worth nothing now
        for parameter in run.model.parameters():
            parameter.zero_()
    run.advance(5)
    assert any(keep.any() for keep in gone.values())
    assert not any((keep & gone[name]).any() for name, keep in run.pruner.plan.items())


def test_what_is_not_exact_is_cut_at_the_end_alone() -> None:
    """Groups under LayerNorm statistics are only masked before."""
    run = Course("text", "adamw", normalised=True).advance()
    (stream,) = [name for name, group in run.pruner.graph.groups.items() if group.normalised]
    gone, embedding = ~run.pruner.plan[stream], run.model.bert.embeddings.word_embeddings
    parameter = embedding.parametrizations.weight.original
    assert gone.sum() == 10 and parameter.shape[1] == 16
    assert not parameter[:, gone].any() and not run.optimizer.state[parameter]["exp_avg"][:, gone].any()
    run.pruner.finalize()
    assert embedding.weight.shape[1] == 6


def test_a_state_that_has_no_part_for_each_unit_stays_whole() -> None:
    model = tiny_text_model().train()
    pruner = Pruner(model, ShrinkingConfig(final_sparsity=0.5))
    pruner.attach()
    optimizer = pruner.wrap(torch.optim.Adafactor(model.parameters(), lr=1e-2))
    batch = {"input_ids": torch.randint(0, 40, (4, 6)), "labels": torch.tensor([0, 1, 2, 0])}
    with warnings.catch_warnings(record=True) as caught:
        for step in range(4):
            pruner.step(step, 4)
            optimizer.zero_grad()
            pruner.batch_loss(model, batch).backward()
            optimizer.step()
    assert ["Adafactor keeps 'row_var'" in str(each.message) for each in caught] == [True]
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 32
    pruner.finalize()
    assert model.bert.encoder.layer[0].intermediate.dense.out_features < 32


def test_checkpoints_of_any_width_load_into_a_run() -> None:
    """A narrow one into a fresh run, and a wide one into a narrow run."""
    early, late = (Course("image", "adamw").advance(to) for to in (2, 7))
    states = [copy.deepcopy([part.state_dict() for part in run.parts]) for run in (early, late)]
    early.advance(), late.advance()
    for saved, done, other in ((states[0], 2, late), (states[1], 7, Course("image", "adamw"))):
        for part, state in zip(other.parts, saved, strict=True):
            part.load_state_dict(state)
        other.losses = [0.0] * done
        other.advance()
        for name, value in early.model.state_dict().items():
            assert torch.equal(other.model.state_dict()[name], value), name


def test_methods_without_masks_refuse() -> None:
    pruner = Pruner(tiny_text_model(), MovementConfig(final_sparsity=0.5))
    pruner.attach()
    with pytest.raises(PruneError, match="no masks over dimension groups"):
        pruner.shrink_now()


def test_a_plan_that_does_not_fit_changes_nothing() -> None:
    run = Course("image", "sgd").advance(2)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    name, keep = next(iter(run.pruner.plan.items()))
    with pytest.raises(PruneError, match="the plan keeps 0"):
        run.pruner.shrink_now({name: torch.zeros_like(keep)})
    with pytest.raises(PruneError, match="bool tensor of shape"):
        run.pruner.shrink_now({name: keep[:-1]})
    with pytest.raises(PruneError, match="names 'nothing', which has no mask"):
        run.pruner.shrink_now({"nothing": keep})
    assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())


def test_a_cut_that_fails_leaves_the_run_going() -> None:
    run = Course("image", "sgd").advance(4)
    size, (name, keep) = run.size, next(iter(run.pruner.plan.items()))
    hook = run.model.resnet.register_forward_hook(lambda *_: None)
    with pytest.raises(PruneError, match="has hooks"):
        run.pruner.shrink_now({name: keep & (torch.arange(len(keep)) != keep.nonzero()[0])})
    hook.remove()
    assert run.size == size
    run.advance()
    assert run.size < size


def _rows(count: int = 32) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (count, 6), generator=generator)
    return Dataset.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3})


def _trainer(folder: Path, *callbacks: TrainerCallback, dropout: float = 0.1, **settings: Any) -> PruneTrainer:
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 8, "save_steps": 1, "learning_rate": 1e-2}
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **{**defaults, **settings}
    )
    model = tiny_text_model(hidden_dropout_prob=dropout)
    pruning = ShrinkingConfig(final_sparsity=0.6, end=0.75)
    own = {"train_dataset": _rows(), "eval_dataset": _rows(8), "callbacks": list(callbacks)}
    return PruneTrainer(model=model, args=arguments, pruning=pruning, **own)


class Widths(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.seen.append(sum(parameter.numel() for parameter in model.parameters()))


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resumed_training_is_bit_identical(tmp_path: Path, bf16: bool) -> None:
    widths = Widths()
    whole = _trainer(tmp_path, widths, bf16=bf16)
    whole.train()
    assert len(set(widths.seen)) == 4
    for step in (7,) if bf16 else (3, 8):
        resumed = _trainer(tmp_path, bf16=bf16)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        # `training` has the seconds that it took.
        assert replace(resumed.report, training={}) == replace(whole.report, training={})
        for name, value in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], value), (step, name)


def test_the_best_checkpoint_may_be_wider_than_the_last(tmp_path: Path) -> None:
    trainer = _trainer(
        tmp_path, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[trainer.state.best_global_step], abs=1e-6)


def test_compiled_models_stay_whole(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="stay in the model as zeros until the run ends: torch_compile"):
        trainer = _trainer(tmp_path, torch_compile=True)
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    trainer.pruner.shrink_now({name: torch.arange(len(k)) % 2 == 0 for name, k in trainer.pruner.plan.items()})
    assert sum(parameter.numel() for parameter in trainer.model.parameters()) == size
    assert trainer.pruner.sparsity > 0.4


def test_several_processes_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    run = Course("image", "sgd").advance(2)
    size = run.size
    with pytest.warns(UserWarning, match="several processes average gradients"):
        run.advance(4)
    assert run.size == size and run.pruner.sparsity > 0.0
