# SPDX-License-Identifier: Apache-2.0
"""How models are called: the dtype of their inputs, their prediction, and trial forwards without side effects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from fastdistill.diffusion.sampler import ddim
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError
from fastdistill.models.calling import Predictor, compute_dtype, kept_in_float32, prediction, trial
from tests import tiny


class Kept(ModelMixin):
    """A model of diffusers that keeps its first part in float32."""

    _keep_in_fp32_modules = ["norm"]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_out, self.linear = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm_out.half()
        self.linear.half()


def layerwise(model: UNet2DConditionModel) -> nn.Module:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.float8_e4m3fn
    return model


def stored_as_integers() -> nn.Module:
    model = nn.Linear(4, 4).bfloat16()
    model.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return model


def scales_in_buffers() -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    model.register_buffer("absmax", torch.ones(2, dtype=torch.float16))
    return model


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (nn.Linear(2, 2), torch.float32),
        (nn.Linear(2, 2).half(), torch.float16),
        (nn.Sequential(nn.Linear(2, 2).to(torch.float8_e5m2), nn.Linear(2, 2).bfloat16()), torch.bfloat16),
        (stored_as_integers(), torch.bfloat16),
        (scales_in_buffers(), torch.float16),
        (Kept(), torch.float16),
        (nn.Sequential(Kept()), torch.float16),
        (nn.LayerNorm(3).double(), torch.float64),
        (nn.ReLU(), torch.float32),
    ],
)
def test_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    assert compute_dtype(model) == dtype


def test_compute_dtype_of_layerwise_casting(digits: UNet2DConditionModel) -> None:
    assert compute_dtype(nn.Sequential(layerwise(digits))) == torch.bfloat16


def test_compute_dtype_of_packed_weights() -> None:
    model = tiny.packed(nn.Sequential(nn.Linear(4, 4)))
    assert not list(model.parameters()) and compute_dtype(model) == torch.float32


def test_parts_that_diffusers_keeps_in_float32() -> None:
    model = Kept()
    assert kept_in_float32(nn.Sequential(model)) == {id(model.norm.weight), id(model.norm.bias)}  # but not norm_out


class Recorder(nn.Module):
    """Records its inputs; the timestep is the first, the second or a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float16))

    def forward(self, x: Tensor, t: Tensor, **rows: Any) -> Tensor:
        self.got = x, t, rows
        return x


class ByName(Recorder):
    def forward(self, hidden_states: Tensor, timestep: Any = None, **rows: Any) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states, timestep, **rows)


@pytest.mark.parametrize("kind", [Recorder, ByName])
def test_inputs_are_cast_and_integers_are_not(kind: type[Recorder]) -> None:
    model, x, t = kind(), torch.randn(2, 3), torch.tensor([3, 7])
    rows = {"tokens": torch.randn(2, 4).double(), "label": torch.tensor([1, 2]), "mask": torch.tensor([True, False])}
    output = Predictor(model)(x, t, rows)
    assert torch.equal(output, x.half()) and torch.equal(model.got[1], t)
    assert torch.equal(model.got[2]["tokens"], rows["tokens"].half())
    assert model.got[2]["label"] is rows["label"] and model.got[2]["mask"] is rows["mask"]


def test_a_call_of_ones_own_and_times_of_ones_own() -> None:
    model, x, t = Recorder(), torch.randn(2, 3), torch.tensor([1, 0])
    times = torch.tensor([0.5, 7.0])
    predict = Predictor(model, lambda m, x, time, rows: m(2 * x, time, tokens=rows["encoder_hidden_states"]), times)
    assert torch.equal(predict(x, t, torch.ones(2, 4)), 2 * x.half())
    assert model.got[1].tolist() == [7.0, 0.5] and model.got[2]["tokens"].dtype == torch.float16


def test_a_prediction_is_found_or_named() -> None:
    x = torch.zeros(1)
    for output in (x, (x, "more"), [x], SimpleNamespace(sample=x), SimpleNamespace(sample=(x,))):
        assert prediction(output) is x
    for output in (None, (), {"out": x}, SimpleNamespace(sample=None)):
        with pytest.raises(InputError, match=r"model: expected a tensor, an object with \.sample, or a tuple"):
            prediction(output)


@pytest.mark.parametrize("kind", [Recorder, ByName])
def test_the_sampler_calls_a_module_in_its_dtype(kind: type[Recorder]) -> None:
    """State and prompts are cast; the state between the steps and the result are float32."""
    model, states = kind(), []
    x, rows = torch.randn(2, 3), torch.randn(2, 4, 5)
    given = model, x, rows, rows[0], NoiseSchedule.linear(20)
    output = ddim(*given, steps=2, guidance_scale=3.0, callback=lambda i, t, state: states.append(state))
    got, t, prompts = *model.got[:2], model.got[2]["encoder_hidden_states"]
    assert got.dtype == prompts.dtype == torch.float16 and torch.equal(prompts[2:], rows.half()) and t.shape == (4,)
    assert output.dtype == states[0].dtype == torch.float32 and torch.equal(got[:2], states[0].half())


class Restless(nn.Module):
    """Changes everything that a forward can change, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("seen", torch.zeros(1))
        self.norm.momentum = None
        self.frozen = nn.BatchNorm1d(3).eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.seen = x.sum()
        return self.frozen(self.dropout(self.norm(x))) + torch.randn(3)


def test_a_trial_leaves_no_trace() -> None:
    model = Restless().train()
    model.frozen.eval()
    seen, before = model.seen, {k: v.clone() for k, v in model.state_dict().items()}
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    for broken in (False, True):
        try:
            with trial(model):
                output = model(torch.randn(2, 3))
                assert not output.requires_grad and not model.norm.training
                if broken:
                    raise KeyError
        except KeyError:
            pass
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.seen is seen
        assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes
        assert torch.is_grad_enabled()


def test_a_trial_compiles_nothing() -> None:
    """A compiled teacher is compiled only for the batches of the run."""
    graphs = []
    model = tiny.Net()
    model.compile(backend=lambda graph, _: graphs.append(graph) or graph)
    inputs = torch.randn(1, 4, 3, 3), torch.tensor([1]), torch.randn(1, 2, 6)
    with trial(model):
        model(*inputs)
    assert not graphs
    model(*inputs)
    assert len(graphs) == 1
