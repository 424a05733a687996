"""Every example runs as it stands, on tiny data; each is short and reads top to bottom."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_prune import methods
from hf_prune.demo_data import MissingPackage

EXAMPLES = sorted(path for path in (Path(__file__).parent.parent / "examples").glob("*.py"))
DEMOS = ("demo.py", "demo_images.py")  # `make demo` and `make demo-quick` run them
SLOW = ("image_classification.py", "semantic_segmentation.py", "sentence_pairs.py", "accelerate_loop.py")
LAST = {
    "accelerate_loop.py": "of the rows right",
    "image_classification.py": "48% of the multiply-adds are left",
    "load_and_use.py": "are zero now",
    "new_method.py": "checks hold",
    "question_answering.py": "eval_exact_match",
    "semantic_segmentation.py": "60% of the multiply-adds are left",
    "sentence_pairs.py": "parameters before",
    "text_classification.py": "'score'",
}
"""Example -> what its last line says."""


def _case(path: Path) -> Any:
    marks = [pytest.mark.slow] if path.name in SLOW else []
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", [_case(path) for path in EXAMPLES if path.name not in DEMOS])
def test_example_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(sys, "argv", [path.name, "--tiny"])
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    try:
        runpy.run_path(str(path), run_name="__main__")
    except MissingPackage as error:
        pytest.skip(str(error))
    assert LAST[path.name] in capsys.readouterr().out.strip().splitlines()[-1]


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.name not in DEMOS], ids=lambda path: path.stem)
def test_example_is_short(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 80
    assert any("--tiny" in line for line in lines[:8]) or "--model" in lines[2], "the docstring says how to run it"
