"""Streamed statistics: any split into batches or processes gives the same numbers, and nothing stays in the model."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments

import hf_prune
from hf_prune import PruneError, Pruner, PruneTrainer
from hf_prune.methods import magnitude
from hf_prune.parts import schedules, statistics
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.statistics import Calibration, Point, RunningMean, gather
from hf_prune.tiny_models import tiny_text_model

REDUCERS = [statistics.mean, statistics.second_moment, statistics.active, statistics.moments]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.drop(self.conv(pixel_values)).mean((2, 3)))


IMAGES = torch.randn(10, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def _batches(*sizes: int) -> list[dict[str, Tensor]]:
    return [{"pixel_values": part} for part in IMAGES[: sum(sizes)].split(sizes)]


def _points() -> dict[str, Point]:
    points = {reduce.__name__: Point("conv", reduce) for reduce in REDUCERS}
    return {**points, "taken in": Point("head", statistics.mean, taken_in=True)}


def test_numbers_against_one_pass_over_everything() -> None:
    net = Net().eval()
    found = gather(net, _batches(4, 4, 2), _points())
    with torch.no_grad():
        flat = net.conv(IMAGES).movedim(1, -1).flatten(0, -2).double()
    assert torch.allclose(found["mean"], flat.mean(0))
    assert torch.allclose(found["second_moment"], flat.square().mean(0))
    assert torch.allclose(found["active"], (flat > 0).double().mean(0))
    means, covariance = statistics.mean_and_covariance(found["moments"])
    assert torch.allclose(means, flat.mean(0))
    assert torch.allclose(covariance, flat.T.cov(correction=0))
    assert torch.allclose(found["taken in"], flat.view(10, -1, 3).mean((0, 1)))


@pytest.mark.parametrize("sizes", [(10,), (5, 5), (1, 9), (3, 3, 3, 1)])
def test_any_split_gives_the_same(sizes: tuple[int, ...]) -> None:
    net = Net().eval()
    whole, split = (gather(net, _batches(*each), _points()) for each in ((10,), sizes))
    for name, value in whole.items():
        assert value.dtype == torch.float64
        assert (value - split[name]).abs().max() <= 1e-6, name


def test_half_precision_does_not_accumulate_in_half_precision() -> None:
    values = torch.full((4096, 1), 0.1, dtype=torch.bfloat16)
    running = RunningMean(statistics.mean)
    for part in values.split(64):
        running.update(part)
    assert running.result().item() == pytest.approx(values[0].item(), abs=1e-9)


def test_padding_is_not_observed() -> None:
    model = tiny_text_model().eval()
    ids, mask = torch.randint(0, 40, (2, 6)), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    layer = "bert.encoder.layer.0.intermediate.dense"
    found = gather(model, [{"input_ids": ids, "attention_mask": mask}], {"x": Point(layer, statistics.mean)})["x"]
    outputs: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *taken: outputs.append(taken[-1]))
    model(input_ids=ids, attention_mask=mask)
    handle.remove()
    valid = torch.cat([outputs[0][0], outputs[0][1, :2]]).double()
    assert torch.allclose(found, valid.mean(0), atol=1e-7)


def test_hooks_are_gone_also_after_an_error() -> None:
    net = Net()
    with pytest.raises(RuntimeError, match="channels"):
        gather(net, [{"pixel_values": torch.zeros(1, 5, 6, 6)}], _points())
    assert not any(module._forward_hooks for module in net.modules())


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    found = gather(Net().eval(), _batches(4, 6)[rank : rank + 1], _points())
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_sum_their_shares(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    torch.manual_seed(0)
    alone = gather(Net().eval(), _batches(10), _points())
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"{rank}.pt").items():
            assert (value - alone[name]).abs().max() <= 1e-6, name


@dataclass(frozen=True)
class MeasuredConfig(magnitude.MagnitudeConfig):
    """Magnitude of weights, counting how often it was asked."""

    method = "measured"


ASKED: list[dict[str, Any]] = []


def _build(model: nn.Module, graph: Any, config: MeasuredConfig) -> Recipe:
    recipe = magnitude.build(model, graph, config)
    scores, recipe.scores = recipe.scores, None

    def measured(calibration: Calibration) -> Mapping[str, Tensor]:
        batches = list(calibration.batches(2))
        ASKED.append({"batches": batches, "training": model.training, "draw": torch.rand(())})
        return scores()

    recipe.measured_scores = measured
    recipe.schedule = schedules.staircase(config.begin, config.end, 3)
    return recipe


@pytest.fixture
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("measured_method")
    for name in ("PAPER", "NEEDS_TRAINING", "GOALS"):
        setattr(module, name, getattr(magnitude, name))
    module.Config, module.build = MeasuredConfig, _build
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(hf_prune.methods.METHODS, "measured", module.__name__)
    ASKED.clear()


CONFIG = MeasuredConfig(final_sparsity=0.6, begin=0.2, end=0.6)


@pytest.mark.usefixtures("_measured")
def test_methods_that_need_data_say_so_and_leave_the_model_alone() -> None:
    model = tiny_text_model()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(PruneError, match="'measured' with these settings measures its scores on data"):
        hf_prune.prune(model, CONFIG)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.usefixtures("_measured")
@pytest.mark.parametrize("data", [[], iter([])])
def test_no_batches_are_an_error(data: Any) -> None:
    with pytest.raises(PruneError, match="no batch"):
        hf_prune.prune(tiny_text_model(), CONFIG, data=data)


@pytest.mark.usefixtures("_measured")
def test_scores_are_measured_once_for_each_rise_of_the_schedule() -> None:
    model = tiny_text_model().train()
    data = [{"input_ids": torch.full((2, 4), number)} for number in range(5)]
    pruner = Pruner(model, CONFIG, data=data)
    pruner.attach()
    state = torch.get_rng_state()
    sparsities = []
    for step in range(11):
        pruner.step(step, 10)
        sparsities.append(round(pruner.sparsity, 2))
    assert sparsities == [0.0, 0.0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.6, 0.6, 0.6]
    assert len(ASKED) == 3
    assert not any(look["training"] for look in ASKED) and model.training and model.bert.training
    assert torch.equal(torch.get_rng_state(), state)
    assert [int(batch["input_ids"][0, 0]) for batch in ASKED[0]["batches"]] == [0, 1]


@pytest.mark.usefixtures("_measured")
def test_trainer_gives_its_training_rows_the_same_at_every_look(tmp_path: Path) -> None:
    ids = torch.arange(64)[:, None].expand(64, 6) % 40
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3})
    settings = {"max_steps": 6, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    losses = []
    for config in (CONFIG, magnitude.MagnitudeConfig(**vars(CONFIG))):
        arguments = TrainingArguments(str(tmp_path), logging_steps=1, **settings)
        trainer = PruneTrainer(model=tiny_text_model(), args=arguments, train_dataset=rows, pruning=config)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(ASKED) == 3
    looks = [torch.cat([batch["input_ids"][:, 0] for batch in look["batches"]]) for look in ASKED]
    assert all(torch.equal(look, looks[0]) for look in looks) and "labels" in ASKED[0]["batches"][0]
    assert not torch.equal(looks[0], looks[0].sort().values)
    assert losses[0][0] == losses[1][0], "looking at the data changed the order in which the run reads it"


def test_data_does_not_go_with_training() -> None:
    with pytest.raises(PruneError, match="leave data= out"):
        hf_prune.prune(tiny_text_model(), magnitude.MagnitudeConfig(final_sparsity=0.5), data=[], args=None)
