"""Gates on output channels: they change nothing when new, compute what they say, and fold away exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from gated_models import IMAGES, MODELS, answer, inputs_of, scramble
from torch import Tensor, nn

from hf_prune import PruneError
from hf_prune.graph import shrink, trace
from hf_prune.parts.channel_gates import ChannelFunction, ChannelGate, ChannelScale, channel_targets
from hf_prune.tiny_models import tiny_image_model


def _gates(model: nn.Module, inputs: dict[str, Tensor], residual: bool, each: bool) -> list[ChannelGate[ChannelScale]]:
    """A scale behind every layer: `each` layer its own, or one for all layers of a width."""
    gates = []
    for target in channel_targets(model, trace(model, inputs), include=(), exclude=(), residual=residual):
        count = len(target.writers) if each else 1
        like = next(model.parameters())
        gates.append(ChannelGate(target, [ChannelScale(target.units.units, like) for _ in range(count)]))
    for gate in gates:
        gate.insert(model)
    return gates


def _move(gates: list[ChannelGate[ChannelScale]]) -> dict[str, Tensor]:
    """Scales as training may leave them, one of them negative, and a plan; gives the plan."""
    for gate in gates:
        keep = torch.rand(len(gate.keep())) > 0.4
        keep[0] = True
        gate.set_keep(keep)
        for function in gate.functions:
            nn.init.uniform_(function.scale, 0.2, 1.8)
            function.scale.data[0] *= -1
    return {gate.name: gate.keep().clone() for gate in gates}


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_scales_are_one_when_new_and_fold_exactly(name: str, each: bool) -> None:
    make, residual, count = MODELS[name]
    model, inputs = scramble(make()).double(), inputs_of(name, torch.float64)
    plain, kinds, names = answer(model, inputs), [type(m) for m in model.modules()], model.state_dict().keys()
    graph = trace(model, inputs)
    gates = _gates(model, inputs, residual, each)
    assert len(gates) >= count and torch.equal(answer(model, inputs), plain)
    own = {name: value for name, value in model.state_dict().items() if ".gates." not in name}
    assert own.keys() == names, "the layers' tensors keep their names"

    plan = _move(gates)
    scaled = answer(model, inputs)
    assert (scaled - plain).abs().max() > 1e-3 * plain.abs().max()
    for gate in gates:
        gate.fold(model)
        gate.fold(model)  # a second time does nothing
    assert model.state_dict().keys() == names and [type(m) for m in model.modules()] == kinds
    assert (answer(model, inputs) - scaled).abs().max() <= 1e-9 * scaled.abs().max()
    shrink(model, graph, plan)
    assert (answer(model, inputs) - scaled).abs().max() <= 1e-9 * scaled.abs().max()


def test_folding_a_scale_into_a_norm_leaves_the_layer_and_the_statistics_alone() -> None:
    model = scramble(tiny_image_model())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gates = _gates(model, IMAGES, False, False)
    for gate in gates:
        nn.init.uniform_(gate.function.scale, 0.2, 1.8)
        gate.fold(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    hosts = {writer.host for gate in gates for writer in gate.writers}
    assert changed == {f"{host}.{tensor}" for host in hosts for tensor in ("weight", "bias")}


def test_layers_of_a_stream_share_a_function_or_have_their_own_under_one_plan() -> None:
    shared = _gates(tiny_image_model(), IMAGES, True, False)
    own = _gates(tiny_image_model(), IMAGES, True, True)
    for one, several in zip(shared, own, strict=True):
        assert len(list(one.parameters())) == 1 and len(list(several.parameters())) == len(several.writers)
    stream = max(own, key=lambda gate: len(gate.writers))
    stream.set_keep(torch.arange(8) < 3)
    assert len(stream.functions) > 1 and all(int(f.factor().count_nonzero()) == 3 for f in stream.functions)
    assert int(stream.keep().sum()) == 3


def test_folding_a_copy_leaves_the_original_gated() -> None:
    model = scramble(tiny_image_model())
    gates = _gates(model, IMAGES, True, True)
    _move(gates)
    before = answer(model, IMAGES)
    copied = copy.deepcopy(model)
    for gate in gates:
        gate.fold(copied)
    assert (answer(copied, IMAGES) - before).abs().max() < 1e-5
    assert torch.equal(answer(model, IMAGES), before) and copied.state_dict().keys() < model.state_dict().keys()
    with torch.no_grad():
        gates[0].function.scale.mul_(2.0)
    assert not torch.equal(answer(model, IMAGES), before), "the original still goes through its own functions"


def test_a_function_learns_through_every_layer_that_shares_it() -> None:
    model = tiny_image_model()
    gates = _gates(model, IMAGES, True, False)
    model(**IMAGES).logits.square().sum().backward()
    assert all(gate.function.scale.grad.any() for gate in gates)
    host = model.get_submodule(gates[0].writers[0].host)
    assert (
        host.gates is gates[0].function and model.get_parameter(f"{gates[0].writers[0].host}.gates.scale") is not None
    )


def test_functions_without_a_factor_and_models_without_targets_say_so() -> None:
    with pytest.raises(NotImplementedError, match="ChannelFunction must say"):
        ChannelFunction(3, torch.zeros(())).factor()
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.raises(PruneError, match="can carry a gate"):
        channel_targets(model, trace(model, (torch.randn(5, 3),)), include=(), exclude=(), residual=False)
