# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdistill.errors import InputError
from fastdistill.models import Adapters, Taps
from tests.harness import EPS

from .conftest import inputs

Make = Callable[..., UNet2DConditionModel]


class Net(nn.Module):
    """first -> second (twice if asked, checkpointed if asked) -> third."""

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


def test_tuples_stand_for_their_first_element(digits: UNet2DConditionModel) -> None:
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

    net = Net()
    net.second.forward = lambda x: None  # type: ignore[assignment,method-assign]
    net.skip = True
    taps = Taps(net, ["second"])
    net(torch.randn(1, 3))
    with pytest.raises(InputError, match="from second, got NoneType"):
        taps.features()


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


def test_shapes_compute_nothing(digits: UNet2DConditionModel) -> None:
    taps = Taps(digits, ["down_blocks.1", "mid_block.attentions.0.transformer_blocks.0.attn1"])
    before = torch.get_rng_state()
    assert taps.shapes(**inputs(digits)) == [(2, 64, 4, 4), (2, 16, 64)]
    assert torch.equal(torch.get_rng_state(), before)
    assert next(digits.parameters()).device.type == "cpu"
    digits(**inputs(digits))
    assert taps.features()[0].device.type == "cpu"


def test_adapters() -> None:
    adapters = Adapters([(4, 6), (5, 5), (3, 7)])
    features = [torch.randn(2, 4, 8, 8), torch.randn(2, 5, 4, 4), torch.randn(2, 16, 3)]
    out = adapters(features)
    assert [tuple(f.shape) for f in out] == [(2, 6, 8, 8), (2, 5, 4, 4), (2, 16, 7)]
    assert out[1] is features[1]
    weight, bias = adapters[0].weight[:, :, 0, 0], adapters[0].bias
    bound = {"rtol": 0, "atol": 8 * EPS * 4}  # sums of 5 terms below 4
    torch.testing.assert_close(out[0][1, :, 2, 3], weight @ features[0][1, :, 2, 3] + bias, **bound)
    weight, bias = adapters[2].weight[:, :, 0, 0], adapters[2].bias
    torch.testing.assert_close(out[2][1, 5], weight @ features[2][1, 5] + bias, **bound)
    assert set(adapters.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    with pytest.raises(InputError, match="features: expected 3 tensors"):
        adapters(features[:2])
    with pytest.raises(InputError, match=r"features\[0\]: expected 4 channels, got shape \(2, 5, 4, 4\)"):
        adapters(features[1:] + features[:1])
    with pytest.raises(InputError, match=r"pairs\[0\]"):
        Adapters([(0, 3)])
