"""What every test runs under: no hub, one thread, a fixed seed, nothing left over from the test before."""

import os

# Before transformers and evaluate are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from accelerate.state import GradientState

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    torch.manual_seed(0)
    # accelerate keeps it for the whole process, and with it the data loader of a run that a test ended with an error.
    GradientState._reset_state()
