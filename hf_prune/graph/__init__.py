"""Structural pruning: find what must be cut together, price a plan, shrink a model to it, check the result."""

from hf_prune.graph.example import example_inputs
from hf_prune.graph.fold import dead_units
from hf_prune.graph.graph import Graph, trace
from hf_prune.graph.groups import unit_indices
from hf_prune.graph.prices import Price
from hf_prune.graph.shrink import shrink
from hf_prune.graph.verify import check_exactness, mask

__all__ = [
    "Graph",
    "Price",
    "check_exactness",
    "dead_units",
    "example_inputs",
    "mask",
    "shrink",
    "trace",
    "unit_indices",
]
