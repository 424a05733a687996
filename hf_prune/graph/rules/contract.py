"""Operations that sum products: everything in the way of a matrix product is an einsum."""

from __future__ import annotations

from typing import Any

from hf_prune.graph.axes import Dim, Shape, freeze, fresh, mark, size
from hf_prune.graph.dims import take, unify
from hf_prune.graph.rules.pointwise import Rule, broadcast

SUMMED = "summed"
"""Marks axes that are summed over without a weight to read them: a unit that no weight reads may still matter."""


def contract(flow: Any, node: Any, equation: str, *operands: tuple[Any, Shape]) -> Shape:
    """Einsum of `(node, shape)` operands: equal letters become one dim."""
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    found: dict[str, list[Dim]] = {}
    for letters, (_, shape) in zip(terms, operands, strict=True):
        for letter, dim in zip(letters, shape, strict=True):
            found.setdefault(letter, []).append(dim)
    joined = {letter: broadcast(tuple(dims)) for letter, dims in found.items()}
    if not any(flow.is_weight(source) for source, _ in operands):
        for letter, dims in found.items():
            mark(joined[letter], "heads" if len(dims) > 1 and letter in output else "head_width")
            if letter not in output:
                mark(joined[letter], SUMMED)
    for letters, (source, _) in zip(terms, operands, strict=True):
        for position, letter in enumerate(letters):
            if letter not in output:
                flow.consume(source, position)
    flow.cost(*joined.values())
    return Shape(joined[letter] for letter in output)


def linear(flow: Any, node: Any, x: Shape, weight: Shape, bias: Shape | None = None) -> Shape:
    rows = "ABCDEFGH"[: len(x) - 1]
    result = contract(flow, node, f"{rows}i,oi->{rows}o", (node.args[0], x), (node.args[1], weight))
    return _plus(result, bias)


def matmul(flow: Any, node: Any, x: Shape, y: Shape) -> Shape:
    left = "i" if len(x) == 1 else "mi"
    right = "i" if len(y) == 1 else "in"
    batch = "ABCDEFGH"[: max(len(x) - len(left), len(y) - len(right))]
    before, after = (batch[len(batch) - len(shape) + len(own) :] for shape, own in ((x, left), (y, right)))
    output = batch + (left + right).replace("i", "")
    return contract(flow, node, f"{before}{left},{after}{right}->{output}", (node.args[0], x), (node.args[1], y))


def addmm(flow: Any, node: Any, bias: Shape, x: Shape, y: Shape, **_: Any) -> Shape:
    letters = "mi,in->mn" if len(x) == 2 else "bmi,bin->bmn"
    return _plus(contract(flow, node, letters, (node.args[1], x), (node.args[2], y)), bias)


def einsum(flow: Any, node: Any, equation: str, operands: list[Shape], **_: Any) -> Shape:
    equation = equation.replace(" ", "")
    if "->" not in equation:
        letters = sorted(set(equation) - {",", "."})
        equation += "->" + "...,"[: 3 * ("..." in equation)] + "".join(c for c in letters if equation.count(c) == 1)
    terms = equation.split("->")[0].split(",")
    wide = max(len(shape) - len(term.replace("...", "")) for term, shape in zip(terms, operands, strict=True))
    inputs = []
    for term, shape in zip(terms, operands, strict=True):
        own = len(shape) - len(term.replace("...", ""))
        inputs.append(term.replace("...", "ΑΒΓΔΕΖ"[wide - own : wide]))
    output = equation.split("->")[1].replace("...", "ΑΒΓΔΕΖ"[:wide])
    return contract(flow, node, f"{','.join(inputs)}->{output}", *zip(node.args[1], operands, strict=True))


def attention(
    flow: Any, node: Any, query: Shape, key: Shape, value: Shape, mask: Shape | None = None, *_: Any, **kwargs: Any
) -> Shape:
    """`scaled_dot_product_attention`: shapes `(..., heads, length, width)`."""
    *batch, heads, length, width = query
    if size(heads) != size(key[-3]):
        grouped = key[-3] + fresh(size(heads) // size(key[-3]))
        unify(heads, grouped)
        unify(key[-3], value[-3])
    else:
        heads = broadcast((heads, key[-3], value[-3]))
    for mine, *others in zip(batch, key[:-3], value[:-3], strict=True):
        broadcast((mine, *others))
    unify(width, key[-1])
    freeze(broadcast((key[-2], value[-2])), "attended positions")
    if kwargs.get("scale") is None and node not in flow.scales:
        freeze(width, "its size sets the attention scale")
    if mask is not None:
        for own, dim in zip(mask[::-1], (key[-2], length, heads, *batch[::-1]), strict=False):
            broadcast((own, dim))
    mark(heads, "heads")
    mark(width, "head_width")
    mark(width, SUMMED)
    mark(value[-1], "head_width")
    flow.cost(*batch, heads, length, key[-2], width)
    flow.cost(*batch, heads, length, key[-2], value[-1])
    return Shape((*batch, heads, length, value[-1]))


def convolution(
    flow: Any, node: Any, x: Shape, weight: Shape, bias: Shape | None = None, *rest: Any, **_: Any
) -> Shape:
    """`conv{1,2,3}d(x, weight, bias, stride, padding, dilation, groups)`; weight `(out, in / groups, *kernel)`."""
    groups = rest[3] if len(rest) > 3 else 1
    channels, out = x[-len(weight) + 1], weight[0]
    if groups > 1:
        inside, outside = take(channels, int(groups)), take(out, int(groups))
        if inside is None or outside is None:
            freeze(channels + out + weight[1], "grouped convolution over a mixed dimension")
            channels = weight[1]
        else:
            channels = inside[1]
            unify(inside[0], outside[0])
            flow.equations.equate(groups, inside[0], "groups")
    else:
        flow.consume(node.args[1], 1)
    unify(channels, weight[1])
    return _convolved(flow, node, x, weight, _biased(out, bias), transposed=False)


def transposed_convolution(
    flow: Any, node: Any, x: Shape, weight: Shape, bias: Shape | None = None, *rest: Any, **_: Any
) -> Shape:
    """`conv_transpose{1,2,3}d(x, weight, bias, stride, padding, output_padding, groups)`.

    The weight is `(in, out / groups, *kernel)`.
    """
    groups = rest[3] if len(rest) > 3 else 1
    channels, out = x[-len(weight) + 1], weight[1]
    unify(channels, weight[0])
    if groups > 1:
        parts = take(channels, int(groups))
        if parts is None:
            freeze(channels + out, "grouped convolution over a mixed dimension")
            out = fresh(int(groups) * size(out), "grouped convolution over a mixed dimension")
        else:
            flow.equations.equate(groups, parts[0], "groups")
            out = parts[0] + out
    else:
        flow.consume(node.args[1], 0)
    return _convolved(flow, node, x, weight, _biased(out, bias), transposed=True)


def _convolved(flow: Any, node: Any, x: Shape, weight: Shape, out: Dim, transposed: bool) -> Shape:
    for dim in weight[2:]:
        freeze(dim, "convolution kernel")
    mark(out, "channels")
    batch, positions = x[: len(x) - len(weight) + 1], len(weight) - 2
    places = tuple(fresh(count, "position") for count in node.meta["val"].shape[-positions:])
    flow.cost(*batch, *(x[-positions:] if transposed else places), *weight)
    return Shape((*batch, out, *places))


def _biased(out: Dim, bias: Shape | None) -> Dim:
    if bias is not None:
        unify(bias[0], out)
    return out


def _plus(result: Shape, bias: Shape | None) -> Shape:
    """`result + bias`, where bias broadcasts from the right."""
    for own, dim in zip(bias[::-1] if bias else (), result[::-1], strict=False):
        broadcast((own, dim))
    return result


RULES: dict[str, Rule] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), addmm),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), transposed_convolution),
}
