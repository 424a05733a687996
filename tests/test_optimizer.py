"""PruneOptimizer delegates to the inner optimizer, and does its own work around the step and nowhere else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_prune import PruneError, PruneOptimizer
from hf_prune.optimizer import StepRules, move_to_group


class Counter:
    """Something with state that is saved beside the optimizer."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def _pair(rules: StepRules | None = None, **arguments: object) -> tuple[nn.Linear, PruneOptimizer]:
    model = nn.Linear(3, 2)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, PruneOptimizer(inner, rules or StepRules(), **arguments)


def _backward(model: nn.Module, scale: float = 1.0) -> None:
    (scale * model(torch.ones(4, 3)).square().sum()).backward()


def test_without_rules_it_steps_like_the_inner_optimizer() -> None:
    model, optimizer = _pair()
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.1)
    for net, opt in ((model, optimizer), (twin, plain)):
        for _ in range(3):
            opt.zero_grad()
            _backward(net)
            opt.step()
    assert torch.equal(model.weight, twin.weight) and torch.equal(model.bias, twin.bias)


def test_groups_stay_shared_with_schedulers_after_loading() -> None:
    model, optimizer = _pair()
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    _backward(model)
    optimizer.step()
    scheduler.step()
    assert optimizer.inner.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.05


def test_state_round_trips_before_the_first_step_and_later() -> None:
    for steps in (0, 2):
        model, optimizer = _pair(saved={"counter": (counter := Counter())})
        for _ in range(steps):
            _backward(model)
            optimizer.step()
        counter.count = 7
        state = pickle.loads(pickle.dumps(optimizer.state_dict()))
        other_model, other = _pair(saved={"counter": (restored := Counter())})
        other_model.load_state_dict(model.state_dict())
        other.load_state_dict(state)
        assert restored.count == 7
        for net, opt in ((model, optimizer), (other_model, other)):
            opt.zero_grad()
            _backward(net)
            opt.step()
        assert torch.equal(model.weight, other_model.weight)


def test_state_of_another_run_is_refused() -> None:
    model, optimizer = _pair(saved={"counter": Counter()})
    with pytest.raises(PruneError, match="no pruning state"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    with pytest.raises(PruneError, match="another pruning state"):
        optimizer.load_state_dict(_pair()[1].state_dict())


def test_transform_sees_the_gradient_and_projection_the_result() -> None:
    seen: list[str] = []
    model = nn.Linear(3, 2)
    rules = StepRules(
        transforms={model.weight: lambda grad: seen.append("transform") or torch.zeros_like(grad)},
        projections=[lambda: seen.append("project") or model.bias.data.zero_()],
    )
    optimizer = PruneOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rules)
    before = model.weight.detach().clone()
    _backward(model)
    optimizer.step()
    assert seen == ["transform", "project"]
    assert torch.equal(model.weight, before) and not model.bias.any()


def test_frozen_parameters_neither_decay_nor_carry_momentum() -> None:
    model = nn.Linear(3, 2)
    frozen = {"now": False}
    rules = StepRules(trainable=lambda parameter: not (frozen["now"] and parameter is model.weight))
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer = PruneOptimizer(inner, rules)
    for frozen["now"] in (False, True):
        before = model.weight.detach().clone(), model.bias.detach().clone()
        optimizer.zero_grad()
        _backward(model)
        optimizer.step()
        assert torch.equal(model.weight, before[0]) == frozen["now"]
        assert not torch.equal(model.bias, before[1])


def test_rate_scale_holds_for_one_step_only() -> None:
    model = nn.Linear(3, 2)
    optimizer = PruneOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), StepRules(lr_scale=lambda: 0.5))
    _backward(model)
    expected = model.weight - 0.05 * model.weight.grad
    optimizer.step()
    assert torch.allclose(model.weight, expected)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_rates_are_put_back_where_the_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = _pair(StepRules(lr_scale=lambda: 0.5))[1]

    def fail() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(optimizer.inner, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_extra_optimizers_step_and_are_saved() -> None:
    model = nn.Linear(3, 2)
    inner = torch.optim.AdamW([model.weight], lr=0.1)
    optimizer = PruneOptimizer(inner, StepRules(), [torch.optim.SGD([model.bias], lr=0.1, momentum=0.9)])
    before = model.bias.detach().clone()
    _backward(model)
    optimizer.step()
    assert not torch.equal(model.bias, before)
    assert len(optimizer.param_groups) == 2 and set(optimizer.state) == {model.weight, model.bias}
    optimizer.zero_grad()
    assert model.bias.grad is None
    optimizer.load_state_dict(optimizer.state_dict())


def test_step_hooks_of_the_user_fire_and_pickling_works() -> None:
    model, optimizer = _pair()
    fired: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    _backward(model)
    optimizer.step()
    assert fired == ["pre", "post"]
    assert pickle.loads(pickle.dumps(optimizer)).param_groups[0]["lr"] == 0.1


def test_closure_is_evaluated_once_before_the_step() -> None:
    model, optimizer = _pair()
    calls: list[float] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().sum()
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    before = model.weight.detach().clone()
    assert float(optimizer.step(closure).detach()) == calls[0]
    assert len(calls) == 1 and not torch.equal(model.weight, before)


def test_gradients_are_unscaled_before_transforms_see_them() -> None:
    """Claiming the inner optimizer's own unscaling (fused AdamW has it) would show gradients times the loss scale."""
    model = nn.Linear(3, 2)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    seen: list[torch.Tensor] = []
    rules = StepRules(transforms={model.weight: lambda grad: seen.append(grad.clone()) or grad})
    optimizer = PruneOptimizer(inner, rules)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.ones(4, 3)).square().sum()).backward()
    scaler.step(optimizer)
    model.zero_grad()
    _backward(model)  # the weights have moved one step; the scale of the gradient has not
    assert 0.1 < (seen[0].norm() / model.weight.grad.norm()) < 10


def test_accelerate_wraps_it_and_skips_accumulated_steps() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = _pair(StepRules(projections=[(steps := []).append and (lambda: steps.append(1))]))
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(4, 3)).square().sum())
            optimizer.step()
            optimizer.zero_grad()
    assert len(steps) == 2


def test_optimizers_with_modes_are_switched() -> None:
    """Schedule-free optimizers keep other weights to evaluate than to train; Trainer calls `train` and `eval`."""
    switched: list[str] = []

    class ScheduleFree(torch.optim.SGD):
        def train(self) -> None:
            switched.append("train")

        def eval(self) -> None:
            switched.append("eval")

    model = nn.Linear(3, 2)
    inner, extra = ScheduleFree([model.weight], lr=0.1), torch.optim.SGD([model.bias], lr=0.1)
    optimizer = PruneOptimizer(inner, StepRules(), [extra])
    optimizer.train()
    optimizer.eval()
    assert switched == ["train", "eval"]


def test_wrapping_twice_is_refused() -> None:
    _, optimizer = _pair()
    with pytest.raises(PruneError, match="already wrapped"):
        PruneOptimizer(optimizer, StepRules())


def test_parameters_move_to_a_group_of_their_own() -> None:
    model = nn.Linear(3, 2)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    move_to_group(inner, [model.bias], lr=1.0, weight_decay=0.0)
    assert [len(group["params"]) for group in inner.param_groups] == [1, 1]
    assert inner.param_groups[1]["lr"] == 1.0 and inner.param_groups[1]["weight_decay"] == 0.0
