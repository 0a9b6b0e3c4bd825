# SPDX-License-Identifier: Apache-2.0
"""What an objective gets: models that are called in their own dtype and checked before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from fastdistill.data.prompt_bank import PromptBank
from fastdistill.distill import RandomConditioning, Setting, Weights
from fastdistill.distill.denoising import Denoising
from fastdistill.errors import InputError
from tests import tiny


class Own:
    """A user's objective: the output loss; it calls the models directly or through the setting."""

    def __init__(self, direct: bool = False) -> None:
        self.direct = direct

    def describe(self) -> dict[str, object]:
        return {"name": "own"}

    def bind(self, setting: Setting) -> Any:
        return BoundOwn(setting, self.direct)


class BoundOwn:
    metric_names, trained = ("loss",), ()

    def __init__(self, setting: Setting, direct: bool) -> None:
        self.setting, self.direct = setting, direct
        self.batches = setting.batches(torch.zeros(len(setting.schedule), dtype=torch.int64))
        self.prepare, self.close = self.batches.prepare, self.batches.close

    def predict(self, model: nn.Module, draw: Any) -> Tensor:
        if self.direct:
            output: Tensor = model(draw.x_t, draw.timestep, encoder_hidden_states=draw.prompt)
            return output
        return self.setting.predict(model, draw.x_t, draw.timestep, draw.prompt)

    def __call__(self, counter: Tensor) -> tuple[Tensor, list[Tensor]]:
        draw = self.batches(counter)
        with torch.no_grad():
            target = self.predict(self.setting.teacher, draw)
        loss = (self.predict(self.setting.student, draw).float() - target.float()).square().mean()
        return loss, [loss.detach()]


@pytest.mark.parametrize("direct", [False, True])
def test_banks_of_another_dtype(direct: bool) -> None:
    """float16 rows reach float32 models as float32, however these are called."""
    own = tiny.trainer(objective=Own(direct), latents=tiny.cache(dtype=torch.float16), prompts=tiny.bank(torch.float16))
    bound: Any = own.step.objective
    draw = bound.batches(own.step.counter)
    assert draw.x_t.dtype == draw.prompt.dtype == torch.float32
    loss = (
        own.student(draw.x_t, draw.timestep, draw.prompt) - own.teacher(draw.x_t, draw.timestep, draw.prompt)
    ).square()
    assert torch.equal(bound(own.step.counter)[0], loss.mean())
    assert own.fit().steps == 2


def test_models_of_two_dtypes() -> None:
    """The setting casts for each model; the error of a direct call recommends it."""
    teacher = tiny.Net().bfloat16()
    run = tiny.trainer(teacher, objective=Own(), latents=tiny.cache(dtype=torch.float16))
    draw = run.step.objective.batches(run.step.counter)  # type: ignore[attr-defined]
    assert draw.x_t.dtype == torch.float16  # as stored: each model gets its own cast
    assert run.fit().history[0]["loss"] > 0
    message = (
        r"objective: expected models called by Setting\.predict.*BFloat16 \(teacher bfloat16, student float32, lat"
    )
    with pytest.raises(InputError, match=message):
        tiny.trainer(teacher, objective=Own(direct=True)).fit()


def test_another_model_is_called_in_its_dtype() -> None:
    setting = tiny.trainer(objective=Own()).step.objective.setting  # type: ignore[attr-defined]
    x, t, rows = torch.randn(2, 4, 5, 3), torch.tensor([1, 2]), torch.randn(2, 5, 6)
    critic = tiny.Net(seed=3).double()
    assert torch.equal(setting.predict(critic, x, t, rows), critic(x.double(), t, rows.double()))


def pixart(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": layers}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "cross_attention_dim": 16, "caption_channels": 12}
    model: nn.Module = PixArtTransformer2DModel(**sizes, **heads, use_additional_conditions=False)
    return model


def prompts(width: int) -> PromptBank:
    return PromptBank(torch.randn(3, 5, width), ["a", "b"])


def test_a_bank_is_judged_by_the_model_not_by_names() -> None:
    """PixArt reads prompts with caption_channels and projects them to cross_attention_dim."""
    latents = type(tiny.cache())(torch.randn(4, 4, 4, 4), torch.arange(4) % 2)
    objective = tiny.features(("transformer_blocks.1", "transformer_blocks.0"))
    run = tiny.trainer(pixart(), pixart(1), objective, latents=latents, prompts=prompts(12))
    assert run.fit().history[0]["feature"] > 0
    for width in (16, 10):
        with pytest.raises(
            InputError, match=rf"prompts: expected rows of width 12 \(caption_channels of the t.*{width}$"
        ):
            tiny.trainer(pixart(), pixart(1), objective, latents=latents, prompts=prompts(width))


def refusal(teacher: Any = None, student: Any = None, **given: Any) -> str:
    with pytest.raises(InputError) as error:
        tiny.trainer(teacher, student, given.pop("objective", Denoising()), **given)
    return str(error.value)


class Wrong(tiny.Net):
    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output(super().forward(*args, **kwargs))


def test_a_model_that_does_not_fit_is_refused_before_the_first_step() -> None:
    told = refusal(student=tiny.Net(), prompts=prompts(7))
    assert told.startswith("student: expected a model that takes float32 latents (1, 4, 5, 3), a timestep and")
    assert "and encoder_hidden_states (1, 5, 7) (call= says how another one is called), got RuntimeError: " in told
    assert "mat1 and mat2 shapes cannot be multiplied" in told
    same = "student: expected a prediction of its latents' shape (1, 4, 5, 3), got "
    assert refusal(student=Wrong(lambda x: x[:, :3])) == f"{same}(1, 3, 5, 3)"
    assert refusal(student=Wrong(lambda x: x[..., :2])) == f"{same}(1, 4, 5, 2)"
    assert refusal(student=Wrong(lambda x: None)).startswith("model: expected a tensor, an object with .sample")
    assert tiny.trainer(student=Wrong(lambda x: torch.cat([x, x], 1)), objective=Denoising()).fit().steps == 2
    with pytest.raises(InputError, match=r"teacher: expected a prediction"):
        tiny.trainer(teacher=Wrong(lambda x: x[:, :3]))
    assert tiny.trainer(teacher=Wrong(lambda x: x[:, :3]), objective=Denoising()).fit().steps == 2  # never used


@pytest.mark.parametrize("dimensions", [0, 1, 2, 3])
@pytest.mark.parametrize("width", [6, 5])
def test_taps_of_every_layout(dimensions: int, width: int) -> None:
    """Vectors, signals, images and videos; narrow signals [B, C, L] could be tokens and are refused."""

    def run() -> Any:
        models = tiny.Net(6, dimensions), tiny.Net(width, dimensions, seed=1)
        return tiny.trainer(*models, latents=tiny.cache(dimensions))

    if dimensions == 1 and width == 5:
        with pytest.raises(InputError, match=r"student tap mid: expected the size of the teacher's mid \(1, 6, 5\), g"):
            run()
        return
    made = run()
    objective: Any = made.step.objective
    draw = objective._batches(made.step.counter)
    theirs, own = (net.features(draw.x_t, draw.timestep, draw.prompt).double() for net in (made.teacher, made.student))
    if width == 5:
        adapter = objective.trained[0][0]
        own = (own.movedim(1, -1) @ adapter.weight.double().T + adapter.bias.double()).movedim(-1, 1)
    expected = nn.functional.mse_loss(own, theirs)
    eps = torch.finfo(torch.float32).eps
    rounding = 2 * (own - theirs).abs().mean() * 8 * eps * theirs.abs().max()  # features are sums of 6 products
    found = objective(made.step.counter)[1][2]
    assert (found - expected).abs() <= rounding + eps * own.numel() ** 0.5 * expected


class Tokens(nn.Module):
    """Its middle layer returns ``length`` tokens with ``width`` channels."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.length, self.mid, self.last = length, nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        tokens = x.flatten(2).mT[:, : self.length]
        return x + self.last(self.mid(tokens)).mean(1)[..., None, None]


def test_tokens_agree_in_number_and_may_differ_in_width() -> None:
    assert tiny.trainer(Tokens(9, 6), Tokens(9, 5)).fit().history[0]["feature"] > 0
    teacher = Tokens(9, 6)
    for student in (Tokens(7, 6), Tokens(7, 5)):
        message = r"tap mid: expected the size of the teacher's mid \(1, 9, 6\), but for the channels .*got \(1, 7, "
        with pytest.raises(InputError, match=message):
            tiny.trainer(teacher, student)
    with pytest.raises(InputError, match="taps: expected modules of Tokens, got 'middle'"):
        tiny.trainer(teacher, student, tiny.features(("mid", "middle")))
    for modules in (teacher.modules(), student.modules()):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


class Strided(tiny.Net):
    """Its middle layer skips positions along the last axis."""

    def __init__(self, width: int, dimensions: int) -> None:
        super().__init__(width, dimensions)
        self.mid.stride = (*[1] * (dimensions - 1), 2)

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return x + self.features(x, timestep, encoder_hidden_states).mean()


def test_maps_of_other_sizes_are_refused() -> None:
    with pytest.raises(InputError, match=r"teacher's mid \(1, 6, 5, 3\), but for the channels .*got \(1, 5, 5, 2\)"):
        tiny.trainer(student=Strided(5, 2))
    with pytest.raises(InputError, match=r"teacher's mid \(1, 6, 5\), got \(1, 6, 3\)"):
        tiny.trainer(tiny.Net(6, 1), Strided(6, 1), latents=tiny.cache(1))  # not mistaken for tokens with 3 channels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (1, 1, 0)}, r"weights: input should be a dictionary or an instance of Weights, got \(1, 1, 0\)"),
        ({"weights": Weights(-1.0)}, r"weights\.output: input should be greater than or equal to 0, got -1"),
        ({"weights": Weights(task=float("nan"))}, r"weights\.task: input should be .* got nan"),
        ({"null_probability": 1.5}, r"null_probability: input should be less than or equal to 1, got 1\.5"),
        ({"feature_distance": "l2"}, r"feature_distance: input should be 'mse', 'normalized_mse'.*got 'l2'"),
        ({"taps": ("mid", "mid")}, r"2 problems\n  taps\.0: input should be a valid tuple, got 'mid'\n"),
        ({"probability": None}, r"probability: .*got None"),
        ({"parameters": [1.0]}, r"parameters: input should be a valid dictionary, got \[1\.0\]"),
    ],
)
def test_an_objective_with_wrong_fields(changes: dict[str, Any], message: str) -> None:
    objective = RandomConditioning(**({"weights": Weights(1.0, 0.0, 0.0)} | changes))
    for use in (objective.describe, lambda: tiny.trainer(objective=objective)):
        with pytest.raises(InputError, match=rf"objective: .*\n.*{message}" if "problems" not in message else message):
            use()
