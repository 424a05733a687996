"""Distillation: hand-computed terms, zero for a perfect student, and teachers that leave no trace."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from hf_prune import DistillConfig, MovementConfig, PruneError, PruneTrainer
from hf_prune.parts.distillation import Distiller, kl_divergence, load_teacher, logits_divergence
from hf_prune.tiny_models import tiny_image_model, tiny_text_model

EVERYTHING = DistillConfig(hidden_weight=1.0, attention_weight=1.0)


def _batch(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 40, (4, 6))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 0]), **changes}


def test_kl_by_hand() -> None:
    """T = 2, teacher logits (2 ln 3, 0) and student logits (0, 0): T^2 * sum p log(p / q) with p = (3/4, 1/4)."""
    teacher, student = torch.tensor([[2 * 1.0986123, 0.0]]), torch.zeros(1, 2)
    expected = 4 * (0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log())
    assert float(kl_divergence(student, teacher, 2.0)) == pytest.approx(float(expected), abs=1e-6)


def test_pixels_of_a_segmentation_are_rows() -> None:
    student, teacher = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)  # (batch, classes, height, width)
    rows = [each.permute(0, 2, 3, 1).reshape(24, 5) for each in (student, teacher)]
    ours = logits_divergence({"logits": student}, [{"logits": teacher}], {}, temperature=2.0)
    torch.testing.assert_close(ours, kl_divergence(*rows, 2.0))


def test_classes_without_any_probability_add_nothing() -> None:
    masked = torch.tensor([[0.0, 1.0, -torch.inf]])
    student = masked.clone().requires_grad_()
    loss = kl_divergence(student, masked.flip(0), 2.0)
    loss.backward()
    assert float(loss.detach()) == 0.0 and student.grad.isfinite().all()


def test_rows_that_do_not_count_are_left_out() -> None:
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.allclose(
        kl_divergence(student, teacher, 1.0, valid), kl_divergence(student[valid], teacher[valid], 1.0)
    )


def test_a_student_equal_to_its_teacher_has_zero_loss() -> None:
    student = tiny_text_model(attn_implementation="eager").eval()
    distiller = Distiller([copy.deepcopy(student)], EVERYTHING, student)
    batch = _batch()
    terms = distiller.terms(student(**batch, **EVERYTHING.student_flags), batch)
    assert set(terms) == {"distill_logits", "distill_hidden", "distill_attention"}
    assert all(abs(float(term.detach())) < 1e-6 for term in terms.values())


def test_every_term_pulls_on_the_student() -> None:
    student = tiny_text_model(attn_implementation="eager").train()
    distiller = Distiller([tiny_text_model(seed=1, attn_implementation="eager")], EVERYTHING, student)
    batch = _batch()
    for name, term in distiller.terms(student(**batch, **EVERYTHING.student_flags), batch).items():
        student.zero_grad()
        term.backward(retain_graph=True)
        assert student.bert.encoder.layer[0].attention.self.query.weight.grad.any(), name


def test_padding_changes_neither_hidden_nor_attention_terms() -> None:
    student = tiny_text_model(attn_implementation="eager").eval()
    distiller = Distiller([tiny_text_model(seed=1, attn_implementation="eager")], EVERYTHING, student)
    batch = _batch()
    padded = {
        "input_ids": torch.cat([batch["input_ids"], torch.zeros(4, 3, dtype=torch.long)], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(4, 3, dtype=torch.long)], 1),
        "labels": batch["labels"],
    }
    short, long = (distiller.terms(student(**b, **EVERYTHING.student_flags), b) for b in (batch, padded))
    for name in short:
        assert torch.allclose(short[name], long[name], atol=1e-6), name


def test_several_teachers_are_averaged_as_probabilities() -> None:
    student, teachers = tiny_text_model().eval(), [tiny_text_model(seed=s) for s in (1, 2)]
    for teacher in teachers:
        torch.nn.init.normal_(teacher.classifier.weight, std=3.0)
    config, batch = DistillConfig(temperature=5.0, alpha=1.0), _batch()
    outputs = student(**batch)
    (term,) = Distiller(teachers, config, student).terms(outputs, batch).values()
    with torch.no_grad():
        mean = torch.stack([(t.eval()(**batch).logits / 5).softmax(-1) for t in teachers]).mean(0)
    outputs.logits.retain_grad()
    term.backward()
    # Gradient per row: T * (q - mean p) / batch.
    expected = 5 * ((outputs.logits.detach() / 5).softmax(-1) - mean) / 4
    assert torch.allclose(outputs.logits.grad, expected, atol=1e-6)


def test_layers_are_spread_over_a_deeper_teacher() -> None:
    student = tiny_text_model(attn_implementation="eager").eval()
    teacher = tiny_text_model(seed=1, num_hidden_layers=4, attn_implementation="eager")
    config, batch = DistillConfig(hidden_weight=1.0), _batch()
    spread = Distiller([teacher], config, student)
    mapped = Distiller([teacher], DistillConfig(hidden_weight=1.0, layer_map=((0, 1), (1, 3))), student)
    outputs = student(**batch, **config.student_flags)
    assert torch.equal(spread.terms(outputs, batch)["distill_hidden"], mapped.terms(outputs, batch)["distill_hidden"])


def _trainer(folder: Path, teacher: object, **settings: object) -> PruneTrainer:
    ids = torch.randint(0, 40, (16, 6))
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3})
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="steps", save_steps=2, logging_steps=1,
    )  # fmt: skip
    pruning = MovementConfig(final_sparsity=0.5, begin=0.0, end=0.8)
    return PruneTrainer(
        model=tiny_text_model(), args=arguments, train_dataset=rows, pruning=pruning, teacher=teacher, **settings
    )


def test_teacher_runs_once_per_batch_without_gradient_and_is_not_saved(tmp_path: Path) -> None:
    teacher = tiny_text_model(seed=1).train()
    before = copy.deepcopy(teacher.state_dict())
    calls: list[bool] = []
    teacher.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled() or teacher.training))
    trainer = _trainer(tmp_path, teacher)
    trainer.train()
    assert calls == [False] * 4
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", "pt") as saved:
        assert not [name for name in saved.keys() if "teacher" in name]  # noqa: SIM118  a file handle, not a dict


def test_teacher_from_a_folder_and_the_model_itself(tmp_path: Path) -> None:
    tiny_text_model(seed=1).save_pretrained(tmp_path / "teacher")
    for teacher in (str(tmp_path / "teacher"), tmp_path / "teacher", "self"):
        trainer = _trainer(tmp_path / "run", teacher)
        trainer.train()
        assert any("distill_logits" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize(
    ("teacher", "complaint"),
    [
        (lambda: tiny_text_model(num_labels=5), "other labels"),
        (lambda: tiny_text_model(id2label={0: "a", 1: "b", 2: "c"}), None),
        (lambda: tiny_text_model(vocab_size=41), "vocabularies of 41 and 40"),
        (lambda: "no/such-folder-or-model", "no teacher can be loaded"),
    ],
)
def test_teachers_that_do_not_fit(teacher: object, complaint: str | None) -> None:
    student = tiny_text_model()
    if complaint is None:
        load_teacher(teacher(), student)
        return
    with pytest.raises(PruneError, match=complaint):
        load_teacher(teacher(), student)


def test_named_labels_in_another_order_are_refused() -> None:
    student = tiny_text_model(id2label={0: "good", 1: "bad", 2: "so-so"})
    with pytest.raises(PruneError, match="other labels"):
        load_teacher(tiny_text_model(id2label={0: "bad", 1: "good", 2: "so-so"}), student)


def test_the_student_itself_is_no_teacher() -> None:
    student = tiny_text_model()
    with pytest.raises(PruneError, match="teacher='self'"):
        load_teacher(student, student)


def test_missing_outputs_are_asked_for() -> None:
    student = tiny_text_model()
    distiller = Distiller([tiny_text_model(seed=1)], DistillConfig(hidden_weight=1.0), student)
    batch = _batch()
    with pytest.raises(PruneError, match="output_hidden_states=True"):
        distiller.terms(student(**batch), batch)


def test_hidden_states_of_other_widths_are_refused() -> None:
    with pytest.raises(PruneError, match="equal width, got 16"):
        Distiller([tiny_text_model(hidden_size=32)], DistillConfig(hidden_weight=1.0), tiny_text_model())


def test_image_models_distil_their_logits() -> None:
    student, batch = tiny_image_model(), {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    terms = Distiller([tiny_image_model(seed=1)], DistillConfig(), student).terms(student(**batch), batch)
    assert float(terms["distill_logits"].detach()) > 0


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"alpha": 1.5}, {"hidden_weight": -1.0}, {"attention_weight": -0.1}]
)
def test_bad_settings(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        DistillConfig(**settings)
