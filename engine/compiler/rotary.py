"""Rotary embeddings as Inductor compiles them well: rewrites of a block's graph, each for one way of writing them.

Pairs or halves of a row are turned as a whole instead of being stacked, written into or multiplied as complex numbers;
then each pair is read and written as one word, and the parts of a sequence are turned, with their norm, before they
are put together. The arithmetic is that of the graph; only a norm's sum adds the two of a pair first.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from engine.compiler.nodes import CAST, VIEWS, add, alike, aten, like, prims, tensor, times

_WORDS = {2: (torch.int16, torch.int32), 4: (torch.int32, torch.int64)}
"""Bytes of a number -> integers of its size and of twice its size."""
_PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten._scaled_mm.default})
_BY_ELEMENT = frozenset(
    {
        CAST,
        aten.add.Tensor,
        aten.add.Scalar,
        aten.mul.Tensor,
        aten.neg.default,
        aten.pow.Tensor_Scalar,
        aten.rsqrt.default,
        aten.sub.Tensor,
    }
)


def turned_pairs(graph: Graph) -> int:
    """stack([-b, a]) of pairs (a, b) is the reversed pair times (-1, 1): nothing is put together. Gives how many.

    As diffusers writes FLUX's rotary embedding (`apply_rotary_emb`).
    """
    found = 0
    for turned in list(graph.nodes):
        parts = _put_together(turned)
        if parts is None or len(parts) != 2:
            continue
        first, second = parts
        last = (-1, turned.meta["val"].ndim - 1)
        if any(part.target is not aten.unsqueeze.default or part.args[1] not in last for part in (first, second)):
            continue
        if turned.args[1:] not in ((last[0],), (last[1],)):
            continue
        negative, a = first.args[0], second.args[0]
        b = negative.args[0] if negative.target is aten.neg.default else None
        pairs = _part(a, 0)
        if b is None or _part(b, 1) is not pairs:
            continue
        if pairs is None or not alike(pairs, turned):
            continue
        with graph.inserting_before(turned):
            reverse = add(graph, prims.rev.default, pairs, [pairs.meta["val"].ndim - 1])
            turned.replace_all_uses_with(times(graph, reverse, _signs(graph, pairs.meta["val"])))
        graph.erase_node(turned)
        found += 1
    graph.eliminate_dead_code()
    return found


def _put_together(whole: Node) -> list[Node] | None:
    """The parts that `whole` puts together, if each has as many dimensions as it, as an empty vector need not have."""
    parts = whole.args[0] if whole.target is aten.cat.default else None
    if not isinstance(parts, list | tuple) or any(tensor(part) is None for part in parts):
        return None
    return list(parts) if all(part.meta["val"].ndim == whole.meta["val"].ndim for part in parts) else None


def _part(node: Node, index: int) -> Node | None:
    """What `node` is the part `index` of, taken apart along its last dimension into two."""
    if node.target is not operator.getitem or node.args[1] != index:
        return None
    parts = node.args[0]
    if parts.target is not aten.unbind.int or parts.args[1:] not in ((-1,), (parts.args[0].meta["val"].ndim - 1,)):
        return None
    return parts.args[0] if parts.args[0].meta["val"].shape[-1] == 2 else None


def turned_halves(graph: Graph) -> int:
    """What is added to the halves (a, b) of x * c in place, -s * b and s * a, is (b, a) * s * (-1, 1); says how many.

    As diffusers writes LTX-2's rotary embedding (`apply_split_rotary_emb`). Inductor computes what is written into a
    half under a mask, and all that it is made of, the norm too, anew for each: 35 loads in a kernel where 10 do.
    """
    found = 0
    for whole in list(graph.nodes):
        second = _added_to_half(whole, 1)
        first = _added_to_half(second[0], 0) if second else None
        if first is None or second is None or first[1] != second[1] or first[3] is not second[3]:
            continue
        (product, dimension, negative, x), sine = first, second[2]
        value = x.meta["val"]
        fits = alike(product, x) and alike(product, whole) and value.ndim == sine.meta["val"].ndim
        if not fits or sine.meta["val"].shape[dimension] != 1 or sine.meta["val"].dtype != value.dtype:
            continue
        if negative.target is not aten.neg.default or negative.args[0] is not sine:
            continue
        with graph.inserting_before(whole):
            signs = add(graph, aten.reshape.default, _signs(graph, value), [2] + [1] * (value.ndim - 1 - dimension))
            turned = times(graph, add(graph, prims.rev.default, x, [dimension]), times(graph, sine, signs))
            whole.replace_all_uses_with(add(graph, aten.add.Tensor, product, turned))
        graph.erase_node(whole)
        found += 1
    graph.eliminate_dead_code()
    return found


def _added_to_half(node: Node, half: int) -> tuple[Node, int, Node, Node] | None:
    """What `node` is but for one half, their dimension, and the factor and the x whose other half were added there.

    As `addcmul_` on a slice is taken apart, with its own factor of 1.
    """
    dimension = _place(node, aten.slice_scatter.default, 2, half)
    if dimension is None:
        return None
    into, total = node.args[:2]
    term = total.args[1] if total.target is aten.add.Tensor and not total.kwargs else None
    if not isinstance(term, Node) or term.target is not aten.mul.Tensor:
        return None
    before, (factor, other) = total.args[0], term.args
    if tensor(factor) is not None and factor.target is aten.mul.Tensor and factor.args[1] == 1:
        factor = factor.args[0]
    if tensor(factor) is None or tensor(other) is None:
        return None
    if _place(before, aten.slice.Tensor, 1, half) != dimension or before.args[0] is not into:
        return None
    if _place(other, aten.slice.Tensor, 1, 1 - half) != dimension:
        return None
    return into, dimension, factor, other.args[0]


def _place(node: object, target: object, first: int, place: int) -> int | None:
    """The dimension of two along which `node` takes or writes this place, as its arguments from the `first` on say."""
    if not isinstance(node, Node) or node.target is not target:
        return None
    defaults: tuple[Any, ...] = (0, None, None, 1)
    dimension, start, end, step = (*tuple(node.args[first:]), *defaults[len(node.args) - first :])
    shape = node.args[0].meta["val"].shape
    of_two = shape[dimension] == 2 and isinstance(start, int) and isinstance(end, int)
    return dimension % len(shape) if of_two and step == 1 and (start, min(end, 2)) == (place, place + 1) else None


def real_rotations(graph: Graph) -> int:
    """(a + bi)(c + di) = (ac - bd) + (bc + ad)i, on real tensors of pairs; returns how many products.

    As (a, b) times (c, c) plus (b, a) times (-d, d), so that nothing large is put together from parts. Only for
    products of `view_as_complex` whose result is viewed as real again, as rotary embeddings are written.
    """
    rotated = 0
    for real in list(graph.nodes):
        product = real.args[0] if real.target is aten.view_as_real.default else None
        if product is None or product.target is not aten.mul.Tensor or len(product.users) > 1:
            continue
        pairs, turns = product.args
        turn = tensor(turns)
        if pairs.target is not aten.view_as_complex.default or turn is None or turn.is_conj():
            continue
        if turn.dtype != product.meta["val"].dtype or not 0 < turn.ndim <= product.meta["val"].ndim:
            continue
        with graph.inserting_before(real):
            x, turn = pairs.args[0], add(graph, aten.view_as_real.default, turns)
            cosine, sine = (add(graph, aten.slice.Tensor, turn, -1, part, part + 1) for part in (0, 1))
            signed = times(graph, sine, _signs(graph, sine.meta["val"]))
            kept = add(graph, aten.mul.Tensor, x, cosine)
            crossed = add(graph, aten.mul.Tensor, add(graph, prims.rev.default, x, [x.meta["val"].ndim - 1]), signed)
            real.replace_all_uses_with(add(graph, aten.add.Tensor, kept, crossed))
        graph.erase_node(real)
        rotated += 1
    graph.eliminate_dead_code()
    return rotated


def _signs(graph: Graph, like: torch.Tensor) -> Node:
    """(-1, 1) in the type of `like`, computed where it is needed."""
    place = graph.call_function(
        prims.iota.default,
        (2,),
        {"start": 0, "step": 1, "dtype": torch.int32, "device": like.device, "requires_grad": False},
    )
    place.meta["val"] = like.new_empty(2, dtype=torch.int32)
    sign = add(graph, aten.sub.Tensor, add(graph, aten.mul.Tensor, place, 2), 1)
    return add(graph, CAST, sign, like.dtype)


def turned_before_put_together(graph: Graph) -> int:
    """What turns the pairs of several parts put together turns those of each part, and puts them together then.

    Gives how often. What makes a part, its norm, is computed in the same kernel then and is not written before.
    """
    found = 0
    for turn in [node for node in graph.nodes if node.target is prims.rev.default]:
        end, whole = _result(turn), turn.args[0]
        while whole.target in VIEWS or whole.target is CAST:
            whole = whole.args[0]
        parts = _put_together(whole)
        if end is None or parts is None:
            continue
        dimension = (*whole.args, 0)[1] % whole.meta["val"].ndim
        between = _between(whole, end, dimension)
        if between is None or not all(isinstance(n, int) for part in parts for n in part.meta["val"].shape):
            continue
        lengths = [part.meta["val"].shape[dimension] for part in parts]
        made, start = [], 0
        with graph.inserting_before(end):
            for part, length in zip(parts, lengths, strict=True):
                made.append(_of_part(graph, between, {whole: part}, dimension, start, length))
                start += length
            end.replace_all_uses_with(add(graph, aten.cat.default, made, dimension))
        graph.erase_node(end)
        found += 1
    graph.eliminate_dead_code()
    return found


def _between(whole: Node, end: Node, dimension: int) -> list[Node] | None:
    """The operations that lead from `whole` to `end` in their order, if they lead nowhere else and mix no two rows."""
    between, shape = {whole: None}, whole.meta["val"].shape[: dimension + 1]
    for node in whole.graph.nodes:
        if between.keys().isdisjoint(node.all_input_nodes):
            continue
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.shape[: dimension + 1] != shape or value.ndim <= dimension + 1:
            return None
        turned = node.target is prims.rev.default and min(node.args[1]) > dimension
        if node.kwargs or not (turned or node.target in _BY_ELEMENT or node.target in VIEWS):
            return None
        if node.target in _BY_ELEMENT and any(n.meta["val"].ndim != value.ndim for n in node.args if n in between):
            return None
        between[node] = None
        if node is end:
            kept = all(inner is end or inner.users.keys() <= between.keys() for inner in between)
            return list(between)[1:] if kept else None
    return None


def _of_part(
    graph: Graph, between: list[Node], made: dict[Node, Node], dimension: int, start: int, length: int
) -> Node:
    """The same operations on one of the parts, and on the rows that belong to it of all else."""
    for node in between:
        shape = list(node.meta["val"].shape)
        shape[dimension] = length
        if node.target in VIEWS:
            made[node] = add(graph, aten.reshape.default, made[node.args[0]], shape)
            continue
        args = []
        for argument in node.args:
            part = made.get(argument, argument) if isinstance(argument, Node) else argument
            value = argument.meta["val"] if isinstance(argument, Node) and argument not in made else None
            at = dimension - len(shape) + value.ndim if isinstance(value, torch.Tensor) else -1
            if value is not None and at >= 0 and value.shape[at] != 1:
                part = add(graph, aten.slice.Tensor, argument, at, start, start + length)
            args.append(part)
        made[node] = like(graph, node, *args)
    return made[between[-1]]


def pairs_in_words(graph: Graph) -> int:
    """A product whose pairs (a, b) are turned is read and written a pair a word; returns how many results.

    The two halves of a word are computed one beside the other, so that the other half of a pair is at hand and is not
    loaded again: Triton loads what is found at 1 - i % 2 one by one. Sums along a row add a and b first.
    """
    found, ends = 0, []
    for turn in [node for node in graph.nodes if node.target is prims.rev.default]:
        end = _result(turn)
        if end is not None and end not in ends:
            ends.append(end)
    for end in ends:
        with graph.inserting_before(end):
            halves = _Halves(graph)
            pair = halves.of(end)
            if pair is None or not halves.products:
                continue
            end.replace_all_uses_with(add(graph, aten.view.dtype, _word(graph, *pair), end.meta["val"].dtype))
        graph.erase_node(end)
        found += 1
    graph.eliminate_dead_code()
    for whole in [node for node in graph.nodes if node.target is aten.cat.default]:
        _put_together_in_words(graph, whole)
    graph.eliminate_dead_code()
    return found


def _result(turn: Node) -> Node | None:
    """What is made of turned pairs, in 2 bytes a number and in rows: the cast, or the view of it, behind their sum."""
    node, added = turn, False
    while len(node.users) == 1:
        node = next(iter(node.users))
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not (node.target in VIEWS or node.target in _BY_ELEMENT):
            return None
        added = added or node.target is aten.add.Tensor
        in_rows = node.target is CAST or (node.target in VIEWS and node.args[0].target is CAST)
        if added and in_rows and value.dtype.itemsize == 2 and value.shape[-1] > 2 and value.shape[-1] % 2 == 0:
            return node
    return None


class _Halves:
    """The first and the second of each pair of numbers along the last dimension, computed apart."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self._made: dict[Node, tuple[Node, Node] | None] = {}
        self._rows: dict[Node, Node | None] = {}
        self.products = 0
        """How many products of matrices they are made of."""

    def of(self, node: Node) -> tuple[Node, Node] | None:
        """Of a tensor; None if its last dimension is odd, or it is not made of what is known here."""
        if node not in self._made:
            shape = node.meta["val"].shape
            even = bool(shape) and isinstance(shape[-1], int) and shape[-1] > 0 and shape[-1] % 2 == 0
            self._made[node] = self._halves(node) if even else None
        return self._made[node]

    def _halves(self, node: Node) -> tuple[Node, Node] | None:
        shape, source = node.meta["val"].shape, node.args[0] if node.args else None
        if node.target in (*VIEWS, aten.unsqueeze.default):
            pair = self.of(source)
            if pair is None:
                return None
            one, other = (self._shaped(part, [*shape[:-1], shape[-1] // 2]) for part in pair)
            return None if one is None or other is None else (one, other)
        if node.target is prims.rev.default and shape[-1] == 2 and node.args[1] == [len(shape) - 1]:
            pair = self.of(source)
            return pair and pair[::-1]
        if node.target is aten.slice.Tensor and len(node.args) == 4 and node.args[1] % len(shape) < len(shape) - 1:
            pair = self.of(source)
            return pair and tuple(add(self._graph, node.target, part, *node.args[1:]) for part in pair)
        return self._elementwise(node) if node.target in _BY_ELEMENT and not node.kwargs else self._loaded(node)

    def _shaped(self, part: Node, shape: list[int]) -> Node | None:
        """As a view; a symbolic length, of which there may be one, is left to PyTorch to infer."""
        if list(part.meta["val"].shape) == shape:
            return part
        if sum(not isinstance(n, int) for n in shape) > 1:
            return None
        return add(self._graph, aten.reshape.default, part, [n if isinstance(n, int) else -1 for n in shape])

    def _elementwise(self, node: Node) -> tuple[Node, Node] | None:
        sides: tuple[list[Any], list[Any]] = ([], [])
        for argument in node.args:
            pair: tuple[Any, Any] | None = (argument, argument)
            if isinstance(argument, Node):
                pair = self._operand(argument, node.meta["val"].shape[-1])
            if pair is None:
                return None
            for side, part in zip(sides, pair, strict=True):
                side.append(part)
        return like(self._graph, node, *sides[0]), like(self._graph, node, *sides[1])

    def _operand(self, node: Node, width: int) -> tuple[Node, Node] | None:
        """What a node contributes to the halves of something `width` wide."""
        shape = node.meta["val"].shape if isinstance(node.meta["val"], torch.Tensor) else ()
        if not shape:
            return node, node
        if shape[-1] == width:
            return self.of(node)
        part = self._one_of_two(node)
        if part is not None:
            return part, part
        row = self._by_row(node) if shape[-1] == 1 else None
        return row and (row, row)

    def _one_of_two(self, node: Node) -> Node | None:
        if node.target is not aten.slice.Tensor or node.args[0].meta["val"].shape[-1] != 2 or len(node.args) != 4:
            return None
        source, dimension, start, _ = node.args
        if dimension not in (-1, node.meta["val"].ndim - 1) or start not in (0, 1) or node.meta["val"].shape[-1] != 1:
            return None
        pair = self.of(source)
        return pair and self._shaped(pair[start], list(node.meta["val"].shape))

    def _by_row(self, node: Node) -> Node | None:
        """A number for each row, made of a mean over rows."""
        if node.target is aten.mean.dim:
            rows, dimensions, kept = (*node.args, False)[:3]
            value = rows.meta["val"]
            pair = self.of(rows) if kept and dimensions in ([-1], [value.ndim - 1]) and not node.kwargs else None
            if pair is None:
                return None
            total = add(self._graph, aten.sum.dim_IntList, add(self._graph, aten.add.Tensor, *pair), [-1], True)
            return add(self._graph, aten.div.Tensor, total, float(value.shape[-1]))
        if node.target not in _BY_ELEMENT or node.kwargs:
            return None
        if node not in self._rows:
            made = [self._by_row(n) if isinstance(n, Node) else n for n in node.args]
            self._rows[node] = None if None in made else like(self._graph, node, *made)
        return self._rows[node]

    def _loaded(self, node: Node) -> tuple[Node, Node] | None:
        """Of what lies in memory, as words of twice the size."""
        graph, value = self._graph, node.meta["val"]
        if node.target is prims.iota.default and list(value.shape) == [2]:
            return tuple(add(graph, aten.slice.Tensor, node, 0, part, part + 1) for part in (0, 1))
        kept = node.op == "placeholder" or node.target in _PRODUCTS or node.target is aten.view_as_real.default
        *strides, last = value.stride()
        begin = value.storage_offset()
        even = last == 1 and all(isinstance(n, int) and n % 2 == 0 for n in (*strides, begin, value.shape[-1]))
        if not kept or not even or value.dtype.itemsize not in _WORDS:
            return None
        small, large = _WORDS[value.dtype.itemsize]
        self.products += node.target in _PRODUCTS
        word = add(graph, aten.view.dtype, node, large)
        shifted = add(graph, aten.bitwise_right_shift.Tensor_Scalar, word, 8 * value.dtype.itemsize)
        return tuple(add(graph, aten.view.dtype, add(graph, CAST, n, small), value.dtype) for n in (word, shifted))


def _word(graph: Graph, low: Node, high: Node) -> Node:
    """Two numbers of 2 bytes in one word, as they lie in memory."""
    low, high = (add(graph, CAST, add(graph, aten.view.dtype, n, torch.int16), torch.int32) for n in (low, high))
    low = add(graph, aten.bitwise_and.Scalar, low, 0xFFFF)
    high = add(graph, aten.bitwise_left_shift.Tensor_Scalar, high, 16)
    return add(graph, aten.bitwise_or.Tensor, high, low)


def _put_together_in_words(graph: Graph, whole: Node) -> None:
    """Words are put together as words: one view of them all instead of a copy of each."""
    parts, dimension = _put_together(whole), (*whole.args, 0)[1]
    if parts is None:
        return
    words = [part.args[0] for part in parts if part.target is aten.view.dtype]
    if len(words) < len(parts) or dimension % whole.meta["val"].ndim == whole.meta["val"].ndim - 1:
        return
    if any(word.meta["val"].dtype != torch.int32 for word in words) or whole.meta["val"].dtype.itemsize != 2:
        return
    with graph.inserting_before(whole):
        together = add(graph, aten.cat.default, words, dimension)
        whole.replace_all_uses_with(add(graph, aten.view.dtype, together, whole.meta["val"].dtype))
    graph.erase_node(whole)
