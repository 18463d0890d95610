"""Graphs of ATen operations, as a compiler is given them."""

from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx


def traced(function, *given):
    return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*given)


def count(graph, *targets):
    return sum(node.target in targets for node in graph.graph.nodes)


def rewritten(graph, *rewrites):
    found = [rewrite(graph.graph) for rewrite in rewrites]
    graph.graph.lint()
    graph.recompile()
    return found
