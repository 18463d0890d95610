"""What Inductor is told besides its defaults, so that it reads and writes each activation once: rewrites of a graph.

A block as PyTorch hands it over quantizes one activation anew for every layer that takes it, and takes an amax and a
cast apart into two passes over memory. Rotary embeddings, which it writes in several ways, are
engine/compiler/rotary.py's. Each rewrite keeps the arithmetic (the same operations on the same values, in fp32 where
they were) and none knows a model or a precision, so all sides of a comparison are compiled alike.

Inductor keeps its settings by thread: install this on the thread that compiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._inductor import config, inductor_prims
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
from torch._inductor.codegen.triton import FixedTritonConfig
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.runtime.runtime_utils import next_power_of_2
from torch._inductor.virtualized import V
from torch.fx import Graph, Node

from engine.compiler import nodes, rotary
from engine.compiler.nodes import CAST, VIEWS, add, alike, aten, tensor, times

PERSISTENT = 16384
"""Elements of a row that one kernel keeps in registers between its amax and its cast; Inductor's own limit is 1024,
and beyond it every pass reads the row again. FLUX.1-dev's longest row is 15,360."""

ROWS = 1024
"""So many rows are worth a kernel that writes a vector they all take, and a block that fits them."""

_LOADED = 300
"""Numbers that a thread may load of a row: with 320, a kernel of LTX-2 took 11% longer than with half of them."""

_PER_ROW = frozenset({aten.add.Tensor, aten.mul.Tensor})
_ELEMENTWISE = frozenset(
    {CAST, aten.abs.default, aten.clamp_min.default, aten.clamp_max.default, aten.div.Tensor, aten.reciprocal.default}
)
"""What a row-wise quantization is made of, besides its amax."""
_FP8 = torch.float8_e4m3fn
_QUANTIZED = (_FP8, torch.int8)
"""What activations are cast to."""
_SATURATION = ((aten.clamp_min.default, (-448,)), (aten.clamp_max.default, (448,)))
"""What keeps a quotient within e4m3, each with its arguments."""


class Rewrites(CustomGraphPass):
    """All rewrites in turn, on the graph of one block before Inductor's own passes."""

    def __call__(self, graph: Graph) -> None:
        rotary.real_rotations(graph)
        cast_before_view(graph)
        rotary.turned_pairs(graph)
        rotary.turned_halves(graph)
        rotary.turned_before_put_together(graph)
        rotary.pairs_in_words(graph)
        gelu_in_product(graph)
        logistic_gelu(graph)
        sum_vectors(graph)
        share(graph)
        flatten_quantized(graph)
        multiply_and_saturate(graph)
        share(graph)
        keep_quantized(graph)
        write_rows(graph)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__, nodes.__file__, rotary.__file__))


def options() -> Mapping[str, object]:
    """Settings for `torch.compile`; they key its caches, with the text of the rewrites."""
    return MappingProxyType(
        {
            "post_grad_custom_pre_pass": Rewrites(),
            "split_reductions": False,
            # Operations that may be computed anew rather than written to memory. A norm and the rotary embedding behind
            # it are up to 34; beyond Inductor's own limit, 30, what they make would be written in fp32 and read again.
            "realize_opcount_threshold": 64,
            # What is computed from more tensors than this is written to memory once it is used twice. A gated residual
            # reads four, and Inductor's own limit is 4.
            "realize_reads_threshold": 3,
        }
    )


def install() -> None:
    """Let this thread's Inductor ask `_Choices`; graphs that are compiled without `options` are not touched."""
    V.set_choices_handler(_Choices())


class _Choices(InductorChoices):
    @staticmethod
    def should_use_persistent_reduction(features: SIMDKernelFeatures, cooperative_reduction: bool) -> bool:
        if isinstance(config.post_grad_custom_pre_pass, Rewrites) and V.graph.sizevars.statically_known_leq(
            features.reduction_numel, PERSISTENT
        ):
            return True
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    def triton_kernel_kwargs(
        self, kernel_cls: type, features: SIMDKernelFeatures, groups: list[Any], kernel_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        kernel_kwargs = super().triton_kernel_kwargs(kernel_cls, features, groups, kernel_kwargs)
        length, many = features.reduction_numel, V.graph.sizevars.statically_known_geq(features.numel, ROWS)
        ours = isinstance(config.post_grad_custom_pre_pass, Rewrites) and groups[0].keys() == {"x", "r0_"}
        if not ours or not many or not isinstance(length, sympy.Integer) or not 1 < length <= PERSISTENT:
            return kernel_kwargs
        reads = features.memory_stats().persistent.reads
        along = reads.dim[-1]  # the row: how its loads lie
        chosen = tile(int(length), reads.count_per_thread)
        # Inductor writes blocks of one row without a dimension for it, and stumbles over what depends on the row alone.
        alone = features.contains_op("index_expr") or along.count_per_thread_broadcast
        if along.count_per_thread_non_contiguous or (chosen["XBLOCK"] == 1 and alone):
            return kernel_kwargs
        return kernel_kwargs | {"fixed_config": FixedTritonConfig(chosen)}


def tile(length: int, loads: int) -> dict[str, int]:
    """How many rows a block takes and how many warps it has, in a kernel that reduces many rows of this length.

    Inductor gives a thread 16 elements of a long row and tries three blocks for a short one. Of all kernels of the
    three models' blocks, each timed on an H200 (assets/figures/row-blocks-h200.json), those of long rows are fastest
    with 32 to 64 elements a thread, if what they load fits its registers, and those of short ones with 512 elements a
    block.
    """
    if length <= 128:
        return {"XBLOCK": 512 // next_power_of_2(length), "num_warps": 4, "num_stages": 1}
    warps = min(8, next_power_of_2(-(-length // (32 * 48))))  # of 32 threads, with 48 elements each
    while warps < 16 and loads * length > 32 * warps * _LOADED:
        warps *= 2
    return {"XBLOCK": 1, "num_warps": warps, "num_stages": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Rewrites


def share(graph: Graph) -> int:
    """Let equal nodes be computed once; returns how many nodes that removes.

    AOTAutograd does this only for training.
    """
    first: dict[tuple[Any, ...], Node] = {}
    removed = 0
    for node in list(graph.nodes):
        if not _pure(node):
            continue
        key = (node.target, repr(node.args), repr(sorted(node.kwargs.items())))
        if key in first:
            node.replace_all_uses_with(first[key])
            graph.erase_node(node)
            removed += 1
        else:
            first[key] = node
    return removed


def _pure(node: Node) -> bool:
    """Whether the same arguments always give the same values, and nothing else happens."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims", "ao", "twinframe"):
        return False
    fresh = target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags
    return not fresh and "empty" not in target._schema.name


def flatten_quantized(graph: Graph) -> int:
    """Where a quantized (B, S, K) activation is viewed as (B * S, K), quantize the view; returns how many.

    The layers then take the result of the cast itself, which can be kept in memory once, instead of a view of it, which
    Inductor writes anew for every layer. The scale is computed of the view as well: Triton would not see that row
    s of picture b is row b * S + s, and compute what is quantized twice.
    """
    flattened = 0
    for view in list(graph.nodes):
        if view.target not in VIEWS:
            continue
        cast, shape = view.args[0], view.meta["val"].shape
        if cast.target is not CAST or cast.meta["val"].dtype != _FP8 or len(cast.users) > 1:
            continue
        full = cast.meta["val"].shape
        if len(shape) != 2 or not full or shape[1] != full[-1] or not _is_by_rows(cast, full):
            continue
        made: dict[Node, Node] = {}
        with graph.inserting_before(view):
            view.replace_all_uses_with(_in_rows(graph, cast, full, made))
        for node, rows in made.items():
            value = node.meta["val"]
            if value.shape[-1] == 1:  # the scale, which the layer takes as well
                with graph.inserting_before(view):
                    back = add(graph, aten.reshape.default, rows, list(value.shape))
                node.replace_all_uses_with(back, delete_user_cb=lambda user, view=view: view < user)
        graph.erase_node(view)
        flattened += 1
    graph.eliminate_dead_code()
    return flattened


def _is_by_rows(cast: Node, full: torch.Size) -> bool:
    """Whether `_in_rows` can compute all that is quantized of rows: whatever has rows at all has one for each of them,
    or one for all.

    A divisor of shape (S, K) or (B, 1, K), which each picture or each row shares, would have to be repeated.
    """
    waiting, seen = [cast], set()
    while waiting:
        node = waiting.pop()
        value = tensor(node)
        if value is None or node in seen:
            continue
        seen.add(node)
        rows = value.shape[:-1]
        if value.ndim > len(full) or (rows != full[:-1] and any(n != 1 for n in rows)):
            return False
        if rows == full[:-1] and (node.target in _ELEMENTWISE or _is_amax(node, full) or _same_view(node)):
            waiting.extend(node.all_input_nodes)
    return True


def _is_amax(node: Node, full: torch.Size) -> bool:
    """Of each row of something with as many dimensions as `full`."""
    return node.target is aten.amax.default and node.args[1:] in (([-1], True), ([len(full) - 1], True))


def _same_view(node: Node) -> bool:
    return node.target in VIEWS and node.args[0].meta["val"].shape == node.meta["val"].shape


def _in_rows(graph: Graph, node: Any, full: torch.Size, made: dict[Node, Node]) -> Any:
    """The same value as `node`, computed on rows: its elementwise operations, and its amax of a row, moved behind a
    view."""
    if tensor(node) is None or node.meta["val"].ndim < len(full):
        return node
    if node not in made:
        value = node.meta["val"]
        if _same_view(node):
            made[node] = _in_rows(graph, node.args[0], full, made)
        elif _is_amax(node, full):
            made[node] = nodes.like(graph, node, _in_rows(graph, node.args[0], full, made), [1], True)
        elif node.target in _ELEMENTWISE and value.shape[:-1] == full[:-1]:
            moved = tuple(_in_rows(graph, argument, full, made) for argument in node.args)
            made[node] = nodes.like(graph, node, *moved)
        else:
            made[node] = add(graph, aten.reshape.default, node, [-1, value.shape[-1]])
    return made[node]


def _settle(graph: Graph, node: Node) -> None:
    """Have a value written to memory, once for all that takes it."""
    with graph.inserting_after(node):
        settled = add(graph, inductor_prims.force_stride_order, node, list(node.meta["val"].stride()))
    node.replace_all_uses_with(settled, delete_user_cb=lambda user: user is not settled)


def keep_quantized(graph: Graph) -> int:
    """A quantized activation that several layers take is written to memory, once; returns how many there are.

    A layer asks for its input's strides, and Inductor answers with a copy for each unless the strides are settled.
    """
    kept = 0
    for cast in list(graph.nodes):
        if cast.target is not CAST or cast.meta["val"].dtype not in _QUANTIZED or len(cast.users) == 1:
            continue
        if all(isinstance(stride, int) for stride in cast.meta["val"].stride()):
            _settle(graph, cast)
            kept += 1
    return kept


def sum_vectors(graph: Graph) -> int:
    """Sums of two vectors that all rows of something large take are written to memory; returns how many.

    Else each row would load both and keep both in registers: of a modulated norm that is more than the row itself.
    """
    written = 0
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or not all(isinstance(argument, Node) for argument in node.args):
            continue
        if _for_all_rows(node):
            _settle(graph, node)
            written += 1
    return written


def _for_all_rows(node: Node) -> bool:
    """Whether something at least `ROWS` times as large is computed from `node`, or from a part of it."""
    waiting, seen = [node], {node}
    whole = _size(node)
    while waiting and isinstance(whole, int):
        part = waiting.pop()
        for user in part.users:
            size = _size(user)
            if not isinstance(size, int):
                continue  # to compare it would bind a symbolic length
            if size <= whole:
                if user not in seen:
                    seen.add(user)
                    waiting.append(user)  # still a vector, or several, as of unbind
            elif user.target in _PER_ROW and size >= ROWS * _size(part):
                return True
    return False


def _size(node: Node) -> int | torch.SymInt:
    """Elements of a node's value; 0 of what is no tensor."""
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


def write_rows(graph: Graph) -> int:
    """What a permutation puts together to rows, only to be taken apart into heads again, is computed by rows.

    Gives how many. Computed by heads, or viewed as them in between, its halves are found at (i % 128) % 64, and Triton
    sees only of i % 64 that neighbours are neighbours in memory: it would load them one by one.
    """
    written = 0
    for rows in list(graph.nodes):
        if rows.target not in VIEWS or not all(isinstance(n, int) for n in rows.meta["val"].shape):
            continue
        dimensions = rows.meta["val"].ndim
        apart = [user for user in rows.users if user.target in VIEWS and user.meta["val"].ndim > dimensions]
        cast = rows.args[0] if rows.args[0].target is CAST else None
        permuted = cast.args[0] if cast else rows.args[0]
        heads = permuted.args[0] if permuted.target is aten.permute.default else None
        if heads is None or heads.target not in VIEWS or not apart or len(apart) < len(rows.users):
            continue
        parts, order = heads.args[0], [dimension % heads.meta["val"].ndim for dimension in permuted.args[1]]
        if parts.meta["val"].ndim < 2:
            continue
        *kept, a, b = parts.meta["val"].shape
        if [*kept, a * b] != list(heads.meta["val"].shape) or order[-1] != len(kept):
            continue
        with graph.inserting_before(rows):
            value = add(graph, aten.permute.default, parts, [*order, len(kept) + 1])
            value = add(graph, CAST, value, cast.args[1]) if cast else value
            value = add(graph, aten.reshape.default, value, list(rows.meta["val"].shape))
            strides = list(value.meta["val"].stride())
            rows.replace_all_uses_with(add(graph, inductor_prims.force_stride_order, value, strides))
        graph.erase_node(rows)
        written += 1
    graph.eliminate_dead_code()
    return written


def multiply_and_saturate(graph: Graph) -> int:
    """Quantize with one multiplication: x / scale clamped to 448 and cast is x * (1 / scale) cast; returns how many.

    The quotient passes 448 by a rounding of the scale at most, and what is below 464 is cast to 448. The reciprocal is
    taken once a row; Triton's own division is as far from the exact quotient as the product.
    """
    found = 0
    for cast in list(graph.nodes):
        if cast.target is not CAST or cast.meta["val"].dtype != _FP8:
            continue
        clamps: list[Any] = []
        quotient = cast.args[0]
        while len(clamps) < 2 and (quotient.target, quotient.args[1:]) in _SATURATION:
            clamps.append(quotient.target)
            quotient = quotient.args[0]
        if len(set(clamps)) != 2 or quotient.target is not aten.div.Tensor:
            continue
        value, scale = quotient.args
        row = tensor(scale)
        if row is None or row.dtype != quotient.meta["val"].dtype or not _is_scale(scale, value):
            continue
        with graph.inserting_before(cast):
            cast.args = (times(graph, value, add(graph, aten.reciprocal.default, scale)), cast.args[1])
        found += 1
    graph.eliminate_dead_code()
    return found


def _is_scale(scale: Node, value: Node) -> bool:
    """Whether `scale` is the largest magnitude of each row of `value` over 448, or more; any other could leave more
    than 464, of which a cast makes NaN."""
    if tensor(scale) is None or tensor(value) is None or scale.meta["val"].shape != (*value.meta["val"].shape[:-1], 1):
        return False
    divided = 0
    while (scale := _same_rows(scale)).target is not aten.amax.default:
        divided += scale.target is aten.div.Tensor and scale.args[1] == 448
        guarded = scale.target is aten.clamp_min.default and not isinstance(scale.args[1], Node)
        if not guarded and not (divided == 1 and scale.target is aten.div.Tensor and scale.args[1] == 448):
            return False
        scale = scale.args[0]
    magnitudes = scale.args[0]
    if divided != 1 or scale.args[1:] not in (([-1], True), ([magnitudes.meta["val"].ndim - 1], True)):
        return False
    return magnitudes.target is aten.abs.default and _same_rows(magnitudes.args[0]) is _same_rows(value)


def _same_rows(node: Node) -> Node:
    """What `node` is a cast or a view of that leaves its rows as they are."""
    while node.target is CAST or (
        node.target in VIEWS and node.args[0].meta["val"].shape[-1:] == node.meta["val"].shape[-1:]
    ):
        node = node.args[0]
    return node


def gelu_in_product(graph: Graph) -> int:
    """GELU by tanh of a product with a bias is computed by the product's own kernel; returns how many.

    cuBLASLt has it as an epilogue: the product is not written to be read again, and is not rounded before its GELU.
    """
    found = 0
    for tanh in [node for node in graph.nodes if node.target is aten.tanh.default]:
        x, gelu = _gelu_around(tanh)
        if x is None or gelu is None or x.target is not CAST or tensor(shown := x.args[0]) is None:
            continue
        product = shown.args[0] if shown.target in VIEWS else shown
        alone = product.target is aten.addmm.default and len(product.users) == len(shown.users) == 1
        rounded = next(iter(gelu.users)) if alone and len(gelu.users) == 1 else None
        if rounded is None or rounded.target is not CAST or not _only_between(x, gelu):
            continue
        if any(user.target is aten.cat.default for user in rounded.users):
            continue  # which computes it while it copies, in no more time
        bias, *factors = product.args
        if product.kwargs or bias.meta["val"].ndim != 1 or not alike(rounded, shown):
            continue
        with graph.inserting_before(rounded):
            made = graph.call_function(aten._addmm_activation.default, (bias, *factors), {"use_gelu": True})
            made.meta["val"] = product.meta["val"]
            if shown is not product:
                made = add(graph, shown.target, made, *shown.args[1:])
            rounded.replace_all_uses_with(made)
        graph.erase_node(rounded)
        found += 1
    graph.eliminate_dead_code()
    return found


def _only_between(first: Node, last: Node) -> bool:
    """Whether `first`, and all that is made of it on the way to `last`, serves nothing but `last`."""
    inside, waiting = {first, last}, [last]
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node not in inside:
                inside.add(node)
                waiting.append(node)
        if len(inside) > 32:  # GELU is made of a dozen; this leads elsewhere
            return False
    return all(node is last or node.users.keys() <= inside for node in inside)


def logistic_gelu(graph: Graph) -> int:
    """GELU by tanh as x / (1 + 2^(x (c + d x^2))), which is the same; returns how many.

    0.5 (1 + tanh u) = 1 / (1 + exp(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3) (PyTorch, `nn.GELU`). CUDA's tanhf
    and what surrounds it take several times the instructions, which is more time than reading and writing x.
    """
    found = 0
    for tanh in [node for node in graph.nodes if node.target is aten.tanh.default]:
        x, gelu = _gelu_around(tanh)
        if gelu is None:
            continue
        square_root, log2_e = 0.7978845608028654, 1.4426950408889634
        with graph.inserting_before(gelu):
            bent = add(graph, aten.mul.Tensor, times(graph, x, x), -2 * log2_e * square_root * 0.044715)
            power = times(graph, x, add(graph, aten.add.Tensor, bent, -2 * log2_e * square_root))
            divisor = add(graph, aten.add.Tensor, add(graph, aten.exp2.default, power), 1.0)
            gelu.replace_all_uses_with(add(graph, aten.div.Tensor, x, divisor))
        graph.erase_node(gelu)
        found += 1
    graph.eliminate_dead_code()
    return found


def _gelu_around(tanh: Node) -> tuple[Node, Node] | tuple[None, None]:
    """x and GELU(x) of the tanh in it, as PyTorch takes it apart in fp32: (x * 0.5) * (tanh((x + x^3 * a) * b) + 1)."""
    outer = _only_user(tanh, aten.add.Tensor, 1)
    gelu = next(iter(outer.users), None) if outer and len(outer.users) == 1 else None
    bent = _times(tanh.args[0], 0.7978845608028654)
    if gelu is None or gelu.target is not aten.mul.Tensor or tanh.meta["val"].dtype != torch.float32:
        return None, None
    if bent is None or bent.target is not aten.add.Tensor or bent.kwargs:
        return None, None
    x, cube = bent.args[0], _times(bent.args[1], 0.044715)
    square = cube.args[0] if cube is not None and cube.target is aten.mul.Tensor and cube.args[1] is x else None
    if not isinstance(square, Node) or square.target is not aten.mul.Tensor or square.args != (x, x):
        return None, None
    if _times(gelu.args[0], 0.5) is not x or gelu.args[1] is not outer or not alike(gelu, x):
        return None, None
    return x, gelu


def _times(node: Any, factor: float) -> Node | None:
    """The tensor of which `node` is the product with this number."""
    product = isinstance(node, Node) and node.target is aten.mul.Tensor
    close = product and isinstance(node.args[1], float) and abs(node.args[1] - factor) < 1e-9
    return node.args[0] if close and tensor(node.args[0]) is not None else None


def _only_user(node: Node, target: object, second: object) -> Node | None:
    """What alone takes `node`, as its first argument, if it is this operation with this second one and no others."""
    user = next(iter(node.users), None) if len(node.users) == 1 else None
    fits = user is not None and user.target is target and user.args == (node, second) and not user.kwargs
    return user if fits else None


def cast_before_view(graph: Graph) -> int:
    """Where a view is cast to a smaller type, cast first: Inductor writes what is viewed to memory. Gives how many."""
    moved = 0
    for cast in list(graph.nodes):
        view = cast.args[0] if cast.target is CAST else None
        if view is None or view.target not in VIEWS or len(view.users) > 1:
            continue
        source, dtype = view.args[0], cast.args[1]
        if not isinstance(dtype, torch.dtype) or dtype.itemsize >= source.meta["val"].dtype.itemsize:
            continue
        with graph.inserting_before(cast):
            small = add(graph, CAST, source, dtype)
            cast.replace_all_uses_with(add(graph, aten.reshape.default, small, view.args[1]))
        graph.erase_node(cast)
        moved += 1
    graph.eliminate_dead_code()
    return moved
