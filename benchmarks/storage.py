"""How small a sparse checkpoint is, and what decoding costs at load: BERT-base with 90 % zeros in its encoder.

    python benchmarks/storage.py            # BERT-base; writes benchmarks/results/storage.json
    python benchmarks/storage.py --quick    # a tiny model; prints only

Weights are random and zeros fall anywhere: sizes and times depend on the shapes and the sparsity, not on what was
learned. Plain and packed checkpoints are loaded and run once in turn, in one process with one thread, so that a busy
machine slows both alike: with the file in the page cache, where a plain one is only mapped and none of its pages are
written, and read from disk; on one short sentence, one of common length, and a batch of 32 times 64 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

import hf_prune
from hf_prune.checkpoint import save_pretrained
from hf_prune.timing import compare, machine

RESULTS = Path(__file__).parent / "results" / "storage.json"
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 500,
}
SPARSITY = 0.9
INPUT_SHAPES = ((1, 32), (1, 128), (32, 64))
GOAL = 1.5
FORMATS = ("none", "gap8", "bitmask")


def sparse_bert(config: BertConfig) -> tuple[BertForSequenceClassification, list[str]]:
    """A random BERT whose encoder weights are `SPARSITY` zeros, and the names of those weights."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    weights = {name: weight for name, weight in model.named_parameters() if "encoder" in name and weight.ndim == 2}
    with torch.no_grad():
        for weight in weights.values():
            weight.masked_fill_(torch.rand_like(weight) < SPARSITY, 0.0)
    return model, list(weights)


def stored_bytes(folder: Path, names: list[str]) -> int:
    """Bytes of the tensors `names` and of their side tensors in a checkpoint."""
    parts = {name + suffix for name in names for suffix in ("", "_gaps", "_bitmask")}
    tensors = load_file(folder / "model.safetensors")
    return sum(tensor.nbytes for name, tensor in tensors.items() if name in parts)


def forget(file: Path) -> None:
    """Drop `file` from the page cache, so that the next read comes from disk."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(folder: Path, cached: bool) -> BertForSequenceClassification:
    if not cached:
        forget(folder / "model.safetensors")
    return BertForSequenceClassification.from_pretrained(folder)


@torch.no_grad()
def load_and_run(folder: Path, cached: bool, shape: tuple[int, int]) -> torch.Tensor:
    """What the loaded model says."""
    return load(folder, cached)(torch.arange(shape[1]).expand(shape)).logits


def measure(
    folders: dict[str, Path], shape: tuple[int, int], repeats: int, cached: bool
) -> dict[str, dict[str, float]]:
    """Median seconds per format and their ratio to plain, the formats taken in turn."""
    reference = load_and_run(folders["none"], cached, shape)
    for name, folder in folders.items():
        if not torch.equal(load_and_run(folder, cached, shape), reference):
            raise RuntimeError(f"{name} does not give the logits of the plain checkpoint")
    loads = {f"load {name}": partial(load, folder, cached) for name, folder in folders.items()}
    totals = {f"total {name}": partial(load_and_run, folder, cached, shape) for name, folder in folders.items()}
    seconds = {key: each.median_ms / 1e3 for key, each in compare({**loads, **totals}, rounds=repeats).items()}
    return {
        name: {
            "load_seconds": seconds[f"load {name}"],
            "load_and_first_forward_seconds": seconds[f"total {name}"],
            "load_and_first_forward_over_plain": seconds[f"total {name}"] / seconds["total none"],
        }
        for name in folders
    }


def run(config: BertConfig, repeats: int) -> dict[str, Any]:
    """Sizes and times of every format."""
    model, names = sparse_bert(config)
    parameters = dict(model.named_parameters())
    dense_bytes = sum(parameters[name].nbytes for name in names)
    with tempfile.TemporaryDirectory() as root:
        folders = {name: Path(root) / name for name in FORMATS}
        for name, folder in folders.items():
            save_pretrained(model, folder, encode=name)
        times = {
            f"{place}, {shape[0]} x {shape[1]} tokens": measure(folders, shape, repeats, place == "cached")
            for place in ("cached", "disk")
            for shape in INPUT_SHAPES
        }
        formats = {
            name: {
                "file_bytes": (folder / "model.safetensors").stat().st_size,
                "config_bytes": (folder / "config.json").stat().st_size,
                "encoder_weights_times_smaller": dense_bytes / stored_bytes(folder, names),
                "times": {condition: rows[name] for condition, rows in times.items()},
            }
            for name, folder in folders.items()
        }
    encoder = sum(parameters[name].numel() for name in names)
    return {"encoder_weights": encoder, "parameters": sum(map(torch.numel, parameters.values())), "formats": formats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny model, two repeats, nothing written")
    parser.add_argument("--repeats", type=int, default=7, help="loads of each format")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    result = {
        "command": " ".join(["python", "benchmarks/storage.py", *sys.argv[1:]]),
        "machine": {"processor": machine(), "threads": torch.get_num_threads(), "system": platform.platform()},
        "versions": {
            "hf_prune": hf_prune.__version__,
            **{module.__name__: module.__version__ for module in (torch, transformers, safetensors)},
        },
        "sparsity": SPARSITY,
        "goal": f"load and first forward at most {GOAL} of plain",
        "repeats": 2 if args.quick else args.repeats,
    }
    result |= run(BertConfig(**TINY) if args.quick else BertConfig(), result["repeats"])
    text = json.dumps(result, indent=2)
    print(text)
    if not args.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
