"""Several processes and killed processes: the same masks on every rank, and a resumed run equal to a whole one."""

from __future__ import annotations

import json
import random
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import on_cpu, two_processes
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "scripts" / "train_tiny.py"
train = runpy.run_path(str(SCRIPT))["train"]


def _launch(
    folder: Path, *, two: bool = False, script: Path = SCRIPT, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """`train` in one process of its own, or in two; rank r writes `rank<r>.safetensors`."""
    words = [str(script), str(folder), json.dumps({**settings, "world_size": 1 + two})]
    command = two_processes(*words) if two else [sys.executable, *words]
    return subprocess.run(command, env=on_cpu(), capture_output=True, text=True, timeout=240, check=False)


def _assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name.startswith("keep."):
            assert torch.equal(value, theirs[name]), name
        else:
            assert (value.double() - theirs[name].double()).abs().max() <= tolerance, name


@pytest.mark.distributed
@pytest.mark.parametrize("variant", ["hard", *(pytest.param(each, marks=pytest.mark.slow) for each in ("soft", "l0"))])
def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path, variant: str) -> None:
    pruning = {"variant": variant, "penalty_weight": 1.0, "penalty_gain": 1.0}
    done = _launch(tmp_path, two=True, pruning=pruning, training={"max_steps": 8, "per_device_train_batch_size": 4})
    assert done.returncode == 0, done.stderr[-5000:]
    two, other_rank = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    for name, value in two.items():
        assert torch.equal(value, other_rank[name]), f"ranks disagree on {name}"
    one = train(tmp_path / "one", pruning, {"max_steps": 8, "per_device_train_batch_size": 8})
    _assert_close(two, one, 1e-5)


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_agree_after_returning_to_an_older_state(tmp_path: Path) -> None:
    done = _launch(tmp_path, two=True, script=SCRIPT.with_name("guard_tiny.py"))
    assert done.returncode == 0, done.stderr[-5000:]
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert len(first["trajectory"]) > 6, "a return is among the measurements"
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"ranks disagree on {name}"


def test_accumulation_gives_the_same_schedule_and_masks(tmp_path: Path) -> None:
    runs = [
        train(
            tmp_path,
            {},
            {"max_steps": 8, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation},
        )
        for batch, accumulation in ((8, 1), (4, 2), (2, 4))
    ]
    _assert_close(runs[1], runs[0], 1e-5)
    _assert_close(runs[2], runs[0], 1e-5)


@pytest.mark.parametrize(
    "variant", ["hard", *(pytest.param(each, marks=pytest.mark.slow) for each in ("soft", "l0", "magnitude"))]
)
def test_killed_and_resumed_is_bit_identical(tmp_path: Path, variant: str) -> None:
    training = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "max_grad_norm": 0.5,
    }
    settings: dict[str, Any] = {
        "pruning": {"variant": variant, "score_lr": 0.2},
        "training": training,
        "dropout": 0.1,
    }
    whole = train(tmp_path / "whole", **settings)
    at = random.Random(variant).randrange(3, 12)
    killed = _launch(tmp_path / "broken", kill_at=at, **settings)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-5000:]
    _assert_close(train(tmp_path / "broken", resume=True, **settings), whole, 0.0)
