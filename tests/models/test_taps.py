# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdistill.errors import InputError
from fastdistill.models import Adapters, Taps

from .conftest import inputs

Make = Callable[..., UNet2DConditionModel]


class Net(nn.Module):
    """first -> second (optionally twice or checkpointed) -> third."""

    def __init__(self, repeat: int = 1, reentrant: bool | None = None, skip: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            nn.Linear(3, 4),
            nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
            nn.Linear(4, 2),
        )
        self.repeat, self.reentrant, self.skip = repeat, reentrant, skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for _ in range(self.repeat):
            x = self.second(x) if self.reentrant is None else checkpoint(self.second, x, use_reentrant=self.reentrant)
        return x if self.skip else self.third(x)


def test_features_in_the_order_of_the_names() -> None:
    net, x = Net(), torch.randn(5, 3)
    taps = Taps(net, ["second", "first"])
    net(torch.randn(5, 3))
    net(x)  # only the last forward counts
    second, first = taps.features()
    assert torch.equal(first, net.first(x))
    assert torch.equal(second, net.second(net.first(x).relu()))
    second.sum().backward()
    assert net.first.weight.grad is not None


def test_the_one_tensor_of_a_tuple(digits: UNet2DConditionModel) -> None:
    taps = Taps(digits, ["down_blocks.0", "up_blocks.1", "mid_block"])
    expected: list[Tensor] = []
    digits.down_blocks[0].register_forward_hook(lambda module, args, output: expected.append(output[0]))
    digits(**inputs(digits))
    features = taps.features()
    assert features[0] is expected[0]
    assert [tuple(f.shape) for f in features] == [(2, 32, 4, 4), (2, 32, 8, 8), (2, 64, 4, 4)]


def test_model_outputs_and_what_has_no_tensor(digits: UNet2DConditionModel) -> None:
    outer = nn.ModuleDict({"unet": digits})
    outer.forward = lambda **kwargs: outer["unet"](**kwargs)  # type: ignore[method-assign]
    taps = Taps(outer, ["unet"])
    out = outer(**inputs(digits))
    assert taps.features()[0] is out.sample

    with pytest.raises(InputError, match="from second, got NoneType"):
        tapped("second", None)


def tapped(name: str, output: object, like: Tensor | None = None) -> Tensor:
    """The feature of a tap ``name`` on a module ``second`` with the input ``like`` and this output."""
    net = nn.Module()
    net.second = nn.Module()
    net.second.forward = lambda x, hidden_states=None: output  # type: ignore[method-assign]
    net.forward = lambda x: net.second(x[:1], hidden_states=x)  # type: ignore[method-assign,operator]
    with Taps(net, [name]) as taps:
        net(torch.zeros(2, 3) if like is None else like)
        return taps.features()[0]


def test_which_of_several_tensors() -> None:
    """The tensor with the shape of hidden_states, wherever it is; by name if there is none or several."""
    image, text, other = torch.zeros(2, 16, 8), torch.zeros(2, 7, 8), torch.zeros(2, 16, 4)
    for output in ((image, text), (text, image), (text, (image.clone(), text), image, None), {"a": text, "b": image}):
        assert tapped("second", output, image) is image
    assert tapped("second", (None, text, [image, image]), image) is text
    assert tapped("second[0]", (text, image), image) is text
    assert tapped("second[1]", {"a": text, "b": image}, image) is image
    assert tapped("second[1][0]", (text, (image, text)), image) is image
    both = r"the name of an element, as second returns several.* second\[0\] \(2, 16, 8\), second\[1\] \(2, 16, 8\)"
    with pytest.raises(InputError, match=both):
        tapped("second", (image, image.clone()), image)
    with pytest.raises(InputError, match=r"second\[0\] \(2, 7, 8\), second\[2\] \(2, 16, 4\)"):
        tapped("second", (text, None, other), image)
    for name, output in (("second[2]", (text, image)), ("second[0][0]", (text, image)), ("second[0]", None)):
        with pytest.raises(InputError, match=r"an output with an element \[\d\] from second"):
            tapped(name, output, image)
    with pytest.raises(InputError, match=r"taps: expected a tensor from second\[0\], got tuple"):
        tapped("second[0]", ((image, image), text), image)
    with pytest.raises(InputError, match=r"'third' \(no near match\)"):
        tapped("third[0]", image)


TOKENS = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "attention_head_dim": 16, "num_attention_heads": 2}


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_blocks_that_return_the_prompt_first(family: str, checkpointed: bool) -> None:
    """Blocks of SD3 and Flux return (prompt, image): 16 tokens are the image's, 7 the prompt's."""
    torch.manual_seed(0)
    rows = {"encoder_hidden_states": torch.randn(2, 7, 32), "pooled_projections": torch.randn(2, 32)}
    time = torch.tensor([1.0, 2.0])
    if family == "sd3":
        sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "caption_projection_dim": 32}
        model, names = SD3Transformer2DModel(**TOKENS | sizes), ["transformer_blocks.0", "transformer_blocks.1"]
        inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": time, **rows}
    else:
        sizes = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": [4, 4, 8]}
        model, names = FluxTransformer2DModel(**TOKENS | sizes), ["transformer_blocks.0", "single_transformer_blocks.0"]
        ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(7, 3)}
        inputs = {"hidden_states": torch.randn(2, 16, 4), "timestep": time, **rows, **ids}
    if checkpointed:
        model.train().enable_gradient_checkpointing()
    kept: list[Any] = []
    model.get_submodule(names[0]).register_forward_hook(lambda module, args, output: kept.append(output))
    with Taps(model, [*names, f"{names[0]}[0]"]) as taps:
        model(**inputs)
        image, last, prompt = taps.features()
    assert image is kept[0][1] and prompt is kept[0][0]
    assert image.shape == last.shape == (2, 16, 32) and prompt.shape == (2, 7, 32)


def test_unknown_names_come_with_near_matches(digits: UNet2DConditionModel) -> None:
    with pytest.raises(InputError) as caught:
        Taps(digits, ["down_blocks.0", "down_blocks.0.resnet.0", "zzz"])
    message = str(caught.value)
    assert "UNet2DConditionModel" in message
    assert "'down_blocks.0.resnet.0' (near matches: down_blocks.0.resnets.0" in message
    assert "'zzz' (no near match)" in message
    assert "'down_blocks.0'" not in message
    with pytest.raises(InputError, match="at least one"):
        Taps(digits, [])
    with pytest.raises(InputError, match=r"conv_in more than once"):
        Taps(digits, ["conv_in", "conv_in"])
    for names in ("conv_in", 3, [None]):
        with pytest.raises(InputError, match="taps: expected a list of module names"):
            Taps(digits, names)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"of a torch\.nn\.Module, got 'unet'"):
        Taps("unet", ["conv_in"])  # type: ignore[arg-type]


def test_features_need_one_forward_and_one_firing() -> None:
    net = Net()
    taps = Taps(net, ["first", "second"])
    with pytest.raises(InputError, match="expected a forward"):
        taps.features()
    net(torch.randn(1, 3))
    taps.features()
    with pytest.raises(InputError, match="expected a forward"):
        taps.features()

    net.skip = True
    with Taps(net, ["first", "third"]) as skipped:
        net(torch.randn(1, 3))
        with pytest.raises(InputError, match="got nothing from third"):
            skipped.features()

    twice = Net(repeat=2)
    taps = Taps(twice, ["first", "second"])
    twice(torch.randn(1, 3))
    with pytest.raises(InputError, match="several outputs from second"):
        taps.features()


def test_remove_and_context_leave_no_hook() -> None:
    net = Net()
    with Taps(net, ["first"]) as taps:
        net(torch.randn(1, 3))
        assert len(taps.features()) == 1
    assert not net._forward_pre_hooks and not net.first._forward_hooks
    net(torch.randn(1, 3))
    with pytest.raises(InputError, match="removed"):
        taps.features()


def test_copies_and_pickles_of_the_model_do_not_feed_the_taps() -> None:
    net, x = Net(), torch.randn(2, 3)
    taps = Taps(net, ["first"])
    twin = copy.deepcopy(net)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    net(x)
    twin(torch.zeros(2, 3))
    loaded(torch.zeros(2, 3))
    assert torch.equal(taps.features()[0], net.first(x))


def test_wrapping_afterwards_changes_nothing() -> None:
    net, x = Net(), torch.randn(2, 3)
    taps = Taps(net, ["first"])
    wrapped = nn.Sequential(nn.Sequential(net))  # every name now starts with 0.0
    wrapped(x)
    assert torch.equal(taps.features()[0], net.first(x))


@pytest.mark.parametrize("whole", [True, False])
def test_compiled(whole: bool) -> None:
    """The hooks are traced without a graph break, in a compiled step and in a compiled model."""
    net, x = Net(), torch.randn(2, 3)
    taps = Taps(net, ["first", "second"])

    def step(x: Tensor) -> list[Tensor]:
        net(x)
        return taps.features()

    model = torch.compile(net, backend="aot_eager", fullgraph=True)

    def outside(x: Tensor) -> list[Tensor]:
        model(x)
        return taps.features()

    run = torch.compile(step, backend="aot_eager", fullgraph=True) if whole else outside
    for _ in range(2):
        features = run(x)
        assert torch.equal(features[0], net.first(x))
        sum(f.sum() for f in features).backward()
        assert net.first.weight.grad is not None
        net.zero_grad()


def gradient_message(net: Net) -> str:
    taps = Taps(net, ["first", "second.0"])
    net(torch.randn(2, 3))
    try:
        taps.check_gradients(taps.features())
    except InputError as error:
        return str(error)
    return ""


def test_check_gradients() -> None:
    assert gradient_message(Net()) == ""
    assert gradient_message(Net(reentrant=False)) == ""
    reentrant = gradient_message(Net(reentrant=True))
    assert "got none in second.0;" in reentrant and "use_reentrant=False" in reentrant
    assert "got none in first, second.0; likely every parameter" in gradient_message(Net().requires_grad_(False))
    with torch.no_grad():
        assert "no_grad" in gradient_message(Net())


def test_recomputation_in_the_backward_is_ignored() -> None:
    net = Net(reentrant=False)
    taps = Taps(net, ["second.0"])
    for _ in range(2):
        out = net(torch.randn(2, 3))
        (feature,) = taps.features()
        (out.sum() + feature.sum()).backward()
        with pytest.raises(InputError, match="expected a forward"):
            taps.features()


def test_diffusers_checkpointing_keeps_gradients(digits: UNet2DConditionModel) -> None:
    digits.enable_gradient_checkpointing()
    digits.train()
    taps = Taps(digits, ["down_blocks.0", "down_blocks.1.attentions.0.proj_out", "up_blocks.1"])
    out = digits(**inputs(digits)).sample
    features = taps.features()
    taps.check_gradients(features)
    (out.sum() + sum(f.square().mean() for f in features)).backward()
    assert digits.conv_in.weight.grad is not None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_leave_no_trace(digits: UNet2DConditionModel, device: str) -> None:
    digits.train().to(device)
    taps = Taps(digits, ["down_blocks.1", "mid_block.attentions.0.transformer_blocks.0.attn1"])
    before = torch.get_rng_state()
    assert taps.shapes(**inputs(digits)) == [(2, 64, 4, 4), (2, 16, 64)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in digits.modules())
    with pytest.raises(InputError, match="expected a forward"):
        taps.features()
    with pytest.raises(TypeError):
        taps.shapes()
    digits(**inputs(digits))
    assert taps.features()[0].device.type == device


class Constants(nn.Module):
    """Cannot run without values: it has a tensor that is no buffer, a value read on the host, a table made in
    forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mid, self.scale, self.table = nn.Conv2d(4, 4, 1), torch.ones(4, 1, 1), None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones(1, device=x.device)
        return self.mid(x * self.scale * self.table if x.max() < 1e6 else -x)


def test_shapes_of_models_that_look_at_values() -> None:
    model = Constants()
    torch.set_default_device("meta")
    try:
        with Taps(model, ["mid"]) as taps:
            assert taps.shapes(torch.zeros(1, 4, 2, 2, device="cpu")) == [(1, 4, 2, 2)]
    finally:
        torch.set_default_device(None)
    assert torch.equal(model(torch.zeros(1, 4, 2, 2)), model.mid(torch.zeros(1, 4, 2, 2)))


def test_adapters() -> None:
    adapters = Adapters([(4, 6), (5, 5), (3, 7), (2, 3), (4, 2)])
    shapes = [(2, 4, 8, 8), (2, 5, 4, 4), (2, 16, 3), (2, 2), (2, 4, 3, 5, 5)]
    features = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    out = adapters(features)
    assert [tuple(f.shape) for f in out] == [(2, 6, 8, 8), (2, 5, 4, 4), (2, 16, 7), (2, 3), (2, 2, 3, 5, 5)]
    assert out[1] is features[1]
    for index, axis in {0: 1, 2: 2, 3: 1, 4: 1}.items():
        weight, bias = adapters[index].weight.double(), adapters[index].bias.double()
        expected = features[index].double().movedim(axis, -1) @ weight.T + bias
        size = features[index].abs().movedim(axis, -1).double() @ weight.abs().T + bias.abs()
        error = (out[index].movedim(axis, -1) - expected).abs()
        assert (error <= 4 * torch.finfo(torch.float32).eps * size).all()
    assert set(adapters.state_dict()) == {f"{i}.{name}" for i in (0, 2, 3, 4) for name in ("weight", "bias")}
    assert adapters.half()(features)[0].dtype == torch.float16  # for a float16 student with a float32 layer
    with pytest.raises(InputError, match="features: expected 5 tensors"):
        adapters(features[:2])
    with pytest.raises(InputError, match=r"features\[0\]: expected 4 channels, got shape \(2, 5, 4, 4\)"):
        adapters(features[1:] + features[:1])
    for pairs in ([(0, 3)], [(1, 2, 3)], [4], [(1.5, 2)]):
        with pytest.raises(InputError, match=r"pairs\[0\]: expected \(student channels, teacher channels\)"):
            Adapters(pairs)  # type: ignore[arg-type]


def test_adapters_of_any_default_dtype_are_the_same() -> None:
    expected = Adapters([(4, 6)])
    torch.set_default_dtype(torch.float64)
    try:
        found = Adapters([(4, 6)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0].weight, expected[0].weight) and torch.equal(found[0].bias, expected[0].bias)
