"""The dimension algebra: splitting, cutting, joining and unifying dims, in place, for all tensors that have them."""

from __future__ import annotations

from collections.abc import Sequence

from hf_prune.graph.axes import Axis, Cat, Dim, Product, flat, freeze, fresh, is_frozen, leaves, parts, size


def concatenate(dims: Sequence[Dim]) -> Dim:
    """The dim that holds `dims` one after the other."""
    filled = tuple(dim for dim in dims if size(dim))
    if len(filled) == 1:
        return filled[0]
    whole = sum(size(dim) for dim in filled)
    if all(is_frozen(dim) for dim in filled):
        reasons = (leaf.frozen for dim in filled for leaf in leaves(dim))
        return fresh(whole, next(reasons, "number of concatenated parts"))
    return (Axis(whole, form=Cat(filled)),)


def split(root: Axis, left: int) -> bool:
    """Make the leaf or concatenation `root` a product `(left, size / left)`; False (and frozen) where it is neither."""
    right = root.size // left
    if root.form is None:
        root.form = Product((root.part(left), root.part(right)))
        return True
    pieces = parts((root,))
    if all(size(piece) % right == 0 for piece in pieces):
        return _split_pieces(root, pieces, right)
    return _split_runs(root, pieces, left, right)


def _split_pieces(root: Axis, pieces: list[Dim], right: int) -> bool:
    """Each piece is `(n, right)` with one shared `right`: heads of different streams, or equal parts as `(3, d)`."""
    divided = [pair for piece in pieces if (pair := divide(piece, right)) is not None]
    if len(divided) < len(pieces):
        return _give_up(root)
    shared = divided[0][1]
    for _, tail in divided[1:]:
        unify(shared, tail)
    heads = concatenate([head for head, _ in divided])
    if all(size(head) == 1 for head, _ in divided):
        heads = fresh(len(divided), "number of equal parts in one tensor")
    root.form = Product(heads + shared)
    return True


def _split_runs(root: Axis, pieces: list[Dim], left: int, right: int) -> bool:
    """The pieces fall into `left` runs of equal layout, e.g. four branches viewed as two pairs."""
    runs: list[list[Dim]] = [[]]
    for piece in pieces:
        if sum(map(size, runs[-1])) == right:
            runs.append([])
        runs[-1].append(piece)
    if any(sum(map(size, run)) != right for run in runs):
        return _give_up(root)
    shared = concatenate(runs[0])
    for run in runs[1:]:
        unify(shared, concatenate(run))
    root.form = Product(fresh(left, "number of equal runs in one tensor") + shared)
    return True


def _give_up(root: Axis) -> bool:
    freeze((root,), "viewed in blocks that its parts do not share")
    return False


def take(dim: Dim, wanted: int) -> tuple[Dim, Dim] | None:
    """`dim` as `(first, rest)` with `size(first) == wanted`, splitting a factor where needed; None where impossible."""
    first: list[Axis] = []
    rest, need = flat(dim), wanted
    while need > 1:
        if not rest:
            return None
        if need % rest[0].size == 0:
            need //= rest[0].size
            first.append(rest.pop(0))
        elif rest[0].size % need or not split(rest[0], need):
            return None
        else:
            rest = flat(rest)
    return tuple(first), tuple(rest)


def divide(dim: Dim, right: int) -> tuple[Dim, Dim] | None:
    """`dim` as `(rest, last)` with `size(last) == right`; the mirror image of `take`."""
    whole = size(dim)
    if right == 0 or whole % right:
        return None
    last: list[Axis] = []
    rest, need = flat(dim), right
    while need > 1:
        tail = rest[-1]
        if need % tail.size == 0:
            need //= tail.size
            last.insert(0, rest.pop())
        elif tail.size % need or not split(tail, tail.size // need):
            return None
        else:
            rest = flat(rest)
    return tuple(rest), tuple(last)


def cut(dim: Dim, at: int) -> tuple[Dim, Dim]:
    """`dim` as two dims laid end to end, the first of size `at`."""
    whole = size(dim)
    if at == 0 or at == whole:
        empty = fresh(0, "empty")
        return (empty, dim) if at == 0 else (dim, empty)
    factors = flat(dim)
    lead, tail = factors[0], tuple(factors[1:])
    step = size(tail)
    if is_frozen(dim) or at % step:
        freeze(dim, "cut inside a block")
        reason = next((leaf.frozen for leaf in leaves(dim)), "number of concatenated parts")
        return fresh(at, reason), fresh(whole - at, reason)
    if lead.form is None:
        first, second = (lead.part(at // step),), (lead.part(lead.size - at // step),)
        lead.form = Cat((first, second))
        return first + tail, second + tail
    return _cut_cat(lead, tail, at // step)


def _cut_cat(lead: Axis, tail: Dim, at: int) -> tuple[Dim, Dim]:
    """Cut a concatenation between two parts, or inside the part that `at` falls into."""
    before: list[Dim] = []
    after = parts((lead,))
    while at:
        piece = after.pop(0)
        if size(piece) > at:
            piece, rest = cut(piece, at)
            after.insert(0, rest)
        before.append(piece)
        at -= size(piece)
    return concatenate(before) + tail, concatenate(after) + tail


def regroup(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """A view: forget the borders between `dims`, then cut the factor sequence anew into `sizes`."""
    rest: Dim = tuple(axis for dim in dims for axis in flat(dim))
    head: list[Dim] = []
    tail: list[Dim] = []
    sizes = list(sizes)
    while sizes and (taken := take(rest, sizes[0])) is not None:
        head.append(taken[0])
        rest = taken[1]
        sizes.pop(0)
    while sizes and (taken := divide(rest, sizes[-1])) is not None:
        tail.insert(0, taken[1])
        rest = taken[0]
        sizes.pop()
    reason = "viewed across its factors"
    freeze(rest, reason)
    return head + [fresh(wanted, reason) for wanted in sizes] + tail


def unify(x: Dim, y: Dim) -> None:
    """Make two dims of equal size one; where no common refinement exists, freeze both."""
    while True:
        left, right = flat(x), flat(y)
        while left and right and left[0] is right[0]:
            left, right = left[1:], right[1:]
        while left and right and left[-1] is right[-1]:
            left, right = left[:-1], right[:-1]
        if not left and not right:
            return
        if not left or not right or is_frozen(left) or is_frozen(right) or not _merge_heads(left[0], right[0]):
            reason = next(
                (leaf.frozen for leaf in leaves(left + right) if leaf.frozen), "two uses split it differently"
            )
            freeze(left, reason)
            freeze(right, reason)
            return
        x, y = tuple(left), tuple(right)


def _merge_heads(a: Axis, b: Axis) -> bool:
    if a.size == b.size:
        _union(a, b)
        return True
    if a.size % b.size == 0:
        return split(a, b.size)
    return b.size % a.size == 0 and split(b, a.size)


def _union(a: Axis, b: Axis) -> None:
    """Make two different roots of equal size one."""
    if b.form is None:
        a, b = b, a
    if a.form is not None:
        _align(parts((a,)), parts((b,)))
    a.form = b
    for leaf in leaves((b,)):
        leaf.frozen = leaf.frozen or a.frozen
        leaf.normalised |= a.normalised
        leaf.marks |= a.marks


def _align(left: list[Dim], right: list[Dim]) -> None:
    """Unify two concatenations part by part, cutting both at each other's borders."""
    while left and right:
        a, b = left.pop(0), right.pop(0)
        if size(a) > size(b):
            a, rest = cut(a, size(b))
            left.insert(0, rest)
        elif size(b) > size(a):
            b, rest = cut(b, size(a))
            right.insert(0, rest)
        unify(a, b)
