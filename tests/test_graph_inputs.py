"""Models and inputs as people have them: wrapped, compiled, offloaded, in half precision, with hooks, with batches of
any kind. Either it works as on a plain model, or a clear error comes and the model is untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from exactness import check_exact, even_plan, outputs
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel
from zoo import build

import hf_prune
from hf_prune import MagnitudeConfig
from hf_prune.graph import shrink, trace
from hf_prune.types import PruneError

Case = tuple[PreTrainedModel, dict[str, Tensor]]
FFN = "bert.encoder.layer.0.intermediate.dense"


@pytest.fixture
def bert() -> Case:
    return build("BertForSequenceClassification", torch.float32)


def halve(model: nn.Module, inputs: Any) -> set[str]:
    """Names of the groups, after half of each was removed and the model ran."""
    graph = trace(model, inputs)
    shrink(model, graph, even_plan(graph.groups.values(), 0.5))
    return set(graph.groups)


GROUPS = 8
"""What BERT with two layers has: the stream, heads, widths and neurons of each layer, and the pooler."""


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays(bert: Case, training: bool) -> None:
    model, inputs = bert
    model.train(training)
    assert len(halve(model, inputs)) == GROUPS
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, inputs = build("BertForSequenceClassification", dtype)
    assert len(halve(model, inputs)) == GROUPS
    assert model.dtype == dtype and outputs(model, inputs)[0].isfinite().all()


def test_gradients_and_checkpointing(bert: Case) -> None:
    model, inputs = bert
    model(**inputs).logits.sum().backward()
    model.gradient_checkpointing_enable()
    model.train()
    assert len(halve(model, inputs)) == GROUPS
    assert model.get_submodule(FFN).weight.grad is None
    model(**inputs).logits.sum().backward()
    assert model.get_submodule(FFN).weight.grad.shape == (64, 32)


INPUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "one sample": lambda inputs: {name: value[:1] for name, value in inputs.items()},
    "one token": lambda inputs: {name: value[:1, :1] for name, value in inputs.items()},
    "sizes of the model": lambda _: {"input_ids": torch.randint(5, 90, (4, 16))},
    "hidden size": lambda _: {"input_ids": torch.randint(5, 90, (64, 64))},
    "tokenizer": lambda inputs: BatchEncoding(dict(inputs)),
    "positions": lambda inputs: tuple(inputs.values()),
    "list": lambda inputs: list(inputs.values()),
    "tensor": lambda inputs: inputs["input_ids"],
    "labels": lambda inputs: {**inputs, "labels": torch.tensor([0, 1])},
    "flags": lambda inputs: {**inputs, "return_dict": True, "output_attentions": False},
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_many_kinds(bert: Case, kind: str) -> None:
    model, inputs = bert
    assert len(halve(model, INPUTS[kind](inputs))) == GROUPS
    assert outputs(model, inputs)[0].shape == (2, 10)


def test_a_tokenizers_batch_prices_its_samples(bert: Case) -> None:
    model, inputs = bert
    graph = trace(model, BatchEncoding(dict(inputs)))
    assert graph.price() == trace(model, inputs).price()
    _, report = hf_prune.prune(model, MagnitudeConfig(target_flops=0.8), BatchEncoding(dict(inputs)))
    assert report.sparsity > 0


def test_images_one_at_a_time() -> None:
    model, inputs = build("ResNetForImageClassification", torch.float32)
    graph = trace(model, inputs)
    assert trace(model, {name: value[:1] for name, value in inputs.items()}).groups == graph.groups


BAD_INPUTS: dict[str, tuple[Any, str]] = {
    "wrong name": ({"pixel_values": torch.zeros(2, 3, 4, 4)}, "could not be traced"),
    "nothing": ({}, "could not be traced"),
    "wrong rank": ({"input_ids": torch.zeros(2, 2, 2, dtype=torch.long)}, "could not be traced"),
    "no inputs": ("a sentence", "example_inputs must be"),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_wrong_inputs(bert: Case, kind: str) -> None:
    model, _ = bert
    inputs, message = BAD_INPUTS[kind]
    with untouched(model), pytest.raises(PruneError, match=message):
        hf_prune.prune(model, MagnitudeConfig(target_params=0.8), inputs or {"attention_mask": torch.ones(2, 2)})


class untouched:  # noqa: N801
    """Afterwards the model has every tensor and module attribute that it had before."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.tensors = copy.deepcopy(self.model.state_dict())
        self.attributes = self._attributes()

    def _attributes(self) -> dict[str, dict[str, Any]]:
        modules = self.model.named_modules()
        return {path: {k: v for k, v in vars(m).items() if not k.startswith("_")} for path, m in modules}

    def __exit__(self, *_: Any) -> None:
        after = self.model.state_dict()
        assert after.keys() == self.tensors.keys()
        assert all(torch.equal(tensor, self.tensors[name]) for name, tensor in after.items() if not tensor.is_meta)
        assert self._attributes() == self.attributes


def wrap(kind: str, model: nn.Module) -> nn.Module:
    layer = model.get_submodule(FFN)
    if kind == "compiled":
        return torch.compile(model)
    if kind == "parallel":
        return nn.DataParallel(model)
    if kind == "offloaded":
        cpu_offload(model)
    elif kind == "forward hook":
        layer.register_forward_hook(lambda *_: None)
    elif kind == "backward hook":
        layer.register_full_backward_hook(lambda *_: None)
    elif kind == "gradient hook":
        layer.weight.register_hook(lambda gradient: gradient)
    elif kind == "quantized":
        model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


REFUSED = {
    "compiled": "Pass model._orig_mod",
    "parallel": "Pass model.module",
    "offloaded": "offloaded by accelerate",
    "forward hook": "has hooks",
    "backward hook": "has hooks",
    "gradient hook": "gradient hook",
    "quantized": "prune and save before quantizing",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(bert: Case, kind: str) -> None:
    model, inputs = bert
    wrapped = wrap(kind, model)
    with untouched(model), pytest.raises(PruneError, match=REFUSED[kind]):
        hf_prune.prune(wrapped, MagnitudeConfig(target_params=0.8), inputs)


def test_compiled_in_place(bert: Case) -> None:
    """`model.compile()` stays, and compiles again when it is called."""
    model, inputs = bert
    model.compile(backend="eager")
    assert len(halve(model, inputs)) == GROUPS
    assert model._compiled_call_impl is not None
    assert model(**inputs).logits.shape == (2, 10)


def test_placed_by_accelerate(bert: Case) -> None:
    model, inputs = bert
    add_hook_to_module(model.bert.encoder.layer[0], AlignDevicesHook(execution_device="cpu"))
    assert len(halve(model, inputs)) == GROUPS
    assert outputs(model, inputs)[0].shape == (2, 10)


class Positions(nn.Module):
    """A table of positions from a cache, as DETR and its kin have."""

    @staticmethod
    @lru_cache
    def table(length: int, width: int) -> Tensor:
        return torch.arange(length).view(-1, 1) / torch.arange(1, width + 1)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(self.a(x) + self.table(x.shape[1], 8))))


def test_results_that_code_caches() -> None:
    """A cached table neither hides what it is made of nor keeps what only a trace has made."""
    model, inputs = Positions(), {"x": torch.randn(2, 7, 5)}
    wanted = outputs(model, inputs)
    for _ in range(2):
        graph = trace(model, inputs)
        assert graph.groups.keys() == {"b"} and "counted" in graph.frozen["a.weight[0]"].frozen
    assert torch.equal(outputs(model, inputs)[0], wanted[0])
    shrink(model, graph, even_plan(graph.groups.values(), 0.5))
    assert outputs(model, inputs)[0].shape == (2, 7, 3)


class NumpyScale(nn.Module):
    """Takes the root of a width with numpy, which does not ask an int for its float."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x).view(-1, self.width) / float(np.sqrt(self.width))))


def test_a_scale_by_numpy_is_kept() -> None:
    graph = check_exact(NumpyScale(), {"x": torch.randn(2, 5)}, 1e-5)
    assert graph.groups.keys() == {"a"} and len(graph.flow.scales) == 1


class Stride(nn.Module):
    """Writes several steps at once, and cuts or pads them to the length of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.a, self.b = nn.Linear(5, 2 * 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.a(x[:, ::2]).view(len(x), -1, self.width)
        if steps.shape[1] < x.shape[1]:
            steps = nn.functional.pad(steps, (0, 0, 0, x.shape[1] - steps.shape[1]))
        return self.b(torch.tanh(steps)).mean(1)


def test_what_code_compares_by_size_stays() -> None:
    graph = check_exact(Stride(), {"x": torch.randn(3, 6, 5)}, 1e-5)
    assert [(group.size, group.name) for group in graph.groups.values()] == [(8, "a.neurons")]


class Widths(nn.Module):
    """Projects its input where two sizes differ, one of which is used for nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.old, self.new = 4, 8
        self.first, self.skip, self.b, self.last = nn.Linear(5, 4), nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        skip = self.skip(x) if self.old != self.new else x
        return self.last(torch.tanh(skip.view(-1, self.new) + self.b(x)))


def test_sizes_that_differ_go_on_to_differ() -> None:
    model, inputs = Widths(), {"x": torch.randn(2, 5)}
    graph = trace(model, inputs)
    groups = [group for group in graph.groups.values() if group.size == 8]
    table = shrink(model, graph, even_plan(groups, 0.5))
    assert table.attributes[""] == {"new": 4, "old": 3}
    assert outputs(model, inputs)[0].shape == (2, 3)


class Routed(nn.Module):
    """Half of the rows go through each expert; which do depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.experts, self.b = (
            nn.Linear(5, 8),
            nn.ModuleList(nn.Linear(8, 8) for _ in range(4)),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        chosen = x.sum(1).argsort() % 4
        result = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            places = (chosen == number).nonzero().flatten()
            result = result.index_add(0, places, self.experts[number](x[places]))
        return self.b(result)


def test_experts_chosen_by_data() -> None:
    graph = check_exact(Routed(), {"x": torch.randn(7, 5)}, 1e-5)
    assert graph.flow.trace.real and [group.size for group in graph.groups.values()] == [8]
