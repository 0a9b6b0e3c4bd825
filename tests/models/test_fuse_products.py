# SPDX-License-Identifier: Apache-2.0
"""Convolutions and projections of fused models with fewer passes, as on a GPU."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistill.models.fuse import convolutional, fuse, products, unfuse
from fastdistill.train.guard import NoHostSync
from tests.harness import assert_alike
from tests.models.fusible import MODELS, assert_close, batches, call, cast, made, moved, parts, run

SLOW = pytest.mark.slow
UNETS = [name for name in MODELS if name.startswith("UNet")]
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutional, "FEW", 0)
    monkeypatch.setattr(products, "PLACES", {"cpu", "cuda"})


def laid_out(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """U-Nets in channels_last."""
    model, inputs = made(name)
    if name in UNETS:
        model = model.to(memory_format=LAST)  # type: ignore[call-overload]
        inputs["sample"] = inputs["sample"].contiguous(memory_format=LAST)
    return model, inputs


class Operations(TorchDispatchMode):
    """Records for convolutions whether they have a bias, and the number and the columns of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.biased: list[bool] = []
        self.columns: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.biased.append(args[2] is not None)
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.columns.append(args[-1].shape[1])
        return func(*args, **(kwargs or {}))


CASES = [
    *((name, torch.float32, True) for name in MODELS),
    *((name, torch.bfloat16, name == UNETS[0]) for name in MODELS),
]


def compared(name: str, dtype: torch.dtype, device: str) -> None:
    """Checks the bounds of ``tests/models/test_fuse.py``."""
    model, inputs = laid_out(name)
    given = batches(inputs)
    truth, true_gradients = run(copy.deepcopy(model).double(), [cast(i, torch.float64) for i in given])
    model, given = model.to(dtype).to(device), [there(cast(i, dtype), device) for i in given]
    eager, eager_gradients = run(model, given)
    keys = list(model.state_dict())
    fuse(model)
    output, gradients = run(model, given)
    assert list(model.state_dict()) == keys
    assert output.stride() == eager.stride()
    changed = functools.cache(lambda: moved(laid_out(name)[0], batches(inputs), torch.finfo(dtype).eps))
    assert_close("output", output.cpu(), truth, eager.cpu(), 2.0, lambda: changed()[0])
    for key, gradient in gradients.items():
        own = true_gradients[key], eager_gradients[key].cpu()
        condition = functools.partial(lambda key: changed()[1][key], key)
        assert_close(key, gradient.cpu(), *own, 3.0, condition)


def there(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param(*case, marks=[] if quick else SLOW, id="-".join(map(str, case))) for *case, quick in CASES],
)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    compared(name, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_on_a_gpu(name: str) -> None:
    compared(name, torch.bfloat16, "cuda")


@pytest.mark.parametrize("watch", [NoHostSync, torch.profiler.profile])
@pytest.mark.parametrize("name", [UNETS[0], "DiTTransformer2DModel"])
def test_same_bits_where_a_step_is_watched(name: str, watch: Any) -> None:
    """A graph's last step before its capture runs in a mode that looks for what cannot be captured."""
    model, inputs = laid_out(name)
    fuse(model)
    given = batches(inputs, 1)
    output, gradients = run(model, given)
    with watch():
        watched, watched_gradients = run(model, given)
    assert torch.equal(output, watched)
    assert [key for key, value in gradients.items() if not torch.equal(value, watched_gradients[key])] == []


def test_biases_that_are_passes() -> None:
    """Of the convolutions that are not matrix products, the first, the last and ``Downsample2D`` keep theirs."""
    model, inputs = laid_out(UNETS[0])
    fuse(model)
    resnets = parts(model, ResnetBlock2D)
    with Operations() as operations:
        model(**inputs)
    down, up = (sum(type(m).__name__ == name for m in model.modules()) for name in ("Downsample2D", "Upsample2D"))
    assert up and operations.biased.count(False) == 2 * len(resnets) + up
    assert operations.biased.count(True) == 2 + down


def test_projections_are_one_product() -> None:
    model, inputs = laid_out(UNETS[0])
    fuse(model)
    own = [m for m in parts(model, Attention) if not m.is_cross_attention]
    with torch.no_grad(), Operations() as operations:
        model(**inputs)
    for attn in own:
        count = sum(other.inner_dim == attn.inner_dim for other in own)
        assert operations.columns.count(3 * attn.inner_dim) == count


def test_in_another_layout_convolutions_stay() -> None:
    """In other layouts a matrix product would have to copy the map."""
    conv, x = nn.Conv2d(8, 4, 1), torch.randn(2, 8, 5, 5)
    assert not products.is_product(conv, x) and products.is_product(conv, x.contiguous(memory_format=LAST))
    for other in (
        nn.Conv2d(8, 4, 3, padding=1),
        nn.Conv2d(8, 4, 1, stride=2),
        nn.Conv2d(8, 4, 1, padding=1),
        nn.Conv2d(8, 4, 1, groups=2),
    ):
        assert not products.is_product(other, x.contiguous(memory_format=LAST))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_is_doubled_bit_by_bit(dtype: torch.dtype) -> None:
    """Also for NaN and -0; first and second derivatives are torch's."""
    x = torch.randn(3, 16, 5, 4).to(dtype)
    x[0, 0, 0, :2] = torch.tensor([torch.nan, -0.0])
    x = x.contiguous(memory_format=LAST)
    assert products.doubles(x)
    expected, got = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"), products.doubled(x)
    words = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got.view(words), expected.view(words)) and got.stride() == expected.stride()
    found = []
    for double in (products.doubled, lambda x: torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")):
        leaf = x.nan_to_num().requires_grad_()
        (first,) = torch.autograd.grad(double(leaf).square().sum(), leaf, create_graph=True)
        found += [first, *torch.autograd.grad(first.square().sum(), leaf)]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_maps_that_are_not_doubled_so() -> None:
    x = torch.randn(2, 16, 4, 4)
    last = x.contiguous(memory_format=LAST)
    assert products.doubles(last) and not products.doubles(x) and not products.doubles(last[:, :3])
    assert not products.doubles(torch.randn(2, 6, 4, 4).contiguous(memory_format=LAST))
    many = torch.randn(64, 4, 2, 2).contiguous(memory_format=LAST)
    assert products.doubles(many) and not products.doubles(many.requires_grad_())
    with torch.no_grad():
        assert products.doubles(many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skips_are_joined_bit_by_bit(dtype: torch.dtype) -> None:
    """NaN and -0 too; gradients and the derivatives of those are torch's, in one block of memory each."""
    x, skip = torch.randn(3, 16, 5, 4).to(dtype), torch.randn(3, 24, 5, 4).to(dtype)
    x[0, 0, 0, :2] = torch.tensor([torch.nan, -0.0])
    x, skip = (t.contiguous(memory_format=LAST) for t in (x, skip))
    assert products.joins(x, skip)
    expected, got = torch.cat([x, skip], dim=1), products.joined(x, skip)
    words = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got.view(words), expected.view(words)) and got.stride() == expected.stride()
    found = []
    for join in (products.joined, lambda *maps: torch.cat(maps, dim=1)):
        leaves = [t.nan_to_num().requires_grad_() for t in (x, skip)]
        plain = torch.autograd.grad(join(*leaves).square().sum(), leaves)
        first = torch.autograd.grad(join(*leaves).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), leaves)
        found.append([*plain, *first, *second])
        if join is products.joined:
            assert all(t.is_contiguous(memory_format=LAST) for t in plain)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 1), (1, 4, 1), (2, 1, 5), (1, 1, 6)])
def test_maps_with_sizes_of_one(size: tuple[int, int, int]) -> None:
    """They are in both layouts at once, and the strides of sizes of 1 may be those of the other layout."""
    batch, *positions = size
    x, skip = torch.randn(batch, 16, *positions), torch.randn(batch, 8, *positions)
    for t in (x, skip) if positions == [1, 1] else ():
        assert t.is_contiguous() and t.is_contiguous(memory_format=LAST)
    x, skip = (t.contiguous(memory_format=LAST).requires_grad_() for t in (x, skip))
    assert products.doubles(x) and products.joins(x, skip)
    for mine, plain in (
        (products.doubled(x), torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")),
        (products.joined(x, skip), torch.cat([x, skip], dim=1)),
    ):
        along = torch.randn(plain.shape)
        found = [torch.autograd.grad(out, (x, skip), along, allow_unused=True) for out in (mine, plain)]
        assert torch.equal(mine, plain)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_convolution(padding_mode: str, dtype: torch.dtype) -> None:
    conv = nn.Conv2d(8, 4, 3, padding=1, padding_mode=padding_mode).to(dtype).to(memory_format=LAST)  # type: ignore[call-overload]
    found = []
    for convolution in (products.convolution, lambda conv, x: conv(x)):
        torch.manual_seed(0)
        x = torch.randn(2, 8, 5, 3, dtype=dtype).contiguous(memory_format=LAST).requires_grad_()
        wanted = [x, *conv.parameters()]
        out = convolution(conv, x)
        first = torch.autograd.grad(out.sin().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)  # type: ignore[arg-type]
        found.append([out, *first, *second])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("learned", [0, 1])
def test_one_of_the_joined_maps_is_learned(learned: int) -> None:
    maps = [torch.randn(2, 8, 3, 3).contiguous(memory_format=LAST) for _ in range(2)]
    maps[learned].requires_grad_()
    weights = torch.randn(2, 16, 3, 3).contiguous(memory_format=LAST)
    (products.joined(*maps) * weights).sum().backward()
    assert torch.equal(maps[learned].grad, weights.split(8, dim=1)[learned])  # type: ignore[arg-type]
    assert maps[1 - learned].grad is None


def test_maps_that_are_not_joined_so() -> None:
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=LAST)
    assert products.joins(x, x)
    assert not products.joins(x, x.contiguous()) and not products.joins(x, x[:, :4]) and not products.joins(x, x[:1])
    assert not products.joins(x, x.bfloat16()) and not products.joins(x, x[..., :2])
    assert not products.joins(x, torch.randn(2, 6, 4, 4).contiguous(memory_format=LAST))


@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("bias",)])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_a_branch(biases: tuple[bool, bool], frozen: tuple[str, ...]) -> None:
    """The norm and the shortcut of a resnet's input: gradients and their derivatives."""
    conv = nn.Conv2d(8, 4, 1, bias=biases[0]).double().to(memory_format=LAST)  # type: ignore[call-overload]
    norm = nn.GroupNorm(2, 8).double()
    other = torch.randn(4, dtype=torch.float64, requires_grad="bias" not in frozen) if biases[1] else None
    conv.weight.requires_grad_("weight" not in frozen)
    if conv.bias is not None:
        conv.bias.requires_grad_("bias" not in frozen)
    found = []
    for branched in (products.branched, None):
        torch.manual_seed(1)
        x = torch.randn(2, 8, 5, 3, dtype=torch.float64).contiguous(memory_format=LAST)
        x.requires_grad_("x" not in frozen)
        if branched is not None:
            beside, out = branched(conv, x, other)
        else:
            beside, out = x, conv(x) if other is None else conv(x) + other[:, None, None]
        total = (norm(beside).sin().mean(1, keepdim=True) * out).cos().sum()
        wanted = [t for t in (x, conv.weight, conv.bias, other) if t is not None and t.requires_grad]
        plain = torch.autograd.grad(total, wanted, retain_graph=True)
        again = torch.autograd.grad(total, wanted, retain_graph=True)
        first = torch.autograd.grad(total, wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)  # type: ignore[arg-type]
        found.append([beside, out, *plain, *again, *first, *second])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("used", [0, 1])
def test_a_branch_of_which_one_part_is_used(used: int) -> None:
    conv = nn.Conv2d(8, 4, 1).to(memory_format=LAST)  # type: ignore[call-overload]
    x = torch.randn(2, 8, 5, 3).contiguous(memory_format=LAST).requires_grad_()
    products.branched(conv, x, None)[used].square().sum().backward()
    got, x.grad = x.grad, None
    (x, conv(x))[used].square().sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_skips_of_a_model() -> None:
    """Of every resnet of the up blocks, with checkpointing too; not with FreeU, whose maps change first."""
    model, inputs = laid_out(UNETS[0])
    model.train()
    fuse(model)
    count = sum(len(block.resnets) for block in model.up_blocks)  # type: ignore[union-attr, misc]
    calls: list[int] = []
    original = products.joined
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolutional, "joined", lambda *maps: (calls.append(1), original(*maps))[1])
        for switch in ("disable_gradient_checkpointing", "enable_gradient_checkpointing"):
            getattr(model, switch)()
            calls.clear()
            model(**inputs)
            assert len(calls) == count
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)  # type: ignore[operator]
        calls.clear()
        got = call(model, inputs)
        assert not calls
        plain, exact = copy.deepcopy(model), copy.deepcopy(model)
        for other in (plain, exact):
            unfuse(other)
        assert_alike(got, call(plain, inputs), call(exact.double(), cast(inputs, torch.float64)))


def test_additions_of_gradients() -> None:
    """None has parts of a tensor for operands, which torch adds element by element."""

    class Additions(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.add.Tensor and all(isinstance(a, Tensor) and a.dim() == 4 for a in args):
                parts.extend(a for a in args if torch.empty_like(a).stride() != a.stride())
            return func(*args, **(kwargs or {}))

    parts: list[Tensor] = []
    model, inputs = laid_out(UNETS[0])
    fuse(model)
    total = model(**inputs).sample.square().sum()
    with Additions():
        total.backward()
    assert not parts


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_a_product_of_channels(bias: bool, added: bool) -> None:
    conv = nn.Conv2d(8, 4, 1, bias=bias).to(memory_format=LAST)  # type: ignore[call-overload]
    x = torch.randn(2, 8, 5, 3).contiguous(memory_format=LAST)
    other = torch.randn(4) if added else None
    got = products.pointwise(conv, x, other)
    expected = conv(x) if other is None else conv(x) + other[:, None, None]
    torch.testing.assert_close(got, expected)
    assert got.stride() == expected.stride()


def hooked(module: nn.Module, *args: Any) -> None:
    module.register_forward_hook(lambda module, args, out: out * 0.5)


def before(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def patched(module: nn.Module) -> None:
    module.forward = lambda x: type(module).forward(module, x) * 0.5  # type: ignore[method-assign]


def another_class(module: nn.Module) -> None:
    forward = type(module).forward
    module.__class__ = type("Own", (type(module),), {"forward": lambda self, x: forward(self, x) * 0.5})


def parametrized(module: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(module)
    with torch.no_grad():
        module.parametrizations.weight.original0.mul_(2)  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [hooked, before, patched, another_class, parametrized])
def test_modules_that_are_more_than_their_class(change: Any) -> None:
    """If changed after ``fuse``, the result is that of the model without ``fuse``."""
    model, inputs = laid_out(UNETS[0])
    fused, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fuse(fused)
    plain = call(model, inputs)
    for some in (model, fused, exact):
        for name, module in list(some.named_modules()):
            if name.endswith(("conv1", "conv2", "conv_shortcut", "to_q", "to_v", "proj_in")):
                change(module)
    expected = call(model, inputs)
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    assert_alike(call(fused, inputs), expected, call(exact, cast(inputs, torch.float64)))


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "SD3Transformer2DModel"])
def test_compiled(name: str) -> None:
    """Outputs and gradients with a compiler that traces the same code."""
    model, inputs = laid_out(name)
    given = batches(inputs)
    truth, true_gradients = run(copy.deepcopy(model).double(), [cast(i, torch.float64) for i in given])
    own, own_gradients = run(model, given)
    fuse(model)
    torch._dynamo.reset()
    output, gradients = run(torch.compile(model, backend="aot_eager"), given)  # type: ignore[arg-type]
    assert_close("output", output, truth, own, 2.0)
    for key, gradient in true_gradients.items():
        assert_close(key, gradients["_orig_mod." + key], gradient, own_gradients[key], 3.0)


def test_gradient_checkpointing() -> None:
    model, inputs = laid_out(UNETS[0])
    model.train()
    fuse(model)
    found = []
    for switch in (model.enable_gradient_checkpointing, model.disable_gradient_checkpointing):
        switch()  # type: ignore[operator]
        found.append(run(model, [inputs])[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_adapters() -> None:
    """With PEFT: layers with adapters are called; the other weights are concatenated."""
    peft = pytest.importorskip("peft")
    model, inputs = laid_out(UNETS[0])
    targets = ["to_q", "to_v", "conv1", "conv_shortcut", "proj_in", "proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(config)  # type: ignore[operator]
    given = batches(inputs)
    changed = functools.cache(functools.partial(moved, copy.deepcopy(model), given, torch.finfo(torch.float32).eps))
    truth, true_gradients = run(copy.deepcopy(model).double(), [cast(i, torch.float64) for i in given])
    eager, eager_gradients = run(model, given)
    fuse(model)
    output, gradients = run(model, given)
    assert_close("output", output, truth, eager, 2.0, lambda: changed()[0])
    for key, gradient in gradients.items():
        condition = functools.partial(lambda key: changed()[1][key], key)
        assert_close(key, gradient, true_gradients[key], eager_gradients[key], 3.0, condition)
