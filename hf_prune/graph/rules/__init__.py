"""What each ATen operation does to dims: a table from the operation's name to its rule.

A rule takes the flow, the node and the node's arguments, with a `Shape` for each tensor and a `TracedInt` for each
number of known source. It unifies, splits and freezes dims and returns the shape of the result (a list where there are
several). An operation without a rule is not guessed: `rule_for` gives None and the flow freezes what it touches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from hf_prune.graph.rules import contract, create, index, reduce, spatial, view
from hf_prune.graph.rules.pointwise import POINTWISE, Rule, pointwise

RULES: dict[str, Rule] = {
    **contract.RULES,
    **create.RULES,
    **index.RULES,
    **reduce.RULES,
    **spatial.RULES,
    **view.RULES,
    **dict.fromkeys(POINTWISE, pointwise),
}


def name_of(target: Any) -> str:
    """`linear` for `aten.linear.default`; the plain name of any other function."""
    return target.overloadpacket.__name__ if isinstance(target, OpOverload) else target.__name__


def twin_name(target: Any) -> str:
    """`name_of`; of an operation that works in place, the name of its twin that does not."""
    name = name_of(target)
    return name if name.startswith("__") else name.rstrip("_")


def rule_for(target: Any) -> Rule | None:
    """The rule of an operation; one that works in place follows the rule of its twin."""
    if not isinstance(target, OpOverload):
        return None
    twin = twin_name(target)
    found = RULES.get(name_of(target)) or RULES.get(twin)
    if found or torch.Tag.pointwise in target.tags:
        return found or pointwise
    packet = getattr(torch.ops.aten, twin, None)
    tagged = packet and any(torch.Tag.pointwise in getattr(packet, each).tags for each in packet.overloads())
    return pointwise if tagged else None
