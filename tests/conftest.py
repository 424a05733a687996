"""What every test runs under: no hub, one thread, a fixed seed, nothing left over from the test before."""

import os

# Before transformers and evaluate are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import time
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import GradientState
from hub_server import HubServer
from huggingface_hub import constants

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    torch.manual_seed(0)
    # accelerate keeps it for the whole process, and with it the data loader of a run that a test ended with an error.
    GradientState._reset_state()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that this process's client is connected to, with a token and without waiting between retries."""
    with HubServer(part_bytes=20_000) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(time, "sleep", lambda _: None)
        yield server
