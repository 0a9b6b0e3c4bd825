# SPDX-License-Identifier: Apache-2.0
"""Matrix products of a compiled step on AMD processors with AVX-512: large products use oneDNN, and attention over few
tokens becomes two products and a softmax.

torch multiplies float32 matrices with MKL, which uses only AVX2 on AMD: 105 GFLOP/s on a core of an AMD EPYC, where
oneDNN's AVX-512 kernels reach 200 to 250. torch has no setting for this, so a pass of the compiler replaces the ops.
torch's flash attention works in tiles of 32 queries or more. With 16 queries and 5 or 16 keys, its forward and backward
take 1.2 to 1.4 times as long as products and a softmax in float32, and five times as long in bfloat16.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_NAME = "fastdistill::product"
_FEWEST = 2**20  # from this many multiplications on, oneDNN is faster
_DTYPES = (torch.float32, torch.bfloat16)
_SCORES = 1024  # attention with at most this many scores per head is written as products
_NARROWEST = 64  # minimum rows and columns of a result whose sum has many more terms than these


@functools.cache
def wanted() -> bool:
    """Whether oneDNN is faster on this processor. Decided by its name and features, so every run decides the same."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        return torch.backends.mkl.is_available() and "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def options() -> dict[str, Any]:
    """Options for ``torch.compile`` with inductor."""
    return {"pre_grad_custom_pass": _pass(spell_out), "post_grad_custom_post_pass": _pass(replace)}


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a @ b + bias, float32."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b.t(), bias, "none", [], "")
    return product


@functools.cache
def _pass(change: Callable[[torch.fx.Graph], int]) -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Products(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            change(graph)

        def uuid(self) -> str:
            return hashlib.sha256(change.__name__.encode() + Path(__file__).read_bytes()).hexdigest()

    return Products()


@functools.cache
def _define() -> None:
    """Define the op. Compiled code calls oneDNN's op instead of it, without Python."""
    torch.library.define(_NAME, "(Tensor a, Tensor b, Tensor? bias) -> Tensor")
    torch.library.impl(_NAME, "CPU", _product)
    torch.library.register_fake(_NAME, lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]))
    from torch._inductor import lowering

    call = lowering.fallback_handler(torch.ops.mkldnn._linear_pointwise.default, add_to_fallback_set=False)

    def lowered(a: Any, b: Any, bias: Any) -> Any:
        return call(a, lowering.permute(b, [1, 0]), bias, "none", [], "")

    lowering.register_lowering(torch.ops.fastdistill.product.default, type_promotion_kind=None)(lowered)


def replace(graph: torch.fx.Graph) -> int:
    """Replace MKL by oneDNN for the products where it is faster; returns their number."""
    _define()
    aten, found = torch.ops.aten, 0
    for node in list(graph.nodes):
        if node.target is aten.mm.default:
            bias, (a, b) = None, node.args
        elif node.target is aten.addmm.default and not node.kwargs:
            bias, a, b = node.args
        else:
            continue
        if _faster(a.meta["val"], b.meta["val"], None if bias is None else bias.meta["val"]):
            with graph.inserting_before(node):
                made = _put(graph, a, b, bias)
            made.meta.update(node.meta)
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            found += 1
    return found


def _put(graph: torch.fx.Graph, a: torch.fx.Node, b: torch.fx.Node, bias: Any) -> torch.fx.Node:
    """Insert the product. oneDNN copies a transposed first factor (in gradients), so the smaller factor goes first."""
    op, turned = torch.ops.fastdistill.product.default, torch.ops.aten.permute.default
    rows, columns = a.meta["val"], b.meta["val"]
    if bias is not None or rows.stride(0) != 1 or len(rows) <= columns.shape[1]:
        return graph.call_function(op, (a, b, bias))
    first, second = (graph.call_function(turned, (factor, [1, 0])) for factor in (b, a))
    first.meta["val"], second.meta["val"] = columns.t(), rows.t()
    product = graph.call_function(op, (first, second, None))
    product.meta["val"] = rows.new_empty(columns.shape[1], len(rows))
    return graph.call_function(turned, (product, [1, 0]))


def spell_out(graph: torch.fx.Graph) -> int:
    """Replace attention over few tokens by products, before gradients are derived; returns how many were replaced."""
    found = 0
    for node in list(graph.nodes):
        if node.target is F.scaled_dot_product_attention and _is_small(*node.args, **node.kwargs):
            node.target, node.args, node.kwargs = attention, node.args[:3] or tuple(map(node.kwargs.get, _QKV)), {}
            found += 1
    return found


_QKV = ("query", "key", "value")


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(width)) value, for tensors [..., tokens, width]; computed in float32, rounded once."""
    scores = (query.float() * query.shape[-1] ** -0.5) @ key.float().transpose(-1, -2)
    output: Tensor = scores.softmax(-1) @ value.float()
    return output.to(query.dtype)


def _is_small(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    if attn_mask is not None or dropout_p or is_causal or scale is not None or enable_gqa:
        return False
    q, k, v = (n.meta.get("example_value") for n in (query, key, value))
    if not all(isinstance(t, Tensor) and t.dtype in _DTYPES and t.device.type == "cpu" for t in (q, k, v)):
        return False
    return q.dim() == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2] and bool(q.shape[2] * k.shape[2] <= _SCORES)


def _faster(a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    if a.dtype != torch.float32 or a.device.type != "cpu" or not all(isinstance(n, int) for n in (*a.shape, *b.shape)):
        return False
    (rows, terms), columns = a.shape, b.shape[1]
    if bias is not None and tuple(bias.shape) != (columns,):
        return False
    sums = terms >= 4 * max(rows, columns)
    return rows * terms * columns >= _FEWEST and not (sums and min(rows, columns) < _NARROWEST)
