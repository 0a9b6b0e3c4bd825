# SPDX-License-Identifier: Apache-2.0
"""Linear layers in float8: which, what they compute, and that they come and go without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdistill.errors import InputError
from fastdistill.models import float8
from fastdistill.models.calling import Predictor
from fastdistill.models.float8 import Float8Linear
from fastdistill.models.fuse import fuse
from fastdistill.ops.quantize_rows import quantize_rows
from tests.harness import EPS
from tests.models import tiny_families as small

NAMES = ["dit", "pixart_sigma", "sd3", "sd35", "flux"]


def linear(rows: int = 48, columns: int = 32, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Linear(columns, rows, bias=bias)
        made.weight.data *= torch.logspace(-2, 2, rows)[:, None]  # of a scale each
    return made.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product(dtype: torch.dtype, bias: bool) -> None:
    """Of the numbers in float8, as exact as float32; and near that of the layer: a product of two numbers is off by
    1/16 + 1/16 + 1/256 at the most, or by the half steps of small ones."""
    layer = linear(bias=bias, dtype=dtype)
    made = Float8Linear(layer)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = made(x)
    assert y.shape == (2, 5, 48) and y.dtype == dtype and made.bias is layer.bias
    assert made.weight.dtype == torch.float8_e4m3fn and made.scale.shape == (1, 48)
    q, scale = float8.quantize_rows(x.flatten(0, 1))
    rows, weight = q.double() * scale.double(), made.weight.double() * made.scale.double().t()
    shift = layer.bias.double() if bias else 0.0
    exact = (rows @ weight.t() + shift).unflatten(0, (2, 5))
    sizes = (rows.abs() @ weight.abs().t() + torch.as_tensor(shift).abs()).unflatten(0, (2, 5))
    assert ((y.double() - exact).abs() <= 34 * EPS * sizes + torch.finfo(dtype).eps * exact.abs()).all()
    a, w = x.double().flatten(0, 1), layer.weight.double()
    da = torch.maximum(a.abs() / 16, scale.double() / 1024) * 1.01
    dw = torch.maximum(w.abs() / 16, made.scale.double().t() / 1024) * 1.01
    allowed = da @ w.abs().t() + a.abs() @ dw.t() + da @ dw.t()
    error = (exact - (a @ w.t() + shift).unflatten(0, (2, 5))).flatten(0, 1).abs()
    assert (error <= allowed).all()


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_a_family(name: str) -> None:
    model = small.model(name)
    layers = float8.layers_of(model)
    assert all("blocks." in layer and "norm" not in layer and "emb" not in layer for layer in layers)
    kinds = {layer.split(".", 2)[2] for layer in layers}
    assert {"dit": "ff.net.2", "flux": "attn.add_q_proj"}.get(
        name, "attn2.to_k" if "pix" in name else "attn.to_out.0"
    ) in kinds
    if name == "flux":
        assert {"proj_mlp", "proj_out", "attn.to_q"} <= kinds
    rest = {n for n, m in model.named_modules() if type(m) is nn.Linear} - set(layers)
    assert all("norm" in n or "blocks." not in n for n in rest)


def test_a_layer_in_several_places() -> None:
    """Each place has the same layer in float8, and gets the same one back."""
    model = small.model("pixart_sigma").requires_grad_(False)
    one, other = (block.attn1 for block in model.transformer_blocks[:2])
    other.to_q = shared = one.to_q
    undo = float8.quantize(model)
    assert type(one.to_q) is float8.Float8Linear and one.to_q is other.to_q
    undo()
    assert one.to_q is other.to_q is shared


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_and_back(name: str, fused: bool) -> None:
    model, banks = small.model(name).eval().requires_grad_(False), small.bank(name)
    if fused:
        fuse(model)
    state, keys = copy.deepcopy(model.state_dict()), list(model.state_dict())
    before = predict(model, name, banks)
    undo = float8.quantize(model)
    changed = predict(model, name, banks)
    assert 0 < distance(changed, before) < 0.05
    assert not any(p.requires_grad for p in model.parameters())
    undo()
    assert torch.equal(predict(model, name, banks), before) and list(model.state_dict()) == keys
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_fused_as_not_fused(name: str) -> None:
    """Rows that are quantized once for several layers, and the GELU in between: another rounding of a float8 number
    here and there, far below what float8 changes."""
    found = []
    for fused in (False, True):
        model = small.model(name).eval().requires_grad_(False)
        before = predict(model, name, small.bank(name))
        if fused:
            fuse(model)
        float8.quantize(model)
        found.append(predict(model, name, small.bank(name)))
    assert distance(found[1], found[0]) < 0.2 * distance(found[0], before)


def _need_float8() -> None:
    if (reason := float8.refuse(torch.device("cuda"))) is not None:
        pytest.skip(reason)


def predict(model: nn.Module, name: str, bank: Any) -> Tensor:
    cache = small.cache(name, 3)
    rows = {key: value[:3] for key, value in bank.banks.items()}
    with torch.no_grad():
        return Predictor(model)(cache.latents, torch.tensor([1, 20, 40]), rows)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_what_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a fused block: the tokens of queries, keys and values are quantized together, the GELU with its result."""
    calls: list[bool] = []
    plain = float8.quantize_rows

    def counted(x: Tensor, *, gelu: bool = False) -> tuple[Tensor, Tensor]:
        calls.append(gelu)
        return plain(x, gelu=gelu)

    monkeypatch.setattr(float8, "quantize_rows", counted)
    model = small.model("pixart_sigma").eval().requires_grad_(False)
    undo = float8.quantize(model)
    calls.clear()
    predict(model, "pixart_sigma", small.bank("pixart_sigma"))
    assert len(calls) == 4 * 10 and not any(calls)
    fuse(model)
    calls.clear()
    predict(model, "pixart_sigma", small.bank("pixart_sigma"))
    assert len(calls) == 4 * 7 and sum(calls) == 4  # qkv, out, q, kv, out, ff, gelu
    undo()


def test_feed_forwards_that_are_called_as_they_are() -> None:
    model = small.model("pixart_sigma").eval().requires_grad_(False)
    undo = float8.quantize(model)
    ff: Any = model.transformer_blocks[0].ff  # type: ignore[union-attr, index]
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    assert float8.feed_forward(list(ff.net), x) is not None
    seen: list[int] = []
    hook = ff.net[0].register_forward_hook(lambda *_: seen.append(1))
    assert float8.feed_forward(list(ff.net), x) is None
    hook.remove()
    ff.net[0].approximate = "none"
    assert float8.feed_forward(list(ff.net), x) is None
    ff.net[0].approximate = "tanh"
    undo()
    assert float8.feed_forward(list(ff.net), x) is None
    assert torch.allclose(ff(x), ff.net[2](F.gelu(ff.net[0].proj(x), approximate="tanh")))


def test_layers_that_stay() -> None:
    """Of odd widths, of another class, with a forward or hooks of their own."""
    model: Any = small.model("dit")
    block = model.transformer_blocks[0]
    block.attn1.to_q.forward = block.attn1.to_q.forward
    block.attn1.to_k.register_forward_hook(lambda *_: None)
    block.attn1.to_v = nn.Linear(16, 24)
    block.ff.net[2] = nn.Sequential(nn.Linear(64, 16))
    layers = float8.layers_of(model)
    own = [name for name in layers if name.startswith("transformer_blocks.0.")]
    assert own == [
        "transformer_blocks.0.attn1.to_out.0",
        "transformer_blocks.0.ff.net.0.proj",
        "transformer_blocks.0.ff.net.2.0",
    ]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    made = Float8Linear(linear())
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = torch.compile(made, backend=backend)(x)
    torch.compiler.reset()
    torch.testing.assert_close(y, made(x), rtol=1e-5, atol=1e-4)


def test_refused() -> None:
    for name in ("sd", "sana"):
        with pytest.raises(
            InputError, match=r"teacher: expected a transformer of DiTTransformer2DModel, .* for float8"
        ):
            float8.layers_of(small.model(name))
    with pytest.raises(InputError, match="widths that are multiples of 16, for float8, got none"):
        float8.layers_of(small.model("pixart_alpha"))
    teacher = small.model("dit")
    with pytest.raises(InputError, match="student: expected modules of its own beside a teacher in float8"):
        float8.quantize(teacher, nn.ModuleList([teacher]))
    assert not any(isinstance(module, Float8Linear) for module in teacher.modules())


@pytest.mark.parametrize("capability", [(8, 0), (8, 6)])
def test_a_gpu_without_float8(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason = float8.refuse(torch.device("cuda"))
    assert reason is not None and f"capability {capability[0]}.{capability[1]}, and float8 needs 8.9" in reason
    assert "on mps" in str(float8.refuse(torch.device("mps"))) and float8.refuse(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """As on a CPU from the same float8 numbers, except for a rounding to bfloat16 (2^-9 of the product) and for sums:
    the GPU aligns 32 products to the largest and keeps 13 bits behind its first (arXiv 2412.19437, section 3.5.2)."""
    _need_float8()
    layer = linear(dtype=dtype)
    x = torch.randn(3, 70, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = Float8Linear(layer)
    expected = exact(x).float()
    made = Float8Linear(copy.deepcopy(layer).cuda())
    y = made(x.cuda()).cpu().float()
    q, scale = quantize_rows(x.flatten(0, 1))
    products = (q.float() * scale)[:, None] * (exact.weight.float() * exact.scale.t())[None]
    largest = products.abs().amax(-1).view_as(y)
    bias = layer.bias.float()
    rounded = 2**-9 * (expected - bias).abs() + torch.finfo(dtype).eps * expected.abs()
    assert ((y - expected).abs() <= 1.01 * rounded + 32 * 2**-13 * 2 * largest).all()
    assert torch.equal(y, made(x.cuda()).cpu().float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_wait_on_the_host() -> None:
    _need_float8()
    model = small.model("pixart_sigma").cuda().bfloat16().requires_grad_(False)
    layers = float8.layers_of(model)
    before = {name: (layer, layer.weight.cpu().clone()) for name, layer in layers.items()}
    undo = float8.quantize(model)
    assert all(layer.weight.device.type == "cpu" for layer, _ in before.values())
    undo()
    for name, (layer, weight) in before.items():
        assert model.get_submodule(name) is layer and layer.weight.is_cuda
        assert torch.equal(layer.weight.cpu(), weight)
