"""How small a sparse checkpoint is, and what decoding costs at load: BERT-base with 90 % zeros in its encoder.

    python benchmarks/storage.py            # BERT-base; writes benchmarks/results/storage.json
    python benchmarks/storage.py --quick    # a tiny model; prints only

Weights are random and zeros fall anywhere: sizes and times depend on the shapes and the sparsity, not on what was
learned. Dense and packed checkpoints are loaded in turn in one process with one thread, files in the page cache, so that
a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

import hf_prune
from hf_prune.checkpoint import save_pretrained

RESULTS = Path(__file__).parent / "results" / "storage.json"
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 500}
SPARSITY = 0.9
INPUT_SHAPE = (1, 32)
FORMATS = ("none", "gap8", "bitmask")


def sparse_bert(config: BertConfig) -> tuple[BertForSequenceClassification, list[str]]:
    """A random BERT whose encoder weights are `SPARSITY` zeros, and the names of those weights."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    weights = {f"{name}.weight": module for name, module in model.named_modules() if "encoder" in name and hasattr(module, "in_features")}
    with torch.no_grad():
        for module in weights.values():
            module.weight.masked_fill_(torch.rand_like(module.weight) < SPARSITY, 0.0)
    return model, list(weights)


def stored_bytes(folder: Path, names: list[str]) -> int:
    """Bytes of the tensors `names` and of their side tensors in a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    return sum(tensor.nbytes for name, tensor in tensors.items() if name.removesuffix("_gaps").removesuffix("_bitmask") in names)


def load_and_run(folder: Path) -> tuple[float, float, torch.Tensor]:
    """Seconds to load, seconds to load and run once, and what the model said."""
    ids = torch.arange(INPUT_SHAPE[1]).expand(INPUT_SHAPE)
    start = time.perf_counter()
    model = BertForSequenceClassification.from_pretrained(folder)
    loaded = time.perf_counter()
    with torch.no_grad():
        logits = model(ids).logits
    return loaded - start, time.perf_counter() - start, logits


def measure(folders: dict[str, Path], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds per format, the formats taken in turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in folders}
    reference = load_and_run(folders["none"])[2]
    for _ in range(repeats):
        for name, folder in folders.items():
            *seconds, logits = load_and_run(folder)
            if not torch.equal(logits, reference):
                raise RuntimeError(f"{name} does not give the logits of the plain checkpoint")
            times[name].append((seconds[0], seconds[1]))
    return {
        name: {
            "load_seconds": statistics.median(load for load, _ in pairs),
            "load_and_first_forward_seconds": statistics.median(both for _, both in pairs),
        }
        for name, pairs in times.items()
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
        formats: dict[str, dict[str, float]] = measure(folders, repeats)
        for name, folder in folders.items():
            plain = formats["none"]
            formats[name] |= {
                "file_bytes": (folder / "model.safetensors").stat().st_size,
                "config_bytes": (folder / "config.json").stat().st_size,
                "encoder_weights_times_smaller": dense_bytes / stored_bytes(folder, names),
                "load_and_first_forward_over_plain": formats[name]["load_and_first_forward_seconds"]
                / plain["load_and_first_forward_seconds"],
            }
    encoder = sum(parameters[name].numel() for name in names)
    return {"encoder_weights": encoder, "parameters": sum(map(torch.numel, parameters.values())), "formats": formats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny model, two repeats, nothing written")
    parser.add_argument("--repeats", type=int, default=9, help="loads of each format")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    result = {
        "command": " ".join(["python", "benchmarks/storage.py", *sys.argv[1:]]),
        "machine": {"processor": _processor(), "threads": torch.get_num_threads(), "system": platform.platform()},
        "versions": {
            "hf_prune": hf_prune.__version__,
            **{module.__name__: module.__version__ for module in (torch, transformers, safetensors)},
        },
        "sparsity": SPARSITY,
        "input_shape": INPUT_SHAPE,
        "repeats": 2 if args.quick else args.repeats,
    }
    result |= run(BertConfig(**TINY) if args.quick else BertConfig(), result["repeats"])
    text = json.dumps(result, indent=2)
    print(text)
    if not args.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text + "\n", encoding="utf-8")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
