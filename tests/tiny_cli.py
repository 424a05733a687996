"""Commands of the command line, run in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from hf_prune.cli import app


class Done:
    """A finished command: its exit code and what it printed."""

    def __init__(self, words: tuple[Any, ...]) -> None:
        done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        self.code, self.out, self.err = done.exit_code, done.stdout, done.stderr

    @property
    def result(self) -> Any:
        """What `--json` printed."""
        assert self.code == 0, self.err
        return json.loads(self.out)


def cli(*words: Any) -> Done:
    return Done(words)
