"""Pruner where things go wrong, and on models that are not a BERT of linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import hf_prune
from hf_prune import DistillConfig, MagnitudeConfig, MovementConfig, PruneError, Pruner
from hf_prune.parts.gates import MaskGate
from hf_prune.tiny_models import tiny_image_model, tiny_text_model

VARIANTS = ("hard", "soft", "l0", "magnitude")


def _config(**changes: Any) -> MovementConfig:
    return MovementConfig(**{"final_sparsity": 0.5, "begin": 0.0, "end": 0.6, **changes})


def _batch(model: PreTrainedModel) -> dict[str, Tensor]:
    ids = torch.randint(0, 20, (4, 6))
    return {"input_ids": ids, "labels": ids if isinstance(model, GPT2LMHeadModel) else ids[:, 0] % 3}


def _train(pruner: Pruner, batch: dict[str, Tensor], steps: int = 5) -> None:
    optimizer = pruner.wrap(torch.optim.AdamW(pruner.model.parameters(), lr=1e-2))
    for step in range(steps):
        pruner.step(step, steps)
        optimizer.zero_grad()
        pruner.batch_loss(pruner.model, batch).backward()
        optimizer.step()
    pruner.step(steps, steps)


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a failed call could have changed."""
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "identities": {name: id(p) for name, p in model.named_parameters()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
    }


def _assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = _snapshot(model)
    tensors, old = after.pop("tensors"), before["tensors"]
    assert tensors.keys() == old.keys()
    assert all(torch.equal(value, old[name]) for name, value in tensors.items())
    assert after == {name: part for name, part in before.items() if name != "tensors"}


def _fail_on_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which raises in place of its call of that number."""
    calls = iter(range(1, 1000))

    def failing(*args: Any) -> Any:
        if next(calls) == number:
            raise RuntimeError("a stroke of bad luck")
        return function(*args)

    return failing


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gate_that_cannot_be_inserted_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    model = tiny_text_model()
    before = _snapshot(model)
    pruner = Pruner(model, _config(variant=variant), teacher="self")
    monkeypatch.setattr(MaskGate, "insert", _fail_on_call(2, MaskGate.insert))
    with pytest.raises(RuntimeError, match="bad luck"):
        pruner.attach()
    assert not pruner.attached
    _assert_unchanged(model, before)
    monkeypatch.undo()
    pruner.attach()
    _train(pruner, _batch(model))
    assert pruner.finalize().sparsity == pytest.approx(0.5, abs=0.01)


def test_a_gate_that_fails_within_its_second_tensor_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_text_model()
    before = _snapshot(model)
    register = parametrize.register_parametrization
    monkeypatch.setattr(parametrize, "register_parametrization", _fail_on_call(2, register))
    with pytest.raises(RuntimeError, match="bad luck"):
        Pruner(model, _config(structure="neuron")).attach()
    _assert_unchanged(model, before)


def test_finalize_can_be_repeated_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    finished = []
    for fails in (False, True):
        torch.manual_seed(0)
        model = tiny_text_model().train()
        pruner = Pruner(model, _config(structure="neuron"))
        pruner.attach()
        _train(pruner, _batch(model))
        if fails:
            monkeypatch.setattr(MaskGate, "fold", _fail_on_call(2, MaskGate.fold))
            with pytest.raises(RuntimeError, match="bad luck"):
                pruner.finalize()
            assert pruner.attached and model.training
            monkeypatch.undo()
        pruner.finalize()
        finished.append(model.state_dict())
    assert finished[0].keys() == finished[1].keys()
    assert all(torch.equal(value, finished[1][name]) for name, value in finished[0].items())


def test_no_layer_loses_all_its_units() -> None:
    """One row of each layer always stays, also where the goal alone would leave fewer rows than layers."""
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(6)], nn.Linear(4, 2))
    pruner = Pruner(model, _config(final_sparsity=0.95, variant="magnitude", structure="row", min_keep=0.0))
    pruner.attach()
    pruner.step(1, 1)
    assert [int(keep.sum()) for keep in pruner.plan.values()] == [1] * 6


@pytest.mark.parametrize("structure", ["element", "row", "column", "block"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_convolutional_models(structure: str, variant: str) -> None:
    model = tiny_image_model(num_labels=3)
    config = _config(variant=variant, structure=structure, block_shape=(4, 4), score_lr=0.1, exclude=("*embedder*",))
    pruner = Pruner(model, config)
    pruner.attach()
    _train(pruner, {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 0])})
    model.eval()
    pixels = torch.randn(2, 3, 16, 16)
    masked = model(pixels).logits
    report = pruner.finalize()
    assert torch.allclose(model(pixels).logits, masked, atol=1e-6)
    assert 0.2 < report.sparsity < 0.8


def _gpt2(tied: bool) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=tied, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("structure", ["element", "row", "column", "block"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_and_transposed_layers(structure: str, tied: bool) -> None:
    model = _gpt2(tied)
    embeddings = model.transformer.wte.weight
    before = embeddings.detach().clone()
    pruner = Pruner(model, _config(structure=structure, block_shape=(4, 4)))
    pruner.attach()
    assert not embeddings.requires_grad
    _train(pruner, _batch(model))
    report = pruner.finalize()
    assert report.sparsity == pytest.approx(0.5, abs=0.05)
    assert torch.equal(embeddings, before) and embeddings.requires_grad
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied


class HeadFirst(nn.Module):
    """The head is registered before the embedding that it shares its weight with."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.embedding = nn.Linear(8, 20, bias=False), nn.Embedding(20, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.head.weight = self.embedding.weight


def test_embeddings_are_frozen_under_whichever_name_comes_first() -> None:
    model = HeadFirst()
    pruner = Pruner(model, _config())
    pruner.attach()
    assert not model.embedding.weight.requires_grad


def test_without_a_task_loss() -> None:
    model, batch = tiny_text_model(), {"input_ids": torch.randint(0, 40, (4, 6))}
    pruner = Pruner(model, _config())
    pruner.attach()
    with pytest.raises(PruneError, match="there is no task loss; give the model labels"):
        pruner.batch_loss(model, batch)

    student = tiny_text_model(seed=1)
    taught = Pruner(student, _config(), teacher=tiny_text_model(), distillation=DistillConfig(alpha=1.0))
    taught.attach()
    loss = taught.batch_loss(student, batch)
    loss.backward()
    assert loss > 0 and student.classifier.weight.grad.any()


def test_a_teacher_stays_trainable() -> None:
    teacher = tiny_text_model(seed=1)
    Pruner(tiny_text_model(), _config(), teacher=teacher).attach()
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_run_that_starts_again_selects_again() -> None:
    pruner = Pruner(tiny_text_model(), _config(variant="l0"))
    pruner.attach()
    pruner.step(10, 10)
    assert pruner.sparsity > 0.4
    pruner.step(0, 10)
    assert pruner.sparsity == 0.0


def test_weights_that_the_user_froze_stay_frozen() -> None:
    model = tiny_text_model()
    frozen = model.bert.encoder.layer[0].output.dense.weight.requires_grad_(False)
    before = frozen.detach().clone()
    pruner = Pruner(model, _config())
    pruner.attach()
    _train(pruner, _batch(model))
    pruner.finalize()
    after = model.bert.encoder.layer[0].output.dense.weight
    assert not after.requires_grad and torch.equal(after[after != 0], before[after != 0]) and (after == 0).any()


def test_a_goal_out_of_reach_leaves_the_model_as_it_was() -> None:
    model = tiny_image_model()
    before = _snapshot(model)
    with pytest.raises(PruneError, match="cannot be reached"):
        hf_prune.prune(model, MagnitudeConfig(target_flops=0.001), {"pixel_values": torch.randn(2, 3, 16, 16)})
    _assert_unchanged(model, before)


def test_a_run_of_no_steps_is_refused() -> None:
    pruner = Pruner(tiny_text_model(), _config())
    pruner.attach()
    with pytest.raises(PruneError, match="total_steps"):
        pruner.step(0, 0)
