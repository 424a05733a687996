"""Every check of `hf_prune.testing` on every variant of every method in the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hf_prune.methods import METHODS, load
from hf_prune.testing import CHECKS, Case, tiny_cases


def _cases() -> Iterator[Any]:
    """All variants; those beside a method's first are slow tests."""
    for method in METHODS:
        for place, case in enumerate(tiny_cases(method)):
            yield pytest.param(case, id=str(case), marks=pytest.mark.slow if place else ())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("case", _cases())
def test_contract(case: Case, check: Callable[[Case], None]) -> None:
    reason = case.excuse(check)
    if reason is not None:
        pytest.xfail(reason)
    check(case)


@pytest.mark.parametrize("method", METHODS)
def test_module_has_all_that_the_table_promises(method: str) -> None:
    module = load(method)
    assert module.Config.method == method
    assert module.PAPER.title and module.PAPER.bibtex.startswith("@")
    assert set(module.GOALS) and isinstance(module.NEEDS_TRAINING, bool) and module.TINY
