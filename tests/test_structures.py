"""How weights divide into units: `view` and `expand` agree for every structure, and the right layers are chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from hf_prune import PruneError
from hf_prune.graph import unit_indices
from hf_prune.parts import structures
from hf_prune.parts.prunable import prunable_weights
from hf_prune.parts.structures import Blocks, Elements, GroupUnits, Slices
from hf_prune.tiny_models import tiny_image_model, tiny_text_model
from hf_prune.types import Group, Member, Structure


def _group(size: int, *members: Member, **shapes: tuple[int, ...]) -> GroupUnits:
    return GroupUnits(Group("group", size, members), tuple(shapes.items()))


STRUCTURES: dict[str, Structure] = {
    "elements": Elements("w", (3, 4)),
    "conv elements": Elements("w", (4, 2, 3, 3)),
    "blocks": Blocks("w", (4, 6), (2, 3)),
    "conv blocks": Blocks("w", (4, 2, 3, 3), (2, 9)),
    "rows": Slices("w", (3, 4), 0),
    "columns": Slices("w", (3, 4), 1),
    "conv rows": Slices("w", (4, 2, 3, 3), 0),
    "conv columns": Slices("w", (4, 2, 3, 3), 1),
    "neuron": _group(
        4, Member("up", 0), Member("bias", 0), Member("down", 1, reads=True), up=(4, 3), bias=(4,), down=(3, 4)
    ),
    "heads of width 3": _group(2, Member("w", 0, inner=3), w=(6, 5)),
    "head width in 3 heads": _group(2, Member("w", 1, outer=3), w=(5, 6)),
    "channels that a linear layer reads": _group(
        3, Member("conv", 0), Member("w", 1, inner=4), conv=(3, 2, 1, 1), w=(2, 12)
    ),
    "both halves of a gated projection": _group(2, Member("w", 0), Member("w", 0, start=2), w=(4, 3)),
    "value heads in a fused projection": _group(2, Member("w", 0, inner=2, start=8, pitch=4), w=(12, 3)),
    "head width in each part of a fused projection": _group(2, Member("w", 0, outer=2, start=1, pitch=5), w=(10, 3)),
    "rows and columns of one square weight": _group(3, Member("w", 0), Member("w", 1, reads=True), w=(3, 3)),
}  # fmt: skip


def _shape(structure: Structure, tensor: str) -> tuple[int, ...]:
    shapes = dict(getattr(structure, "shapes", ()))
    return shapes.get(tensor) or structure.shape


def _cases() -> list[object]:
    return [pytest.param(s, t, id=f"{name}-{t}") for name, s in STRUCTURES.items() for t in s.tensors]


def _units_of(structure: Structure, tensor: str) -> Tensor:
    """Which units each entry of the tensor belongs to, by marking one unit after the other: bool `(units, *shape)`."""
    return torch.stack([structure.expand(each, tensor) for each in torch.eye(structure.units)]).bool()


@pytest.mark.parametrize(("structure", "tensor"), _cases())
def test_a_mask_of_ones_keeps_everything(structure: Structure, tensor: str) -> None:
    mask = structure.expand(torch.ones(structure.units, dtype=torch.bool), tensor)
    assert mask.dtype == torch.bool
    assert torch.equal(mask.expand(_shape(structure, tensor)), torch.ones(_shape(structure, tensor), dtype=torch.bool))


@pytest.mark.parametrize(("structure", "tensor"), _cases())
def test_expanding_a_mask_zeroes_what_view_shows_of_the_removed_units(structure: Structure, tensor: str) -> None:
    """Distinct values tell where each entry went: those of a removed unit are exactly those that the mask zeroes."""
    shape = _shape(structure, tensor)
    weight = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    view = structure.view(weight, tensor)
    assert view.shape[0] == structure.units
    for keep in (torch.arange(structure.units) % 2 == 0, torch.arange(structure.units) == structure.units - 1):
        mask = structure.expand(keep, tensor).expand(shape)
        assert set(weight[~mask].tolist()) == set(view[~keep].flatten().tolist())


@pytest.mark.parametrize(("structure", "tensor"), _cases())
def test_float_values_expand_like_masks_and_carry_gradients(structure: Structure, tensor: str) -> None:
    keep = torch.arange(structure.units) % 2 == 0
    assert torch.equal(structure.expand(keep.float(), tensor), structure.expand(keep, tensor).float())
    values = torch.rand(structure.units, requires_grad=True)
    structure.expand(values, tensor).sum().backward()
    assert (values.grad > 0).all()


@pytest.mark.parametrize("name", STRUCTURES)
def test_unit_sizes_add_up_to_all_weights_without_biases(name: str) -> None:
    structure, none = STRUCTURES[name], torch.zeros(STRUCTURES[name].units, dtype=torch.bool)
    weights = {t: _shape(structure, t) for t in structure.tensors if len(_shape(structure, t)) > 1}
    removed = sum(int((~structure.expand(none, t).expand(shape)).sum()) for t, shape in weights.items())
    assert structure.unit_size * structure.units == removed


def test_group_units_sit_where_the_graph_says() -> None:
    for name in ("value heads in a fused projection", "head width in each part of a fused projection"):
        structure = STRUCTURES[name]
        (member,) = structure.group.members
        marked = _units_of(structure, "w")[:, :, 0]  # (units, rows)
        expected = torch.ones_like(marked)
        for rows in unit_indices(member, structure.units):
            expected[:, rows] = False
        for unit, rows in enumerate(unit_indices(member, structure.units)):
            expected[unit, rows] = True
        assert torch.equal(marked, expected)


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(PruneError, match=r"'w' of shape \(6, 4\) does not divide into blocks of \(4, 4\)"):
        Blocks("w", (6, 4), (4, 4))


def test_conv1d_counts_its_outputs_along_the_second_dimension() -> None:
    layer = Conv1D(nf=6, nx=4)  # weight (4 inputs, 6 outputs)
    (row,), (column,) = structures.row_structures({"w": layer}), structures.column_structures({"w": layer})
    assert (row.units, column.units) == (6, 4)
    without_first_output = row.expand(torch.arange(6) > 0, "w")
    assert not without_first_output[:, 0].any() and without_first_output[:, 1:].all()


def test_rows_and_columns_of_convolutions() -> None:
    layer = nn.Conv2d(4, 6, 3)
    (row,), (column,) = structures.row_structures({"w": layer}), structures.column_structures({"w": layer})
    assert (row.units, row.unit_size) == (6, 36)
    assert (column.units, column.unit_size) == (4, 54)


def test_the_layers_of_repeated_blocks_are_chosen() -> None:
    chosen = prunable_weights(tiny_text_model(), (), ())
    assert len(chosen) == 12 and all(name.startswith("bert.encoder.layer.") for name in chosen)
    assert all("convolution.weight" in name for name in prunable_weights(tiny_image_model(), (), ()))


def test_without_repeated_blocks_all_but_the_last_layer_are_chosen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv1d(4, 4, 1), nn.Linear(4, 2))
    assert list(prunable_weights(model, (), ())) == ["0.weight", "2.weight"]


def test_include_and_exclude_are_globs_over_whole_names() -> None:
    model = tiny_text_model()
    queries = prunable_weights(model, ("*.query",), ())
    assert list(queries) == [f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)]
    outputs = prunable_weights(model, ("*.layer.?.output.dense",), ())
    assert list(outputs) == [f"bert.encoder.layer.{i}.output.dense.weight" for i in (0, 1)]
    rest = prunable_weights(model, (), ("bert.encoder.layer.0.*", "*.query"))
    assert len(rest) == 5 and all(".layer.1." in name for name in rest)
    assert list(prunable_weights(model, ("classifier",), ())) == ["classifier.weight"]


@pytest.mark.parametrize(
    ("include", "exclude", "complaint"),
    [
        (("no.such",), (), r"pattern 'no\.such' matches none of the model's 14 linear and conv layers, for example"),
        ((), ("*.queri",), r"pattern '\*\.queri' matches none"),
        (("*.query",), ("*.query",), "no layer of BertForSequenceClassification is left to prune"),
        (("bert.embeddings.*",), (), "matches none"),
    ],
)
def test_patterns_that_leave_nothing(include: tuple[str, ...], exclude: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(PruneError, match=complaint):
        prunable_weights(tiny_text_model(), include, exclude)


def test_shared_weights_are_refused() -> None:
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=True)
    model = GPT2LMHeadModel(config)
    assert len(prunable_weights(model, (), ())) == 4
    with pytest.raises(PruneError, match=r"'lm_head\.weight' is the same tensor as transformer\.wte\.weight"):
        prunable_weights(model, ("lm_head",), ())


def test_layers_that_are_used_many_times_count_once() -> None:
    config = AlbertConfig(
        vocab_size=20, embedding_size=8, hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16
    )
    chosen = prunable_weights(AlbertForSequenceClassification(config), (), ())
    assert len(chosen) == 6 and len({id(module) for module in chosen.values()}) == 6


class GatedFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)


FFN = Group("ffn", 6, (Member("gate.weight", 0), Member("gate.bias", 0), Member("up.weight", 0), Member("up.bias", 0),
                       Member("down.weight", 1, reads=True)))  # fmt: skip


def _neurons(*chosen: str, group: Group = FFN) -> list[Structure]:
    model = GatedFeedForward()
    weights = {f"{name}.weight": model.get_submodule(name) for name in chosen}
    return structures.neuron_structures(model, {group.name: group}, weights)


def test_neurons_are_tied_over_all_their_weights() -> None:
    (neurons,) = _neurons("gate", "up", "down")
    assert neurons.tensors == ("gate.weight", "gate.bias", "up.weight", "up.bias", "down.weight")
    assert (neurons.units, neurons.unit_size) == (6, 12)


def test_neurons_of_an_excluded_layer_stay() -> None:
    with pytest.raises(PruneError, match="no FFN width was found"):
        _neurons("gate", "down")  # removing a neuron would cut rows of the excluded `up`
