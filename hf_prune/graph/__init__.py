"""Structural pruning: find what must be cut together, price a plan, shrink a model to it, check the result.

trace (with provenance, traced_int, attributes, caches): one run as a graph that knows where sizes come from.
axes, dims: the algebra of dimensions. flow (with rules and equations): the dims of every tensor of the run.
groups, prices: what can be pruned, and what any plan costs. latency (with work): what it takes, measured.
shrink (with kept): the cut, and its inverse. constants, fold, scales: what keeps it exact.
verify: what is checked before and after.
lazy: the graph of a run, traced when it is first looked at.
writers: which layers a group comes from, and whether it can be silenced at them.
neighbours: which layers each layer hears and is heard by, and what scales the channels between them.
stacks, depth: which whole layers can go, and how they are taken out.
resize, table, sizes: the same shapes again on a freshly built model.
"""

from hf_prune.graph.example import example_inputs
from hf_prune.graph.fold import dead_units
from hf_prune.graph.graph import Graph, trace
from hf_prune.graph.groups import unit_indices
from hf_prune.graph.kept import kept_entries, select, spread
from hf_prune.graph.prices import Price
from hf_prune.graph.shrink import narrow, shrink, widen
from hf_prune.graph.verify import check_exactness, check_plan, mask

__all__ = [
    "Graph",
    "Price",
    "check_exactness",
    "check_plan",
    "dead_units",
    "example_inputs",
    "kept_entries",
    "mask",
    "narrow",
    "select",
    "shrink",
    "spread",
    "trace",
    "unit_indices",
    "widen",
]
