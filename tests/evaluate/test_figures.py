# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError
from fastdistill.evaluate import loss_curves, png, probability_curve, sample_grid, schedule_curve
from fastdistill.evaluate.figures import BLUE, PAGE, RED, THEME

PROMPTS = ["a red seven", "a blue two"]
GRID = Grid.karras(NoiseSchedule.scaled_linear(), 12, 14.0, 0.1)
SAMPLES = {"teacher": torch.zeros(2, 3, 4, 4), "paired": np.full((2, 4, 4), 2.0)}


def pixels(figure: Any, **options: Any) -> np.ndarray:
    return (imread(io.BytesIO(png(figure, dpi=80, **options)))[..., :3] * 255).round().astype(int)


def share(image: np.ndarray, color: str) -> float:
    """The fraction of pixels near this color."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return float((abs(image - wanted).max(-1) <= 3).mean())


def test_wrong_samples_are_marked() -> None:
    right = {"teacher": [True, True], "paired": [True, True]}
    wrong = {"teacher": [True, True], "paired": [False, True]}
    plain, marked = (sample_grid(SAMPLES, PROMPTS, correct=verdict, seen=[True, False]) for verdict in (right, wrong))
    assert share(pixels(plain, transparent=False), RED) == 0
    assert share(pixels(marked, transparent=False), RED) > 0.001
    assert "Paired wrong: a red seven." in marked.get_label()
    assert "Paired wrong: none." in plain.get_label()


def test_images_are_clipped_and_put_where_they_belong() -> None:
    figure = sample_grid(SAMPLES, PROMPTS)
    shown = [image.get_array() for image in figure.axes[0].get_images()]
    assert [tuple(array.shape) for array in shown] == [(4, 4, 3)] * 4
    assert [float(array.max()) for array in shown] == [0, 0, 1, 1]


@pytest.mark.parametrize(("shape", "sides"), [((4, 6), (2, 3)), ((6, 4), (3, 2)), ((1, 9), (1, 1))])
def test_images_keep_their_proportions(shape: tuple[int, int], sides: tuple[int, int]) -> None:
    """Centered in a square; signals with few rows fill it."""
    plain, found = (
        sample_grid({"teacher": torch.zeros(1, 3, *size)}, ["a"]).axes[0].get_images()[0].get_extent()
        for size in ((4, 4), shape)
    )
    left, right, bottom, top = found
    assert (bottom - top) / (right - left) == pytest.approx(sides[0] / sides[1])
    assert max(right - left, bottom - top) == pytest.approx(plain[1] - plain[0])
    assert (left + right, bottom + top) == pytest.approx((plain[0] + plain[1], plain[2] + plain[3]))


def test_dark_exchanges_the_colors_and_puts_them_back() -> None:
    figure = probability_curve(np.linspace(0, 1, 50))
    light = pixels(figure, transparent=False)
    dark = pixels(figure, transparent=False, dark=True)
    assert share(light, PAGE) > 0.5 and share(light, THEME[PAGE]) == 0
    assert share(dark, THEME[PAGE]) > 0.3 and share(dark, PAGE) == 0
    assert share(light, BLUE) > 0 and share(dark, THEME[BLUE]) > 0 and share(dark, BLUE) == 0
    assert np.array_equal(pixels(figure, transparent=False), light)


def test_loss_curves() -> None:
    steps = np.arange(100)
    figure = loss_curves(
        {"random_conditioning": (steps, [np.full(100, 0.5), np.full(100, 0.3)]), "paired": (steps, steps + 1.0)}
    )
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert len(axes.lines) == 5  # two seeds and their mean, one run and its mean
    np.testing.assert_allclose(axes.lines[2].get_ydata(), 0.4)
    smooth = np.asarray(axes.lines[4].get_ydata())
    assert (np.diff(smooth) > 0).all() and smooth[50] == pytest.approx(51, rel=0.01)
    assert {text.get_text() for text in axes.texts} == {"Random conditioning", "Paired"}


def test_labels_of_lines_that_end_together_do_not_overlap() -> None:
    steps = [0, 1, 2]
    figure = loss_curves({name: (steps, [1.0, 0.5, 0.1]) for name in ("random_conditioning", "paired", "teacher")})
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))


def test_schedules_of_guidance_over_the_steps_of_a_grid() -> None:
    schedules = ["8@10,-1@2,0", 2, Guidance.linear(-1, 0.1), *range(3, 9)]
    figure = schedule_curve(schedules, GRID)
    _, *lines = figure.axes[0].lines  # the first is w = 0
    assert len(lines) == len(schedules)
    for line, schedule in zip(lines, schedules, strict=True):
        w = Guidance.parse(schedule).weights(GRID).tolist()
        assert list(line.get_ydata()) == [*w, w[-1]] and list(line.get_xdata()) == list(range(len(GRID) + 1))
    looks = {(str(line.get_color()), str(line.get_linestyle())) for line in lines}
    assert len(looks) == len(schedules)
    assert "8@10,-1@2,0: w = 8 while sigma > 10" in figure.get_label()
    flow = schedule_curve({"window": "2@1,0"}, Grid.flow(4), band=(1 / 3, 1.0))
    (band,) = flow.axes[0].patches
    assert isinstance(band, Rectangle) and (band.get_x(), band.get_width()) == pytest.approx((2, 1))
    assert [text.get_text() for text in flow.axes[0].texts] == ["Window"]
    assert flow.axes[0].get_xticklabels()[0].get_text() == "\u221e"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_grid({}, PROMPTS), "samples: expected at least one model"),
        (
            lambda: sample_grid({"teacher": torch.zeros(3, 3, 4, 4)}, PROMPTS),
            r"samples\['teacher'\]: expected images \[2",
        ),
        (lambda: sample_grid({"teacher": torch.full((2, 1, 4, 4), torch.nan)}, PROMPTS), "finite"),
        (
            lambda: sample_grid(SAMPLES, PROMPTS, correct={"paired": [True]}),
            r"correct\['paired'\]: expected 2 values for a model",
        ),
        (lambda: sample_grid(SAMPLES, PROMPTS, seen=[True]), "seen: expected 2 values"),
        (lambda: loss_curves({"paired": ([1, 2], [1.0])}), r"runs\['paired'\]"),
        (lambda: probability_curve([0.1, 1.2]), "probability: expected"),
        (lambda: schedule_curve([], GRID), "schedules: expected at least one schedule, got none"),
        (lambda: schedule_curve(["power:2^1"], GRID), "expected a schedule of one weight a level, got 'power:2\\^1'"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
