"""Save a pruned model as a folder that `from_pretrained` opens, zeros packed, written whole or not at all."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.checkpoint.encodings import ENCODINGS, choose
from hf_prune.checkpoint.encodings import encode as encode_tensor
from hf_prune.checkpoint.format import QUANT_METHOD, CheckpointTable, Packed, parse, to_dict
from hf_prune.checkpoint.names import disk_names, packable, state_on_disk, table_on_disk
from hf_prune.checkpoint.staging import staged
from hf_prune.checkpoint.standalone import MODULE_FILE, auto_map, module_source
from hf_prune.graph.resize import shape_table
from hf_prune.graph.table import tensors_of
from hf_prune.types import PRUNING_FILE, PruneError, Report, ShapeTable

_OURS = re.compile(rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?|{PRUNING_FILE}|{MODULE_FILE}")


class Saves(Protocol):
    """A tokenizer, image processor or the like."""

    def save_pretrained(self, save_directory: str | Path) -> Any:
        """Write its files to a folder."""


def save_pretrained(
    model: PreTrainedModel,
    folder: str | Path,
    report: Report | None = None,
    *,
    encode: str = "auto",
    standalone: bool = False,
    processing_class: Saves | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write `model` to `folder`: config.json, safetensors, and pruning.json where there is a `report`.

    encode: "auto" packs each tensor with the kind that stores it smallest, a kind of `ENCODINGS` uses only that kind,
      "none" packs nothing; a tensor that packing would not make smaller stays plain. Packing keeps every bit, so -0.0
      stays as a value: mask with `masked_fill_`, not by multiplying with 0.
    standalone: also write code with which `trust_remote_code=True` loads the folder where hf_prune is not installed.
    max_shard_size: bytes or "5GB".

    An existing folder keeps its other files, and keeps all of them where saving fails.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel, got {type(model).__name__}; unwrap it first.")
    if encode not in ("auto", "none", *ENCODINGS):
        raise PruneError(f"encode must be one of auto, none, {', '.join(ENCODINGS)}, got {encode!r}.")
    narrow, names = narrow_table(model), disk_names(model)
    tensors, encodings = _pack(model, names, encode)
    table = CheckpointTable(table_on_disk(narrow, names), encodings)
    extras: dict[str, Any] = {"quantization_config": to_dict(table)} if table else {}
    if standalone:
        extras["auto_map"] = auto_map(model)
    with staged(Path(folder), is_ours) as new:
        with _config_with(model, extras):
            model.save_pretrained(new, state_dict=tensors, max_shard_size=max_shard_size, save_original_format=False)
        if report is not None:
            (new / PRUNING_FILE).write_text(report.to_json() + "\n", encoding="utf-8")
        if standalone:
            (new / MODULE_FILE).write_text(module_source(model), encoding="utf-8")
        if processing_class is not None:
            processing_class.save_pretrained(new)


def is_ours(name: str) -> bool:
    """Whether a save may write a file of that `name`, so that a later one without it must not leave it behind."""
    return _OURS.fullmatch(name) is not None


def mark(model: PreTrainedModel, recorded: ShapeTable | None = None) -> None:
    """Put what makes `model` narrow into its config, so that its own `save_pretrained` writes a folder that loads.

    recorded: what `graph.shrink` returned; what it says of attributes and buffers cannot all be found by comparing.
    """
    narrow = narrow_table(model, recorded)
    table = CheckpointTable(table_on_disk(narrow, disk_names(model)))
    if table:
        model.config.quantization_config = to_dict(table)


def narrow_table(model: PreTrainedModel, recorded: ShapeTable | None = None) -> ShapeTable:
    """How `model` is narrower than its config says. Raises `CheckpointError` while gates are attached."""
    before, recorded = earlier_table(model).narrow, recorded or ShapeTable()
    changed = {name: {**before.attributes.get(name, {}), **values} for name, values in recorded.attributes.items()}
    left = {
        name: tuple(before.buffers[name][entry] for entry in entries) if name in before.buffers else entries
        for name, entries in recorded.buffers.items()
    }
    known = ShapeTable({}, {**before.attributes, **changed}, {**before.buffers, **left})
    config = copy.deepcopy(model.config)
    return shape_table(model, lambda: type(model)(config), known)


def earlier_table(model: PreTrainedModel) -> CheckpointTable:
    """What the config says of an earlier pruning. Raises where it says that the model is quantized."""
    known = getattr(model.config, "quantization_config", None)
    if known is not None and (not isinstance(known, dict) or known.get("quant_method") != QUANT_METHOD):
        raise PruneError(
            f"model.config.quantization_config must be absent or hf_prune's, got {known!r}; a model has one "
            f"quantization method, so prune and save before quantizing."
        )
    return parse(known) if known else CheckpointTable()


def _pack(model: PreTrainedModel, names: dict[str, str], encode: str) -> tuple[dict[str, Tensor], dict[str, Packed]]:
    """The state dict as stored, with packed tensors in it, and how each of those is packed. `names`: `disk_names`."""
    plain = model.state_dict()
    parameters = tensors_of(model)
    for target, source in model.all_tied_weights_keys.items():
        # Packing each name by itself would break the tie that lets transformers store one of them.
        if target != source and target in plain and parameters[target] is parameters.get(source):
            del plain[target]
    follows = {suffix: packable(model, names, suffix) for encoding in ENCODINGS.values() for suffix in encoding.sides}
    packed: dict[str, Tensor] = {}
    encodings: dict[str, Packed] = {}
    for name, tensor in list(plain.items()):
        kind = _kind(tensor, encode)
        if kind is not None and all(name in follows[suffix] for suffix in ENCODINGS[kind].sides):
            packed |= {names[name] + suffix: part for suffix, part in encode_tensor(plain.pop(name), kind).items()}
            encodings[names[name]] = Packed(kind, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    return state_on_disk(model, plain, names) | packed, encodings


def _kind(tensor: Any, encode: str) -> str | None:
    if encode == "none" or not isinstance(tensor, Tensor) or tensor.is_meta:
        return None
    return choose(tensor, ENCODINGS if encode == "auto" else [encode])


@contextmanager
def _config_with(model: PreTrainedModel, extras: dict[str, Any]) -> Iterator[None]:
    """Have `model.config` carry `extras`, and no table of an earlier save, while it is written."""
    config = model.config
    model.config = copy.copy(config)
    vars(model.config).pop("quantization_config", None)
    vars(model.config).update(extras)
    try:
        yield
    finally:
        model.config = config
