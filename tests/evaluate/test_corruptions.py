# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

from fastdistill.errors import InputError
from fastdistill.evaluate import corrupted, corruptions
from fastdistill.evaluate.corruptions import CORRUPTIONS, SEVERITIES, STRENGTHS, TOWARDS
from fastdistill.tasks.context.data import colors
from tests.harness import EPS


def pictures(n: int = 6, channels: int = 3) -> Tensor:
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_goes_further_with_the_severity_and_by_its_own_row(name: str) -> None:
    images = pictures()
    towards = images.flip(0) if name in TOWARDS else None
    made = [corrupted(images, name, severity, seed=3, towards=towards) for severity in SEVERITIES]
    far = [float((image - images).square().mean()) for image in made]
    assert far == sorted(far) and far[0] > 0 and all(image.abs().max() <= 1 for image in made)
    part = None if towards is None else towards[2:4]
    again = corrupted(images[2:4], name, 3, seed=3, towards=part, rows=torch.tensor([2, 3]))
    assert torch.equal(again, made[2][2:4])


def test_noise_has_its_deviation() -> None:
    images = torch.zeros(64, 3, 8, 8)
    noise = corrupted(images, "noise", 2)  # 0.08 of the range of 2, far from its ends
    n = noise.numel()
    assert abs(float(noise.double().std()) / 0.16 - 1) < 4 / math.sqrt(2 * n)
    assert not torch.equal(noise, corrupted(images, "noise", 2, seed=1))


def test_blur_keeps_what_is_flat_and_the_spread_of_a_point_is_its_square() -> None:
    flat = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(corrupted(flat, "blur", 5), flat, rtol=0, atol=4 * EPS)
    point = torch.zeros(1, 1, 65, 65)
    point[0, 0, 32, 32] = 1
    spread = corrupted(point, "blur", 1)[0, 0].double().sum(1)
    place = torch.arange(65) - 32.0
    sigma = STRENGTHS["blur"][0] * 65
    kernel = torch.exp(-0.5 * (torch.arange(-10, 11).double() / sigma) ** 2)  # 3 sigma, rounded up
    wanted = (kernel / kernel.sum() * torch.arange(-10, 11) ** 2).sum()
    assert float((spread * place**2).sum()) == pytest.approx(float(wanted), rel=1e-5)


def test_contrast_keeps_the_mean() -> None:
    images = pictures()
    made = corrupted(images, "contrast", 5)
    assert torch.allclose(made.mean((1, 2, 3)), images.mean((1, 2, 3)), rtol=0, atol=4 * EPS)
    assert torch.allclose(made.std((1, 2, 3)), 0.1 * images.std((1, 2, 3)), rtol=1e-4)


def test_an_occlusion_is_one_square_of_gray_at_any_place() -> None:
    images = torch.ones(400, 3, 8, 8)
    made = corrupted(images, "occlusion", 4)
    gray = (made == 0).all(1)
    assert ((made == 0) | (made == 1)).all() and (gray.sum((1, 2)) == 25).all()
    down, across = gray.any(2), gray.any(1)
    assert (down.sum(1) == 5).all() and (across.sum(1) == 5).all()
    places = set(zip(down.float().argmax(1).tolist(), across.float().argmax(1).tolist(), strict=True))
    assert places == {(i, j) for i in range(4) for j in range(4)}


def test_a_hue_turns_to_either_side_and_gray_stays() -> None:
    hue = torch.linspace(0, 0.9, 40)
    images = (0.5 * colors(hue) + 0.2)[:, :, None, None].expand(-1, -1, 8, 8)
    made = corrupted(images, "hue_shift", 2)
    sides = [(0.5 * colors(hue + side * 0.2) + 0.2)[:, :, None, None] for side in (1, -1)]
    off = torch.stack([(made - wanted).abs().amax((1, 2, 3)) for wanted in sides])
    assert (off.amin(0) < 16 * EPS).all() and 0 < int((off[0] < off[1]).sum()) < 40
    assert torch.allclose(made.mean(1), images.mean(1), rtol=0, atol=4 * EPS)


def test_the_way_to_another_background_ends_there() -> None:
    images = pictures()
    other = images.roll(1, 0)
    assert torch.allclose(corrupted(images, "background_swap", 5, towards=other), other, rtol=0, atol=EPS)
    half = corrupted(images, "clutter", 2, towards=other)
    assert torch.allclose(half, 0.6 * images + 0.4 * other, rtol=0, atol=4 * EPS)


def test_accuracies_of_five_severities() -> None:
    """A classifier of the mean: for bright images, contrast changes nothing, a swap to dark ones everything."""

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean((1, 2, 3))
            return torch.stack([mean, -mean], 1)

    images, labels = pictures().abs() + 0.1, torch.zeros(6, dtype=torch.int64)
    found = corruptions(Mean(), images, labels, towards={"background_swap": -images})
    assert list(found) == [name for name in CORRUPTIONS if name != "clutter"]
    assert found["contrast"] == [1.0] * 5 and found["background_swap"] == [1, 1, 0, 0, 0]
    gray = corruptions(Mean(), images[:, :1], labels)
    assert "hue_shift" not in gray and list(corruptions(Mean(), images, labels, names=["blur"])) == ["blur"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["fog"]}, "names: expected some of noise, blur, contrast"),
        (
            {"names": ["clutter"]},
            "towards: expected images for background_swap and clutter alone, got None for clutter",
        ),
        ({"towards": {"clutter": torch.zeros(6, 3, 4, 4)}}, "towards: expected the shape of the other images"),
        ({"images": 9 * torch.ones(6, 3, 8, 8)}, "images: expected values from -1 to 1, got 9 to 9"),
        ({"images": pictures(channels=1), "names": ["hue_shift"]}, "images: expected 3 channels, for hue_shift, got 1"),
    ],
)
def test_bad_arguments(changes: dict[str, object], message: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    given = {"model": model, "images": pictures(), "labels": torch.zeros(6, dtype=torch.int64), **changes}
    with pytest.raises(InputError, match="^" + re.escape(message)):
        corruptions(**given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^severity: expected a whole number from 1 to 5, got 0"):
        corrupted(pictures(), "blur", 0)
