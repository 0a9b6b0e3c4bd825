# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdistill.errors import FastdistillError, InputError
from fastdistill.evaluate import accuracy, attacked, calibration, logits_of, reliance, robustness, saliency_on
from fastdistill.evaluate.classification import margins
from fastdistill.evaluate.robustness import Remembered
from tests.harness import EPS

EPSILON = 0.05


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The toolbox writes its settings into the home directory when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", os.fspath(folder))
        yield folder


class Linear(nn.Module):
    """Logits W x + b for images [n, 2, 3, 3]; with ``pair`` it also returns a feature."""

    def __init__(self, classes: int = 3, pair: bool = False) -> None:
        super().__init__()
        self.linear, self.pair = nn.Linear(18, classes), pair
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(classes, 18, generator=random))
            self.linear.bias.copy_(torch.randn(classes, generator=random) / 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logits = self.linear(x.flatten(1))
        return (x.flatten(1), logits) if self.pair else logits


class Stepped(Linear):
    """The same after quantizing the images to 15 levels: without gradients, but as easy to fool."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return super().forward((7 * x).round() / 7)


def data(model: nn.Module, n: int = 24) -> tuple[Tensor, Tensor]:
    """Images away from the ends of the range, labelled by the model."""
    images = torch.rand(n, 2, 3, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    return images, logits_of(model, images).argmax(1)


def weights(model: Linear) -> Tensor:
    return model.linear.weight.detach().double()


def test_pgd_reaches_the_largest_loss_of_two_classes() -> None:
    """log(1 + exp(-(margin - epsilon |w_own - w_other|_1))), at a corner of the ball."""
    model = Linear(2)
    images, labels = data(model)
    found = attacked(model, images, labels, "pgd", epsilon=EPSILON, steps=20)
    gap = (weights(model)[0] - weights(model)[1]).abs().sum()
    margin = margins(logits_of(model, images).double(), labels)
    wanted = nn.functional.softplus(-(margin - EPSILON * gap))
    losses = nn.functional.cross_entropy(logits_of(model, found).double(), labels, reduction="none")
    magnitude = float(weights(model).abs().sum())  # of the terms of a logit of images up to 1
    torch.testing.assert_close(losses, wanted, rtol=0, atol=4 * EPS * magnitude)
    assert float((found - images).abs().max()) <= EPSILON + EPS


def test_apgd_leaves_right_what_no_attack_can_change() -> None:
    """For a linear model, an image is safe if its margin to each class is above epsilon |w_own - w_other|_1."""
    model = Linear(3, pair=True)
    images, labels = data(model, 64)
    logits, w = logits_of(model, images).double(), weights(model)
    slack = torch.stack([logits.gather(1, labels[:, None])[:, 0] - logits[:, j]
                         - EPSILON * (w[labels] - w[j]).abs().sum(1) for j in range(3)], 1)  # fmt: skip
    slack = slack.scatter(1, labels[:, None], math.inf).amin(1)
    clear = slack.abs() > 1e-3
    images, labels, safe = images[clear], labels[clear], slack[clear] > 0
    assert 0 < safe.sum() < len(safe)
    found = robustness(model, images, labels, epsilon=[EPSILON], attacks=["apgd", "square"], queried=None, queries=50)
    assert found["clean"] == 1 and found["apgd"] == [float(safe.double().mean())]
    assert found["square"][0] >= found["apgd"][0] and found["square_n"] == len(images)
    assert found["masking"]["passed"] and found["masking"]["beyond"] == 0
    loss = found["masking"]["loss"]
    assert loss == sorted(loss)


def test_a_model_that_masks_its_gradients_is_marked() -> None:
    model, open_one = Stepped(3), Linear(3)
    images, labels = data(model)
    found = robustness(model, images, labels, epsilon=[0.1, 0.3], queries=100, queried=None, transfer_from=open_one)
    masking = found["masking"]
    assert not masking["passed"] and min(masking["square"]) < -0.01 and min(masking["transfer"]) < -0.01
    text = " | ".join(masking["failed"])
    assert re.search(r"Square beat apgd by \d", text) and re.search(r"made for another model beat apgd by \d", text)


def test_results_repeat_and_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), Linear(3)).train()
    images, labels = data(model)
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr] # noqa: NPY002
    given = {"epsilon": [EPSILON], "queries": 20, "queried": 5, "steps": 5}
    seen: list[tuple[int, int]] = []
    first = robustness(model, images, labels, seed=7, progress=lambda done, of: seen.append((done, of)), **given)
    assert first == robustness(model, images, labels, seed=7, **given)
    assert seen == [(done, 7) for done in range(8)] and first["square_n"] == 5
    starts = [attacked(model, images, labels, "pgd", epsilon=1e-3, steps=1, seed=seed) for seed in (7, 8)]
    assert not torch.equal(*starts)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index] # noqa: NPY002
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_small_and_odd_images_can_be_attacked_by_squares() -> None:
    """The toolbox's Square fails if a square is as large as the image, and never changes the last row and column."""

    class Corner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, 0, -1, -1], -x[:, 0, -1, -1]], 1)

    images = torch.full((2, 1, 3, 2), 0.01)
    found = attacked(Corner(), images, torch.zeros(2, dtype=torch.int64), "square", epsilon=0.1, steps=20)
    assert (found[:, 0, -1, -1] < 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": [0.0]}, "epsilon: expected numbers above 0, ascending, got [0.0]"),
        ({"epsilon": [-0.1]}, "epsilon: expected numbers above 0, ascending, got [-0.1]"),
        ({"epsilon": [0.2, 0.1]}, "epsilon: expected numbers above 0, ascending, got [0.2, 0.1]"),
        ({"epsilon": []}, "epsilon: expected numbers above 0, ascending, got []"),
        ({"epsilon": 0.1}, "epsilon: expected numbers above 0, ascending, got 0.1"),
        ({"epsilon": [math.nan]}, "epsilon: expected numbers above 0"),
        ({"attacks": ["fgsm"]}, "attacks: expected some of pgd, apgd, square, got ['fgsm']"),
        ({"attacks": "pgd"}, "attacks: expected some of pgd, apgd, square, got 'pgd'"),
        ({"steps": 0}, "steps: expected a whole number from 1, got 0"),
        ({"queries": 1.5}, "queries: expected a whole number from 1, got 1.5"),
        ({"queried": 0}, "queried: expected a whole number from 1, or None, got 0"),
        ({"bounds": (0.0, 1.0)}, "images: expected values from 0 to 1, got -0."),
        ({"bounds": (1.0, 0.0)}, "bounds: expected (lowest, highest)"),
        ({"images": torch.zeros(4, 18)}, "images: expected floating point [n, C, H, W], got torch.float32 (4, 18)"),
        ({"images": torch.full((24, 2, 3, 3), math.nan)}, "images: expected finite values"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels: expected [24], one of each image, got (3,)"),
        ({"labels": torch.full((24,), 3)}, "labels[0]: expected a row of the logits, 0 to 2, got 3"),
        ({"model": nn.Flatten(2)}, "model: expected logits [24, K] of two classes or more"),
        ({"model": len}, "model: expected a module that gives logits"),
        ({"transfer_from": Linear(4)}, "transfer_from: expected a classifier of 3 classes, got 4"),
    ],
)
def test_bad_arguments(changes: dict[str, object], message: str) -> None:
    model = Linear(3)
    images, labels = data(model)
    given = {"model": model, "images": images, "labels": labels, "epsilon": [0.1], **changes}
    with pytest.raises(InputError, match="^" + re.escape(message)):
        robustness(**given)  # type: ignore[arg-type]


def test_the_loss_of_three_logits_needs_three_classes() -> None:
    model = Linear(2)
    with pytest.raises(InputError, match=r"^attack: expected apgd_ce, for a model of two classes, got apgd_dlr"):
        attacked(model, *data(model), "apgd_dlr", epsilon=0.1, steps=1)
    assert robustness(model, *data(model), epsilon=[1e-6], attacks=["apgd"], steps=1)["apgd"] == [1.0]


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "art.attacks.evasion", None)
    model = Linear(3)
    with pytest.raises(FastdistillError, match=r"^art: .*pip install 'fastdistill\[robustness\]'"):
        robustness(model, *data(model), epsilon=[0.1])


def test_calibration_of_known_logits() -> None:
    """Ten images, each with 80 % for its first class; seven of them are right."""
    logits = torch.tensor([[math.log(4), 0.0]]).expand(10, 2)
    labels = torch.tensor([0] * 7 + [1] * 3)
    ece, nll = calibration(logits, labels)
    assert ece == pytest.approx(0.1, abs=4 * EPS)
    assert nll == pytest.approx(-0.7 * math.log(0.8) - 0.3 * math.log(0.2), abs=4 * EPS)


def test_calibration_has_fifteen_bins_of_equal_width() -> None:
    """Errors of different bins add up; errors within a bin cancel."""
    confidence = torch.tensor([0.61, 0.65, 0.95, 0.95], dtype=torch.float64)
    logits = torch.stack([confidence.log(), (1 - confidence).log()], 1)
    ece, _ = calibration(logits, torch.tensor([0, 1, 0, 0]))
    assert ece == pytest.approx((abs(1 - 0.61 - 0.65) + 2 * 0.05) / 4, abs=1e-12)


def test_reliance_is_the_drop_by_other_backgrounds() -> None:
    model = Linear(3)
    images, labels = data(model, 40)
    other = images.flip(0)
    assert reliance(model, images, other, labels) == accuracy(model, images, labels) - accuracy(model, other, labels)
    assert reliance(model, images, images, labels) == 0
    with pytest.raises(InputError, match=r"^other: expected the shape of the other images"):
        reliance(model, images, other[:2], labels)


def test_saliency_is_where_the_weights_are() -> None:
    model = Linear(3)
    images, labels = data(model, 8)
    with torch.no_grad():
        model.linear.weight.view(3, 2, 3, 3)[:, :, 1:] = 0
    labels = torch.zeros_like(labels)
    top = torch.zeros(8, 3, 3)
    top[:, 0] = 1
    assert saliency_on(model, images, labels, top) == pytest.approx(1, abs=4 * EPS)
    assert saliency_on(model, images, labels, 1 - top) == 0
    with torch.no_grad():
        model.linear.weight.zero_()
    assert saliency_on(model, images, labels, top) == pytest.approx(1 / 3, abs=4 * EPS)
    with pytest.raises(InputError, match=r"^mask: expected values from 0 to 1"):
        saliency_on(model, images, labels, 2 * top)


def test_an_image_is_evaluated_once() -> None:
    model, asked = Linear(3), []
    model.register_forward_pre_hook(lambda _m, args: asked.append(len(args[0])))
    images, seen = data(model, 12)[0], Remembered(model)
    asked.clear()
    for part in (images[:8], images[4:], images[:8].flip(0), images[:4]):
        torch.testing.assert_close(seen(part), model(part), rtol=0, atol=64 * EPS)
    assert asked == [8, 8, 4, 8, 8, 4]
