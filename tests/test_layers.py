"""Whole layers: which of them can go, that taking them out is exact, and that stock transformers opens what is left."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exactness import difference, even_plan, outputs
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, DPTConfig, DPTForDepthEstimation
from zoo import TEXT, ZOO, build, sharpen

import hf_prune
from hf_prune import MagnitudeConfig, PruneError
from hf_prune.graph import Graph, shrink, trace
from hf_prune.testing import aligned
from hf_prune.tiny_models import tiny_deep_model, tiny_image_model
from hf_prune.types import Plan

IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
VECTORS = {"x": torch.randn(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


class Block(nn.Module):
    """x + f(x), as pre-norm transformers have it; `relu` and `norm` put one over the sum."""

    def __init__(self, relu: bool = False, norm: bool = False, gain: float = 0.0) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(12), nn.Linear(12, 16), nn.Linear(16, 12)
        self.relu, self.gain, self.last = relu, gain, nn.LayerNorm(12) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.outer(F.gelu(self.inner(self.norm(x)))) + self.gain
        return F.relu(x) if self.relu else self.last(x)


class Net(nn.Module):
    """A stack between two linear layers."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(12, 12), nn.ModuleList(blocks), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Skipping(Net):
    """Its head also reads what the layer before the last one gave."""

    def forward(self, x: Tensor) -> Tensor:
        states = [self.stem(x)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return self.head(states[-1] - 2 * states[-2])


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.blocks[0](self.stem(x)))


class Between(Net):
    """Something happens between its layers."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x.tanh())
        return self.head(x)


def _graph(net: nn.Module) -> Graph:
    return trace(net.double().eval(), VECTORS)


def _places(graph: Graph) -> dict[str, list[int]]:
    return {name: [layer.index for layer in stack.layers] for name, stack in graph.stacks.items()}


def _check_exact(model: nn.Module, graph: Graph, plan: Plan, tolerance: float) -> None:
    masked, before = copy.deepcopy(model), outputs(model, graph.inputs)
    for name, keep in plan.items():
        for layer, stays in zip(graph.stacks[name].layers, keep.tolist(), strict=True):
            for parameter in layer.parameters if not stays else ():
                nn.init.zeros_(masked.get_parameter(parameter))
    shrink(model, graph, plan)
    wanted = outputs(masked, graph.inputs)
    assert difference(before, wanted) > 1e-6, "masking changed nothing"
    assert difference(wanted, outputs(model, graph.inputs)) <= tolerance


def test_residual_layers_can_go_and_nothing_else_changes() -> None:
    net = Net(Block(), Block(), Block())
    graph = _graph(net)
    assert _places(graph) == {"blocks": [0, 1, 2]}
    assert not graph.stacks["blocks"].normalised
    last = net.blocks[2]
    _check_exact(net, graph, {"blocks": torch.tensor([True, False, True])}, 1e-12)
    assert list(net.blocks)[1] is last


def test_layers_with_a_norm_over_their_sum_are_marked() -> None:
    assert _graph(Net(Block(norm=True), Block(norm=True))).stacks["blocks"].normalised


def test_a_relu_over_the_sum_needs_one_before_it() -> None:
    graph = _graph(Net(Block(relu=True), Block(relu=True), Block(), Block(relu=True)))
    assert _places(graph) == {"blocks": [1, 2]}
    assert "may be negative" in graph.stacks["blocks"].frozen[3]


@pytest.mark.parametrize(
    ("net", "left"),
    [
        (Net(nn.Linear(12, 12), nn.Linear(12, 12)), {}),
        (Net(Block(gain=0.5), Block()), {"blocks": [1]}),
        (Net(nn.Linear(12, 12), Block(), Block()), {"blocks": [1, 2]}),
        (Skipping(Block(), Block()), {"blocks": [0]}),
        (Twice(Block(), Block()), {"blocks": [1]}),
        (Between(Block(), Block()), {}),
    ],
)
def test_layers_that_do_more_than_add_stay(net: nn.Module, left: dict[str, list[int]]) -> None:
    assert _places(_graph(net)) == left


def test_a_layer_whose_weights_another_module_has_stays() -> None:
    net = Net(Block(), Block())
    net.blocks[0].outer.bias = net.stem.bias
    assert _places(_graph(net)) == {"blocks": [1]}


def test_looking_for_layers_leaves_the_model_alone() -> None:
    model = tiny_deep_model().train()
    before = copy.deepcopy(model)
    assert _places(trace(model, IMAGES)) == {"vit.layers": [0, 1, 2, 3]}
    assert model.training
    assert model.config.to_dict() == before.config.to_dict()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_price_of_a_plan_is_that_of_the_shorter_model() -> None:
    model = tiny_deep_model().eval()
    graph = trace(model, IMAGES)
    plan = {"vit.layers": torch.tensor([True, False, False, True])}
    price = graph.price(plan)
    shrink(model, graph, plan)
    assert price == trace(model, IMAGES).price()


QUICK = ("ViTForImageClassification", "SwinForImageClassification", "LlamaForSequenceClassification")
UNOPENED = {"RwkvForCausalLM": "transformers divides by the number of layers less one, and one is left here"}


def _entries() -> Iterator[object]:
    return (pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ZOO)


@pytest.mark.parametrize("name", list(_entries()))
def test_every_model_without_layers_is_an_ordinary_one(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    outputs(model, inputs)  # some models change when they first run
    graph = trace(model, inputs)
    plan = {each.name: torch.arange(len(each.layers)) % 2 == 1 for each in graph.stacks.values()}
    if not plan:
        pytest.skip(f"no layers of {name} can go")
    if any(graph.stacks[each].normalised for each in plan):
        shrink(model, graph, plan)
    else:
        _check_exact(model, graph, plan, TOLERANCE[ZOO[name].exact_dtype])
    if name in UNOPENED:
        return
    model.float()
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    wanted = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    found = outputs(aligned(type(model).from_pretrained(tmp_path).eval()), inputs)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.slow
def test_most_models_of_the_zoo_have_layers_that_can_go() -> None:
    found = {}
    for name, entry in ZOO.items():
        if entry.needs is None:
            model, inputs = build(name)
            found[name] = len(trace(model, inputs).stacks)
    assert sum(map(bool, found.values())) >= 90, sorted(name for name, count in found.items() if not count)


def test_generation_goes_on_without_layers() -> None:
    model, inputs = build("LlamaForCausalLM", torch.float32)
    prompt = inputs["input_ids"][:, :5]
    shrink(model, (graph := trace(model, inputs)), {"model.layers": torch.tensor([False, True])})
    cached = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False))
    assert model.model.layers[0].self_attn.layer_idx == 0
    assert graph.stacks["model.layers"].size == 2


def test_heads_that_read_certain_layers_keep_them() -> None:
    backbone = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    neck = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "reassemble_factors": [4, 2, 1, 0.5]}
    more = {"image_size": 32, "patch_size": 8, "backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False}
    model = DPTForDepthEstimation(DPTConfig(**backbone, **neck, **more)).eval()
    sharpen(model)
    assert trace(model, {"pixel_values": torch.randn(2, 3, 32, 32)}).stacks == {}


@pytest.mark.parametrize("order", ["groups first", "layers first"])
def test_layers_and_groups_one_after_the_other(order: str, tmp_path: Path) -> None:
    model = tiny_deep_model().eval()
    configs = [
        MagnitudeConfig(target_params=0.7),
        MagnitudeConfig(target_units=0.5, structure="layer"),
    ]
    for config in configs if order == "groups first" else reversed(configs):
        hf_prune.prune(model, config, IMAGES)
    assert len(model.vit.layers) == model.config.num_hidden_layers == 2
    wanted = outputs(model, IMAGES)
    for save in (model.save_pretrained, lambda folder: hf_prune.save_pretrained(model, folder)):
        save(tmp_path)
        loaded = aligned(type(model).from_pretrained(tmp_path).eval())
        assert torch.equal(outputs(loaded, IMAGES)[0], wanted[0])
    second = trace(loaded, IMAGES)
    shrink(loaded, second, even_plan(second.groups.values(), 0.3))


def test_magnitude_drops_the_layers_of_the_smallest_weights() -> None:
    model = tiny_deep_model()
    with torch.no_grad():
        for parameter in model.vit.layers[1].parameters():
            parameter.mul_(0.1)
    wanted = [model.vit.layers[index] for index in (0, 2, 3)]
    _, report = hf_prune.prune(model, MagnitudeConfig(target_units=0.75, structure="layer"), IMAGES)
    assert list(model.vit.layers) == wanted
    assert report.layers["vit.layers"] == {
        "structure": "LayerUnits",
        "units": 4,
        "kept": 3,
        "role": "layers",
        "indices": [0, 2, 3],
    }
    assert report.sparsity == pytest.approx(0.25)


@pytest.mark.parametrize(("goal", "price"), [("target_flops", "multiply_adds"), ("target_params", "parameters")])
def test_a_price_is_met_by_whole_layers(goal: str, price: str) -> None:
    model = tiny_deep_model()
    _, report = hf_prune.prune(model, MagnitudeConfig(**{goal: 0.6}, structure="layer"), IMAGES)
    kept = report.prices[price]["kept"]
    assert kept <= 0.6 * report.prices[price]["dense"]
    assert getattr(trace(model, IMAGES).price(), price) == kept


def test_a_stack_that_keeps_its_first_layer_reports_places() -> None:
    model = tiny_image_model(depths=[1, 4])
    _, report = hf_prune.prune(model, MagnitudeConfig(target_units=0.34, structure="layer"), IMAGES)
    (layer,) = report.layers.values()
    assert (layer["units"], layer["kept"], layer["indices"][0], len(layer["indices"])) == (3, 1, 0, 2)
    assert model.config.depths == [1, 2]


def _bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**TEXT))


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (_bert, {}, "normalised_groups=True takes them"),
        (tiny_image_model, {}, "no stack of layers is left"),
        (tiny_deep_model, {"include": ("bert.*",)}, "no stack of layers is left"),
        (tiny_deep_model, {"target_units": None, "target_params": 0.01}, "cannot be reached"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_the_model(model, config, message) -> None:
    built = model()
    inputs = {"input_ids": torch.ones(2, 7, dtype=torch.long)} if model is _bert else IMAGES
    before = copy.deepcopy(built.state_dict())
    with pytest.raises(PruneError, match=message):
        hf_prune.prune(built, MagnitudeConfig(**{"target_units": 0.5, "structure": "layer", **config}), inputs)
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


def test_layers_under_post_norm_go_where_asked_for() -> None:
    model = _bert()
    inputs = {"input_ids": torch.ones(2, 7, dtype=torch.long)}
    config = MagnitudeConfig(target_units=0.5, structure="layer", normalised_groups=True)
    hf_prune.prune(model, config, inputs)
    assert len(model.bert.encoder.layer) == model.config.num_hidden_layers == 1


@pytest.mark.parametrize("goal", [{"final_sparsity": 0.5}, {"target_latency": 0.5}])
def test_goals_that_do_not_count_layers_are_refused(goal: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="whole layers"):
        MagnitudeConfig(**goal, structure="layer")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"vit.layers": torch.ones(3, dtype=torch.bool)}, r"shape \(4,\)"),
        ({"vit.layers": torch.ones(4)}, "bool tensor"),
        ({"vit.layers": torch.zeros(4, dtype=torch.bool)}, "at least 1 must stay"),
        ({"vit.layers": torch.ones(4, dtype=torch.bool), "vit.layers.0.mlp.fc1": torch.ones(24) > 0}, "vit.layers"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan: Plan, message: str) -> None:
    model = tiny_deep_model()
    with pytest.raises(PruneError, match=message):
        shrink(model, trace(model, IMAGES), plan)
    assert len(model.vit.layers) == model.config.num_hidden_layers == 4


def test_layers_of_a_model_on_meta_are_refused() -> None:
    with torch.device("meta"):
        model = tiny_deep_model()
    graph = trace(model, IMAGES)
    with pytest.raises(PruneError, match="meta device"):
        graph.stacks  # noqa: B018
