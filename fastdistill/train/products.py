# SPDX-License-Identifier: Apache-2.0
"""Matrix products of a compiled step by oneDNN, on AMD processors with AVX-512.

torch multiplies float32 matrices by MKL, which runs AVX2 there: 105 GFLOP/s on a core of an AMD EPYC, where oneDNN's
AVX-512 kernels reach 200 to 250. It has no setting for that, so a pass of the compiler puts oneDNN's op in their place.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAME = "fastdistill::product"
_FEWEST = 2**20  # multiplications from which on oneDNN is faster
_NARROWEST = 64  # of a result that sums over many more terms than it has rows and columns


@functools.cache
def wanted() -> bool:
    """Whether oneDNN is the faster one here: by what the processor says, so that it is the same in every sitting."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        return torch.backends.mkl.is_available() and "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def options() -> dict[str, Any]:
    """Of ``torch.compile`` with inductor."""
    return {"post_grad_custom_post_pass": _pass()}


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a @ b + bias, float32."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b.t(), bias, "none", [], "")
    return product


@functools.cache
def _pass() -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    _define()

    class Products(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            replace(graph)

        def uuid(self) -> str:
            return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    return Products()


@functools.cache
def _define() -> None:
    """The op; the compiler calls oneDNN's in its place, without a detour through Python."""
    torch.library.define(_NAME, "(Tensor a, Tensor b, Tensor? bias) -> Tensor")
    torch.library.impl(_NAME, "CPU", _product)
    torch.library.register_fake(_NAME, lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]))
    from torch._inductor import lowering

    call = lowering.fallback_handler(torch.ops.mkldnn._linear_pointwise.default, add_to_fallback_set=False)

    def lowered(a: Any, b: Any, bias: Any) -> Any:
        return call(a, lowering.permute(b, [1, 0]), bias, "none", [], "")

    lowering.register_lowering(torch.ops.fastdistill.product.default, type_promotion_kind=None)(lowered)


def replace(graph: torch.fx.Graph) -> int:
    """Put oneDNN in the place of MKL where it is faster; returns how often."""
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
                made = graph.call_function(torch.ops.fastdistill.product.default, (a, b, bias))
            made.meta.update(node.meta)
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            found += 1
    return found


def _faster(a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    if a.dtype != torch.float32 or a.device.type != "cpu" or not all(isinstance(n, int) for n in (*a.shape, *b.shape)):
        return False
    (rows, terms), columns = a.shape, b.shape[1]
    if bias is not None and tuple(bias.shape) != (columns,):
        return False
    sums = terms >= 4 * max(rows, columns)
    return rows * terms * columns >= _FEWEST and not (sums and min(rows, columns) < _NARROWEST)
