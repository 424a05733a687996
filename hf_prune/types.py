"""The words of the design as data: groups, plans, phases, papers and the table of narrow shapes.

Nothing here imports another module of the package, so every other module may import this one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import Tensor

Schedule = Callable[[float], float]
"""Progress of the run in [0, 1] -> fraction of the goal reached at that point (see `parts.schedules`)."""

Keep = Tensor
"""Bool tensor of shape `(units,)`; True stays."""

Scores = Tensor
"""Float tensor of shape `(units,)`; higher stays."""

Plan = dict[str, Tensor]
"""Group or weight name -> `Keep`."""


class PruneError(ValueError):
    """A request that cannot be carried out; the message says what, got, expected and what to do."""


class CheckpointError(PruneError):
    """A checkpoint whose tables or tensors are malformed; raised before anything is allocated."""


@dataclass(frozen=True)
class Member:
    """One occurrence of a group: dimension `dim` of `tensor` holds `(outer, group, inner)` in row-major order.

    The occurrence begins at index `start` and repeats every `pitch` indices, which differs from `units * inner` where
    the dimension is a concatenation with other groups (fused query, key and value). `graph.unit_indices` lists the
    indices of each unit. A group may occur several times in one dimension (both halves of a gated projection).
    `reads` is True where the tensor consumes the group (input columns) and False where it produces it (output rows,
    biases, norm parameters).
    """

    tensor: str
    dim: int
    outer: int = 1
    inner: int = 1
    reads: bool = False
    start: int = 0
    pitch: int | None = None
    """None: the group fills the dimension, `units * inner`."""


@dataclass(frozen=True)
class Group:
    """One dimension of size `size` shared by several tensors; its units can only be removed together.

    `role` is what the units are: "heads", "head_width", "channels", "stream" (a residual stream) or "neurons".
    `normalised` marks dimensions under LayerNorm-like statistics, where removing units also changes what stays.
    `frozen` is None, or the reason why the group must keep its size.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    normalised: bool = False
    frozen: str | None = None
    role: str = "neurons"


@dataclass(frozen=True)
class StackLayer:
    """A layer that can go whole: with all of its parameters zero it hands on what it is given."""

    index: int
    """Place in its stack."""
    parameters: tuple[str, ...]
    multiply_adds: float
    """Of one sample."""


@dataclass(frozen=True)
class LayerStack:
    """Residual layers that run one after another; those in `layers` are the units that a plan may drop.

    `name` is the path of the module list, `size` the number of all its layers; `frozen` says why each other one stays.
    `normalised` marks stacks with a norm on the residual path (post-norm), where removing a layer is not exact.
    """

    name: str
    size: int
    layers: tuple[StackLayer, ...]
    frozen: Mapping[int, str] = field(default_factory=dict)
    normalised: bool = False


class Structure(Protocol):
    """How one or several weights divide into units (see `parts.structures`)."""

    @property
    def name(self) -> str:
        """Key in scores, plans and reports."""

    @property
    def units(self) -> int:
        """How many units there are."""

    @property
    def unit_size(self) -> int:
        """Weights (not biases or norm parameters) in one unit."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that the units are made of."""

    @property
    def producers(self) -> tuple[str, ...]:
        """Those of `tensors` whose outputs the units are; the others read them."""

    def view(self, weight: Tensor, tensor: str) -> Tensor:
        """`weight` regrouped as `(units, elems)`; `tensor` says which of `self.tensors` it is."""

    def expand(self, keep: Tensor, tensor: str) -> Tensor:
        """One value per unit, shape `(units,)`, broadcast to the shape of `tensor` (or a shape that broadcasts)."""


@dataclass(frozen=True)
class Paper:
    """Where a method comes from. `status` is "read", or "reconstruction" where the full text could not be had."""

    title: str
    authors: str
    year: int
    bibtex: str
    arxiv: str | None = None
    status: str = "read"

    def __post_init__(self) -> None:
        if self.status not in ("read", "reconstruction"):
            raise ValueError(f"Paper.status must be 'read' or 'reconstruction', got {self.status!r}.")


@dataclass(frozen=True)
class Phase:
    """What trains during a stretch of steps. `trainable` takes a parameter name; None means every parameter."""

    name: str
    trainable: Callable[[str], bool] | None = None
    penalties_active: bool = True
    lr_scale: float = 1.0


@dataclass(frozen=True)
class ShapeTable:
    """How a narrow model differs from what its config builds; replayed by the loader.

    `shapes`: tensor name -> narrow shape. `attributes`: module name -> attribute -> int or tuple of ints; an attribute
    named `config.x` sets `x` in a copy of the config that this module alone owns. `buffers`: one-dimensional buffer
    that no checkpoint holds, such as the frequencies of rotary embeddings -> those of its entries that stay.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]] = field(default_factory=dict)
    buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.shapes or self.attributes or self.buffers)


PRUNING_FILE = "pruning.json"


@dataclass(frozen=True)
class Report:
    """What a finished run did; the content of `PRUNING_FILE`."""

    method: str
    config: dict[str, Any]
    paper: dict[str, Any]
    sparsity: float
    """Fraction of prunable weights removed."""
    layers: dict[str, dict[str, Any]]
    """Weight or group name -> `units`, `kept`, `structure`; a group's `role` and `indices` of kept units too."""
    parameters: dict[str, int]
    """`dense`: all of the model before; `prunable`: weights that could have gone; `kept`: those that stayed."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What the finished model scored, named as `Trainer` names it: `eval_accuracy`, `test_loss`."""
    frozen: dict[str, str] = field(default_factory=dict)
    """Group name -> why it kept its size."""
    prices: dict[str, dict[str, float]] = field(default_factory=dict)
    """`multiply_adds` (per sample), `parameters`, `bytes` -> `dense`, `kept`; empty where no group could be pruned."""
    latency: dict[str, Any] = field(default_factory=dict)
    """`machine`, and `dense` and `kept`, each with `median_ms`, `low_ms`, `high_ms`; empty where nothing was timed."""
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`train`, and the prefix of each entry in `metrics` -> `name`, `id` on the Hub, `config`, `split`, `rows`."""
    training: dict[str, Any] = field(default_factory=dict)
    """What `Trainer` ran with; empty where nothing was trained."""
    base_model: str | None = None
    """Hub id of the model that was pruned, where it came from there."""
    run: dict[str, Any] = field(default_factory=dict)
    """What the method tells of its run."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return asdict(self)

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)
