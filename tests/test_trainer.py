"""PruneTrainer beside the stock Trainer: saving, best checkpoints, mixed precision, clipping, compile, bad input."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from datasets import Dataset
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_prune import MovementConfig, PruneError, PruneTrainer
from hf_prune.tiny_models import tiny_text_model

PRUNING = MovementConfig(final_sparsity=0.5, begin=0.1, end=0.6)


def _rows(count: int = 32) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (count, 6), generator=generator)
    return Dataset.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3})


def _trainer(folder: Path, pruning: MovementConfig = PRUNING, model: Any = None, **settings: Any) -> PruneTrainer:
    own = {name: settings.pop(name) for name in ("callbacks", "compute_metrics", "teacher") if name in settings}
    defaults = {"max_steps": 10, "per_device_train_batch_size": 8, "save_strategy": "no", "logging_steps": 2}
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **{**defaults, **settings}
    )
    model = model or tiny_text_model()
    return PruneTrainer(
        model=model, args=arguments, train_dataset=_rows(), eval_dataset=_rows(16), pruning=pruning, **own
    )


def _encoder_density(model: torch.nn.Module) -> float:
    weights = [p for n, p in model.named_parameters() if "encoder" in n and p.ndim == 2]
    return float(sum((w != 0).sum() for w in weights) / sum(w.numel() for w in weights))


def test_ends_with_a_plain_sparse_model(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    names = set(tiny_text_model().state_dict())
    trainer.train()
    assert set(trainer.model.state_dict()) == names
    assert _encoder_density(trainer.model) == pytest.approx(0.5, abs=1e-3)
    assert trainer.report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(_rows(4)).predictions.shape == (4, 3)


def test_sparsity_and_terms_are_logged(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, MovementConfig(final_sparsity=0.5, variant="soft"), teacher="self")
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries
    assert all({"sparsity", "penalty", "penalty_weight", "distill_logits"} <= entry.keys() for entry in entries)


def test_saved_model_opens_with_plain_from_pretrained(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert (tmp_path / "out" / "pruning.json").is_file()


class SaveInTheMiddle(TrainerCallback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trainer: PruneTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            self.trainer.save_model(str(self.folder))


def test_saving_in_the_middle_writes_a_baked_copy_and_changes_nothing(tmp_path: Path) -> None:
    undisturbed = _trainer(tmp_path / "a")
    undisturbed.train()
    callback = SaveInTheMiddle(tmp_path / "middle")
    trainer = _trainer(tmp_path / "b", callbacks=[callback])
    callback.trainer = trainer
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, undisturbed.model.state_dict()[name]), name
    middle = AutoModelForSequenceClassification.from_pretrained(tmp_path / "middle")
    assert not any(parametrize.is_parametrized(module) for module in middle.modules())
    assert 0.5 < _encoder_density(middle) < 1.0


def test_best_checkpoint_is_one_at_the_final_sparsity(tmp_path: Path) -> None:
    """The metric prefers the first checkpoints, which are not sparse yet; they must not count."""
    scores = iter([0.9, 0.8, 0.7, 0.1, 0.2, 0.15])
    trainer = _trainer(
        tmp_path, max_steps=12, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        compute_metrics=lambda _: {"score": next(scores)},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-10")
    assert _encoder_density(trainer.model) == pytest.approx(0.5, abs=1e-3)
    best = torch.load(tmp_path / "checkpoint-10" / "optimizer.pt", weights_only=True)
    assert best["hf_prune"]["saved"]["pruner"]["step"] == 10


def test_the_exported_model_is_the_one_that_was_evaluated(tmp_path: Path) -> None:
    trainer = _trainer(
        tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[trainer.state.best_global_step], abs=1e-7)


@pytest.mark.parametrize("variant", ["hard", "soft", "l0", "magnitude"])
def test_bf16_autocast_keeps_scores_in_float32(tmp_path: Path, variant: str) -> None:
    pruning = MovementConfig(final_sparsity=0.5, variant=variant, begin=0.1, end=0.6)
    trainer = _trainer(tmp_path, pruning, bf16=True, max_grad_norm=0.1)
    assert all(p.dtype == torch.float32 for n, p in trainer.model.named_parameters() if n.endswith("scores"))
    trainer.train()
    assert trainer.report.sparsity == pytest.approx(0.5, abs=0.01)


def test_bf16_weights_train_under_fp32_scores(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, model=tiny_text_model().to(torch.bfloat16))
    trainer.train()
    assert trainer.report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert next(trainer.model.parameters()).dtype == torch.bfloat16


def test_clipping_is_one_norm_over_weights_and_scores(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, max_grad_norm=1e-4, optim="sgd", learning_rate=1.0, max_steps=4)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    moved: dict[str, torch.Tensor] = {}

    class Measure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 1:
                moved.update({n: (p.detach() - before[n]) for n, p in model.named_parameters()})

    trainer.add_callback(Measure())
    trainer.train()
    # SGD: step = lr * clipped gradient; lr is 1 for weights and 1e-2 for scores.
    norm = sum(float((d / (1e-2 if n.endswith("scores") else 1.0)).square().sum()) for n, d in moved.items()) ** 0.5
    assert norm == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.slow
def test_torch_compile_gives_the_same_model(tmp_path: Path) -> None:
    eager, compiled = _trainer(tmp_path / "a"), _trainer(tmp_path / "b", torch_compile=True)
    eager.train()
    compiled.train()
    for name, value in eager.model.state_dict().items():
        assert (value - compiled.model.state_dict()[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("structure", ["element", "neuron"])
def test_making_a_trainer_draws_no_random_numbers(tmp_path: Path, structure: str) -> None:
    """The rows come in the order in which the stock Trainer with the same seed would take them."""
    drawn = []
    for kind in (Trainer, PruneTrainer):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=4)
        own = {"pruning": dataclasses.replace(PRUNING, structure=structure)} if kind is PruneTrainer else {}
        under_way = GradientState().active_dataloader
        trainer = kind(model=tiny_text_model(), args=arguments, train_dataset=_rows(), **own)
        assert GradientState().active_dataloader is under_way
        drawn.append(torch.cat([batch["input_ids"] for batch in trainer.get_train_dataloader()]))
    assert torch.equal(*drawn)


def test_a_dataset_without_rows_at_hand_is_not_read_before_training(tmp_path: Path) -> None:
    class Rows(torch.utils.data.Dataset):
        read = 0

        def __len__(self) -> int:
            return 32

        def __getitem__(self, index: int) -> Any:
            Rows.read += 1
            return _rows(1)[0]

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    PruneTrainer(model=tiny_text_model(), args=arguments, train_dataset=Rows(), pruning=PRUNING)
    assert Rows.read == 0


def test_data_parallel_in_one_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    model = tiny_text_model()
    with pytest.raises(PruneError, match=r"2 GPUs in one process.*accelerate launch"):
        _trainer(tmp_path, model=model)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_an_optimizer_of_the_users_own(tmp_path: Path) -> None:
    model = tiny_text_model()
    arguments = TrainingArguments(str(tmp_path), max_steps=10, use_cpu=True, report_to="none", disable_tqdm=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = {"model": model, "args": arguments, "train_dataset": _rows(), "pruning": PRUNING}
    trainer = PruneTrainer(**pruner, optimizers=(optimizer, None))
    trainer.train()
    assert trainer.report.sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_scheduler_that_knows_no_score_group_is_refused(tmp_path: Path) -> None:
    model = tiny_text_model()
    arguments = TrainingArguments(str(tmp_path), max_steps=10, use_cpu=True, report_to="none", disable_tqdm=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = PruneTrainer(
        model=model, args=arguments, train_dataset=_rows(), pruning=PRUNING, optimizers=(optimizer, scheduler)
    )
    with pytest.raises(PruneError, match=r"optimizers=\(optimizer, None\)"):
        trainer.train()


def test_early_stopping_works(tmp_path: Path) -> None:
    losses = iter([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    trainer = _trainer(
        tmp_path, max_steps=16, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=False,
        compute_metrics=lambda _: {"score": next(losses)}, callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 14  # goal at step 10 (0.6 of 16), best there, two worse ones follow
    assert _encoder_density(trainer.model) == pytest.approx(0.5, abs=1e-3)


def test_a_finished_trainer_says_what_to_use_next(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.train()
    with pytest.raises(PruneError, match=r"transformers\.Trainer to fine-tune"):
        trainer.train()
    stock = Trainer(model=trainer.model, args=trainer.args, train_dataset=_rows())
    stock.train()


def test_a_pruned_model_can_be_pruned_again(tmp_path: Path) -> None:
    first = _trainer(tmp_path)
    first.train()
    second = _trainer(tmp_path, MovementConfig(final_sparsity=0.8, begin=0.1, end=0.6), model=first.model)
    second.train()
    assert _encoder_density(second.model) == pytest.approx(0.2, abs=1e-3)


def test_unfinished_models_are_not_pushed(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    with pytest.raises(PruneError, match="after train"):
        trainer.push_to_hub()


def test_strategies_that_push_inside_the_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PruneError, match="hub_strategy='every_save' would push"):
        _trainer(tmp_path, push_to_hub=True, hub_strategy="every_save")


@pytest.mark.parametrize(
    ("pruning", "settings", "complaint"),
    [
        ({"include": ("no.such.layer",)}, {}, "matches none of the model's"),
        ({"exclude": ("bert.encoder.*",)}, {}, "is left to prune"),
        ({"begin": 0.5, "end": 0.51}, {}, "less than one step"),
        ({}, {"warmup_steps": 10}, "learning-rate warm-up takes 10 steps"),
        ({"structure": "block"}, {}, "does not divide into blocks"),
    ],
)
def test_bad_settings_leave_the_model_alone(
    tmp_path: Path, pruning: dict[str, Any], settings: dict[str, Any], complaint: str
) -> None:
    model = tiny_text_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruneError, match=complaint):
        _trainer(tmp_path, dataclasses.replace(PRUNING, **pruning), model, **settings).train()
    weights = {
        name.replace(".parametrizations.weight.original", ".weight"): v for name, v in model.state_dict().items()
    }
    for name, value in before.items():
        assert torch.equal(value, weights[name]), name


def test_a_diverged_loss_stops_the_run(tmp_path: Path) -> None:
    model = tiny_text_model()
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    trainer = _trainer(tmp_path, model=model, save_strategy="steps", save_steps=1)
    with pytest.raises(PruneError, match="loss is nan at step 0"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_resuming_with_another_config_is_refused(tmp_path: Path) -> None:
    _trainer(tmp_path, save_strategy="steps", save_steps=5).train()
    other = _trainer(tmp_path, MovementConfig(final_sparsity=0.7, begin=0.1, end=0.6))
    with pytest.raises(PruneError, match="another pruning config"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
