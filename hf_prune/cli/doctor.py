"""`hf-prune doctor`: whether this installation works, from versions to a round trip of a tiny model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from hf_prune.cli.output import Json, show, table

NEEDED = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "datasets", "evaluate", "typer")
OPTIONAL = {"matplotlib": "plots", "torchvision": "vision", "timm": "vision", "onnx": "onnx", "trackio": "trackio"}
"""Package -> the extra that installs it."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `ok` is False where something is broken; what is merely absent is fine."""

    name: str
    ok: bool
    detail: str


def doctor(as_json: Json = False) -> None:
    """Check versions, the loading hook, devices and folders, and prune, save and load a tiny model; exits with 1 if
    something is broken."""
    findings = [*_versions(), *(_checked(name, look) for name, look in CHECKS.items())]
    cells = [("ok" if found.ok else "BROKEN", found.name, found.detail) for found in findings]
    show([asdict(found) for found in findings], table(("", "", ""), cells), as_json=as_json)
    if not all(found.ok for found in findings):
        raise typer.Exit(1)


def _versions() -> Iterator[Finding]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import hf_prune

    yield Finding("hf_prune", True, f"{hf_prune.__version__}, {Path(hf_prune.__file__).parent}")
    yield Finding("python", True, platform.python_version())
    for package in (*NEEDED, *OPTIONAL):
        try:
            yield Finding(package, True, version(package))
        except PackageNotFoundError:
            extra = OPTIONAL.get(package)
            how = f"absent; pip install 'hf-prune[{extra}]' if you need it" if extra else "absent; reinstall hf-prune"
            yield Finding(package, extra is not None, how)


def _checked(name: str, look: Callable[[], str]) -> Finding:
    from hf_prune.cli.run import sentence

    try:
        return Finding(name, True, look())
    except Exception as error:  # noqa: BLE001 - a doctor reports whatever is broken
        return Finding(name, False, sentence(error))


def _hook() -> str:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from hf_prune.checkpoint.format import QUANT_METHOD

    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        raise RuntimeError("transformers does not know hf_prune's checkpoints; reinstall hf-prune.")
    return "from_pretrained opens pruned checkpoints"


def _devices() -> str:
    import os

    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {', '.join(gpus) or 'no GPU'}"


def _folders() -> str:
    from huggingface_hub.constants import HF_HOME

    from hf_prune.cache import cache_dir
    from hf_prune.demo_data import data_dir

    for folder in (cache_dir(), Path(HF_HOME)):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            continue
    return f"measurements {cache_dir()}, Hub files {HF_HOME}, demo data {data_dir()}"


def _round_trip() -> str:
    import torch

    import hf_prune
    from hf_prune.graph import example_inputs
    from hf_prune.testing import aligned
    from hf_prune.tiny_models import tiny_text_model

    model = tiny_text_model().eval()
    inputs = example_inputs(model)
    _, report = hf_prune.prune(model, hf_prune.MagnitudeConfig(target_params=0.7), inputs)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        hf_prune.save_pretrained(model, folder, report=report)
        loaded = type(model).from_pretrained(folder)
        same = torch.equal(model(**inputs).logits, aligned(loaded)(**inputs).logits)
    if not same:
        raise RuntimeError("a model that was saved and loaded computes something else.")
    return f"pruned {report.sparsity:.0%} of a tiny model, saved it, loaded it: the same outputs"


CHECKS = {"loading hook": _hook, "machine": _devices, "folders": _folders, "round trip": _round_trip}
"""Name -> what looks and says what it found; it raises where something is broken."""
