"""The benchmarks' harness: finished cells stay, a stopped run goes on, and the statistics are what they say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cells

    yield cells
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_finds_what_it_imports(harness: Any, name: str) -> None:
    assert importlib.import_module(name).__doc__


def count_letters(cell: dict[str, Any]) -> dict[str, Any]:
    if cell["word"] == "broken":
        raise ValueError("this cell fails")
    return {"letters": len(cell["word"])}


def test_a_failed_run_keeps_what_was_finished_and_resumes(harness: Any, tmp_path: Path) -> None:
    path = tmp_path / "results" / "words.json"
    good, bad = {"word": "abc"}, {"word": "broken"}
    with pytest.raises(ValueError, match="this cell fails"):
        harness.run([good, bad], count_letters, harness.Store(path), workers=1)
    store = harness.Store(path)
    assert good in store and bad not in store and store[good] == {"letters": 3}

    harness.run([good, {"word": "de"}], count_letters, store, workers=1)
    content = json.loads(path.read_text())
    assert content["cells"] == {"word=abc": {"letters": 3}, "word=de": {"letters": 2}}
    assert content["environment"]["torch"]
    store.forget(good)
    assert good not in store


def test_spread_counts_seeds(harness: Any) -> None:
    assert harness.spread([]) is None and harness.spread_text(None) == "-"
    assert harness.spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "seeds": 2}
    assert harness.spread_text(harness.spread([50.0]), 2) == "50.00 ± 0.00 (n=1)"


def test_paired_bootstrap_finds_a_real_gain_and_no_false_one(harness: Any) -> None:
    import movement_text

    generator = np.random.default_rng(0)
    base = generator.random((3, 900)) < 0.8
    better = base | (generator.random((3, 900)) < 0.2)
    points, low, high = movement_text.paired_bootstrap(better.astype(int), base.astype(int), draws=500)
    assert low > 0 and low < points < high and points == pytest.approx(100 * (better.mean() - base.mean()))
    same = movement_text.paired_bootstrap(base.astype(int), base.astype(int), draws=100)
    assert same == (0.0, 0.0, 0.0)


def test_every_method_with_a_channel_goal_has_rows_whose_settings_fit_both_tasks(harness: Any) -> None:
    import channel_methods as benchmark

    from hf_prune.methods import METHODS, load

    rows = benchmark.rows()
    assert {name for name in METHODS if "target_flops" in load(name).GOALS} <= {*rows, "magnitude"}
    for task in benchmark.TASKS:
        for quick in (False, True):
            scale = benchmark.scale_of(task, 0.3, benchmark.size_of(task, quick)["steps"])
            for row, method in rows.items():
                for trial in benchmark.trials(row, scale) if method else ():
                    config = benchmark.pruning(benchmark.row_cell(task, row, 0.3, 2, trial, quick))
                    assert (config.method, config.target_flops, config.seed) == (method, 0.3, 2)
    guarded = benchmark.guarded_cells(quick=False)
    assert len(guarded) == 10 and {benchmark.pruning(cell).max_metric_drop for cell in guarded} == {0.01}


def test_bars_say_what_is_met(harness: Any) -> None:
    import channel_methods as benchmark

    def row(test: float) -> dict[str, Any]:
        return {"test": harness.spread([test]), "change": harness.spread([test - 92.5])}

    table = {"dense": row(92.5), "uniform L1": row(92.0), "resrep": row(91.9), "gate_decorator": row(91.5)}
    longer = {"dense": row(92.5), "uniform L1": row(92.1), "resrep": row(92.2)}
    tables = {"fashion 0.5": table, "fashion 0.5, longer": longer}
    found = dict(benchmark.bars({"tables": tables, "play_and_prune": {"runs": 10, "kept": 8}}))
    assert {name: text.split()[0] for name, text in found.items()} == {
        "dense at least 92 %": "met",
        "resrep at least uniform L1 - 0.3": "met",
        "gate_decorator at least uniform L1 - 0.3": "MISSED",
        "resrep loses at most 0.5": "MISSED",
        "resrep at least uniform L1": "MISSED",
        "resrep loses at most 0.5, longer": "met",
        "resrep at least uniform L1, longer": "met",
        "play_and_prune within 1.0 in 9 of 10": "MISSED",
    }


def test_training_methods_claims_come_from_finished_cells(harness: Any, tmp_path: Path) -> None:
    import training_methods

    cells = [training_methods.row_cell(name, 0, False) for name in training_methods.rows()]
    assert len({harness.key(cell) for cell in cells}) == len(cells)
    store = harness.Store(tmp_path / "results.json")
    empty = training_methods.summarise(store, quick=True)
    assert all(value is None for value in empty["claims"].values())
    for name, test, cost in (("while training, l1", 90.0, 60.0), ("L1 at once", 91.0, 30.0)):
        result = {"test": test, "cost": cost, "step_time": 0.5, "validation_after_the_cut": 50.0}
        store.add(training_methods.row_cell(name, 0, True), result)
    claims = training_methods.summarise(store, quick=True)["claims"]
    assert claims["while training, l1 - train and retrain, points"] == -1.0
    # 60 dense steps against 120 of the dense training and 30 of retraining.
    assert claims["while training: multiply-adds of training saved against train and retrain (paper: 0.41)"] == 0.6
