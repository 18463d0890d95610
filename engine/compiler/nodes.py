"""What rewrites of a graph of ATen operations share: names, and a new node with the value that it will have."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

aten, prims = torch.ops.aten, torch.ops.prims

CAST = prims.convert_element_type.default
VIEWS = (aten.view.default, aten.reshape.default)


def add(graph: Graph, target: Any, *args: Any) -> Node:
    """A new node, with the shape and type that its value will have."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*torch.fx.map_arg(args, lambda argument: argument.meta["val"]))
    return node


def tensor(node: Any) -> torch.Tensor | None:
    """The value that a node of a graph will have, if it is a tensor; None for a number, or of anything else."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def alike(a: Node, b: Node) -> bool:
    """Whether two tensors have the same shape and type, so that one can stand for the other."""
    return a.meta["val"].shape == b.meta["val"].shape and a.meta["val"].dtype == b.meta["val"].dtype


def like(graph: Graph, node: Node, *args: Any) -> Node:
    """The same operation on something else, by whose name its kernel will be known in profiles."""
    made = add(graph, node.target, *args)
    made.meta["original_aten"] = node.meta.get("original_aten")
    return made


def times(graph: Graph, a: Node, b: Node) -> Node:
    return add(graph, aten.mul.Tensor, a, b)
