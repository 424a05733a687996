"""The sizes that layers of torch and transformers keep in attributes beside their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

Size = int | tuple[int, ...]


def sync_attributes(module: nn.Module) -> None:
    """Set `in_features`, `groups`, `normalized_shape`, ... of `module` to what its tensors say.

    Knows torch's and transformers' own layers and leaves any other module alone. `groups` follows only where it
    equalled `in_channels` (depthwise); whoever removes whole groups of several channels sets `groups` first.
    """
    read = next((read for kind, read in _READERS if isinstance(module, kind)), None)
    if read is not None:
        vars(module).update(read(module))


def may_be_empty(module: nn.Module) -> bool:
    """Whether the tensors of `module` may have a dimension of size 0: torch runs an empty Linear, not an empty conv."""
    return not isinstance(module, (_ConvNd, _NormBase, nn.Embedding))


def fixed_dims(module: nn.Module) -> int:
    """First dimension of a weight of `module` that keeps its size: 2 for a conv, whose padding fits its kernel."""
    return 2 if isinstance(module, _ConvNd) else 1 << 30


def _linear(module: Any) -> dict[str, Size]:
    rows, columns = module.weight.shape
    return {"out_features": rows, "in_features": columns}


def _conv1d(module: Any) -> dict[str, Size]:
    columns, rows = module.weight.shape
    return {"nf": rows, "nx": columns}


def _conv(module: Any) -> dict[str, Size]:
    # (out, in / groups, *kernel), or transposed (in, out / groups, *kernel); depthwise, every input has its own group.
    rows, columns = module.weight.shape[:2]
    groups = module.groups
    if 1 < groups == module.in_channels:
        groups = rows if module.transposed else rows * module.in_channels // module.out_channels
    inputs, outputs = (rows, columns * groups) if module.transposed else (columns * groups, rows)
    return {"in_channels": inputs, "out_channels": outputs, "groups": groups}


def _batch_norm(module: Any) -> dict[str, Size]:
    tensor = module.running_mean if module.weight is None else module.weight
    return {} if tensor is None else {"num_features": len(tensor)}


def _group_norm(module: Any) -> dict[str, Size]:
    return {} if module.weight is None else {"num_channels": len(module.weight)}


def _layer_norm(module: Any) -> dict[str, Size]:
    return {} if module.weight is None else {"normalized_shape": tuple(module.weight.shape)}


def _embedding(module: Any) -> dict[str, Size]:
    rows, columns = module.weight.shape
    return {"num_embeddings": rows, "embedding_dim": columns}


_READERS: tuple[tuple[Any, Callable[[Any], dict[str, Size]]], ...] = (
    (nn.Linear, _linear),
    (Conv1D, _conv1d),
    (_ConvNd, _conv),
    (_NormBase, _batch_norm),
    (nn.GroupNorm, _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.Embedding, _embedding),
)
