# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a frozen transformer in float8 (e4m3): half the weights' memory, products at twice the rate.

    y = (q_x q_w') s_x s_w + b

Each output channel of the weights has a scale s_w, made once, and each row of the activations a scale s_x, made in each
call (``quantize_rows``). Attention and feed-forward layers are replaced; embeddings, modulation and the final layer
stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastdistill.errors import InputError, quoted
from fastdistill.models import families
from fastdistill.models.weights import storage
from fastdistill.ops.quantize_rows import OLDEST, quantize_rows

UNIT = 16  # the GPU's products need widths that are multiples of it


class Float8Linear(nn.Module):
    """A linear layer without gradient. On a GPU the product is rounded to bfloat16 before it is cast; on a CPU, which
    has no such product, it is computed in float32 from the same float8 numbers."""

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize_rows(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale.t().contiguous())
        self.bias = linear.bias
        self.training = linear.training

    def forward(self, x: Tensor) -> Tensor:
        return self.product(*quantize_rows(x.flatten(0, -2)), x)

    def product(self, q: Tensor, scale: Tensor, like: Tensor) -> Tensor:
        """For float8 rows with their scales; the dtype and the shape (except for the last size) are those of
        ``like``."""
        dtype = like.dtype
        bias: Tensor | None = self.bias
        if q.device.type == "cpu":
            out = q.float() @ self.weight.float().t() * scale * self.scale
        else:
            inside = bias if dtype == torch.bfloat16 else None
            out = torch._scaled_mm(
                q, self.weight.t(), scale, self.scale, bias=inside, out_dtype=torch.bfloat16, use_fast_accum=True
            )
            bias = None if inside is not None else bias
        if bias is not None:
            out = out.float() + bias.float()
        return out.to(dtype).view(*like.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def projected(x: Tensor, layers: Sequence[Any]) -> list[Tensor] | None:
    """Several layers with the same input, whose rows are quantized once; None if not all layers are in float8."""
    if not all(type(layer) is Float8Linear and _plain(layer) for layer in layers):
        return None
    q, scale = quantize_rows(x.flatten(0, -2))
    return [layer.product(q, scale, x) for layer in layers]


def feed_forward(layers: Sequence[nn.Module], x: Tensor) -> Tensor | None:
    """A feed-forward with the tanh GELU, which is computed in the quantization of its result; None for other ones."""
    if len(layers) != 3:
        return None
    first, dropout, last = layers
    if type(first) is not GELU or first.approximate != "tanh" or type(last) is not Float8Linear:
        return None
    if type(dropout) is not nn.Dropout or dropout.training or not all(map(_plain, layers)):
        return None
    h: Tensor = first.proj(x)  # type: ignore[operator]
    return last.product(*quantize_rows(h.flatten(0, -2), gelu=True), h)


def _plain(module: Any) -> bool:
    """Whether calling the module runs nothing else (no hooks, no other forward)."""
    hooks = module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook()  # type: ignore[no-untyped-call]
    return not hooks and "forward" not in module.__dict__


def refuse(device: torch.device) -> str | None:
    """Why such layers are not possible on a device."""
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda":
        return f"there are no float8 products on {device.type}"
    if (found := torch.cuda.get_device_capability(device)) < OLDEST:
        return f"this GPU has compute capability {found[0]}.{found[1]}, and float8 needs 8.9 (Ada, Hopper) or later"
    one = torch.ones(UNIT, UNIT, device=device)
    try:
        q, scale = quantize_rows(one)
        torch._scaled_mm(q, q.t(), scale, scale.t().contiguous(), out_dtype=torch.bfloat16, use_fast_accum=True)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"torch {torch.__version__} has no float8 product with a scale for each row here ({quoted(error)})"
    return None


def layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a model that ``quantize`` would replace, by name.

    Raises:
        InputError: a model of a family other than DiT, PixArt, SD3 and Flux, or without such layers.
    """
    family, core = families.find(model), families.unwrapped(model)
    if family is None or not family.products:
        kinds = ", ".join(str(each) for each in families.FAMILIES.values() if each.products)
        raise InputError.of("teacher", f"a transformer of {kinds}, for float8", type(core).__name__)
    inside = re.compile(rf"(?:{'|'.join(family.blocks)})\.\d+\.(?:{'|'.join(family.products)})(?:\.|$)")
    found = {}
    for name, module in core.named_modules(remove_duplicate=False):  # a layer may be in several places
        if type(module) is nn.Linear and inside.match(name) and _fits(module):
            found[name] = module
    if not found:
        rule = f"linear layers of torch in its blocks, of widths that are multiples of {UNIT}, for float8"
        raise InputError.of("teacher", rule, "none")
    return found


def _fits(linear: nn.Linear) -> bool:
    own = type(linear.weight) is nn.Parameter and linear.weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return own and _plain(linear) and linear.in_features % UNIT == 0 == linear.out_features % UNIT


def quantize(teacher: nn.Module, student: nn.Module | None = None) -> Callable[[], None]:
    """Replace ``layers_of`` a frozen model, in place; returns a function that restores them with the same bits.

    Until then the weights of a model on a GPU are kept in host memory, except for those that ``student`` shares.

    Raises:
        InputError: no such layers, or some are also modules of the student.
    """
    core, layers = families.unwrapped(teacher), layers_of(teacher)
    theirs = set() if student is None else set(student.modules())
    common = {storage(p) for module in theirs for p in module._parameters.values() if p is not None}
    uses = [id(p) for module in core.modules() for p in module._parameters.values() if p is not None]
    places = {name: name.rpartition(".") for name in layers}
    if same := [place for place, _, _ in places.values() if core.get_submodule(place) in theirs]:
        raise InputError.of("student", "modules of its own beside a teacher in float8", f"the teacher's {same[0]}")
    undo: list[Callable[[], None]] = []
    made: dict[nn.Linear, Float8Linear] = {}
    for name, linear in layers.items():
        place, _, last = places[name]
        parent = core.get_submodule(place)
        first = linear not in made
        if first:
            made[linear] = Float8Linear(linear)
        setattr(parent, last, made[linear])
        undo.append(_restoring(parent, last, linear))
        weight: Any = linear.weight
        if first and weight.is_cuda and storage(weight) not in common and uses.count(id(weight)) == 1:
            undo.append(_kept_on_the_host(weight))

    def put_back() -> None:
        for each in reversed(undo):
            each()

    return put_back


def _restoring(parent: nn.Module, name: str, linear: nn.Linear) -> Callable[[], None]:
    return lambda: setattr(parent, name, linear)


def _kept_on_the_host(weight: nn.Parameter) -> Callable[[], None]:
    device = weight.device
    weight.data = weight.data.cpu()

    def restore() -> None:
        weight.data = weight.data.to(device)

    return restore
