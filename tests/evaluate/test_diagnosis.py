# SPDX-License-Identifier: Apache-2.0
"""Diagnosis of models with a known distribution."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.sampler import initial_noise
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError
from fastdistill.evaluate import class_separation, variance_ratio
from fastdistill.evaluate.diagnosis import diagnose
from fastdistill.evaluate.diversity import Interval
from fastdistill.evaluate.frontier import Diagnosis, Row, frontier
from fastdistill.evaluate.spread import Spread
from tests.harness import EPS64, generator

GRID = Grid.parse("karras:12@20..0.05", NoiseSchedule.cosine())
CENTERS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
LABELS = torch.arange(3).repeat_interleave(40)


def gaussians(guidance: Guidance, prompts: Tensor, noises: Tensor, seed: int) -> Tensor:
    """Guidance shifts this model by 1 + w / 4 and narrows it by exp(-w / 2); a window (its mean w) narrows half as
    much."""
    w = guidance.weights(GRID)
    strength = float(w.clamp(min=0).max())
    narrow = math.exp(-strength / 4) if (w == strength).all() else math.exp(-strength / 8)
    noise = initial_noise(seed, noises, (2,)).double()
    return (1 + strength / 4) * CENTERS[prompts] + 0.5 * narrow * noise


def real(count: int = 300) -> tuple[Tensor, Tensor]:
    labels = torch.arange(3).repeat(count)
    return CENTERS[labels] + 0.5 * torch.randn(3 * count, 2, generator=generator(0), dtype=torch.float64), labels


def right(samples: Tensor, prompts: Tensor) -> Tensor:
    return torch.cdist(samples, CENTERS).argmin(1) == prompts


def diagnosed(*schedules: str, **options: Any) -> Diagnosis:
    given = {"right": right, "seeds": (0, 1), "draws": 40} | options
    return diagnose(gaussians, lambda x: x, LABELS, real(), schedules, GRID, **given)


def test_figures_of_gaussians_against_their_closed_forms() -> None:
    found = diagnosed("0", "1", "2", "3", "2@5,-1@1,0")
    for row, w in zip(found.rows, (0, 1, 2, 3, 1), strict=True):
        moved = 2 if row.schedule.startswith("2@") else w
        assert row.images == 240 and row.seeds == 2
        ratio = row.variance_ratio
        assert ratio.low < math.exp(-w / 2) * 1.1 and ratio.high > math.exp(-w / 2) * 0.9 and ratio.low < ratio.high
        assert row.separation.low - 0.05 < 1 + moved / 4 < row.separation.high + 0.05
        assert row.right.low <= row.right.value <= row.right.high <= 1
        assert 0 < row.right_variance_ratio.value <= row.variance_ratio.value * 1.05
        assert 0 < row.recall.value <= 1 and 1 < row.vendi.value < 80
    vendi, recall = ([getattr(row, name).value for row in found.rows[:4]] for name in ("vendi", "recall"))
    assert vendi == sorted(vendi, reverse=True) and recall == sorted(recall, reverse=True)
    assert [row.evaluations_per_image for row in found.rows[:2]] == [12, 24]
    assert found.rows[4].evaluations_per_image == Guidance.parse("2@5,-1@1,0").evaluations(GRID) < 24
    # constants: variance e^(-w / 2) at 1 + w / 4, the window e^(-1 / 2) where they have e^-1
    expected = (math.exp(-0.5) - math.exp(-1)) / (1 - math.exp(-1))
    own = next(r for r in found.recovered if r.at == "separation")
    assert abs(own.value - expected) < 0.1
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["rows"][1]["variance_ratio_interval"][0] > 0
    alone = json.loads(json.dumps(diagnosed("0", right=None, seeds=(0,), draws=8).to_json(), allow_nan=False))
    assert alone["rows"][0]["right"] is None is alone["rows"][0]["right_interval"] and alone["recovered"] == []


def shift_without_error(x: Tensor, labels: Tensor, reference: Tensor, known: Tensor) -> float:
    """The mean shift of three classes with ten samples, minus the error of their means, computed independently."""
    means = torch.stack([reference[known == label].mean(0) for label in range(3)])
    found = 0.0
    for label in range(3):
        own = x[labels == label]
        moved = (own.mean(0) - means[label]).square().sum() - own.var(0).sum() / len(own)
        found += float((moved.clamp(min=0) / (means[label] - means.mean(0)).square().sum()).sqrt()) / 3
    return found


def resampled(labels: Tensor, draws: int) -> list[Tensor]:
    """The rows of each resample, for three classes with ten samples."""
    random = torch.Generator().manual_seed(0)
    classes = [(labels == label).nonzero()[:, 0] for label in range(3)]
    picked = [chosen[torch.randint(10, (draws, 10), generator=random)] for chosen in classes]
    return list(torch.cat(picked, 1))


def test_draws_of_a_spread_are_those_of_the_metrics() -> None:
    """For the samples themselves and for one resample; other samples with the same labels use the same rows."""
    x, labels = real(10)
    reference, known = real(50)
    judged = right(x, labels)
    spread = Spread(reference, known)
    value, drawn = spread(x, labels, judged, 3)
    arguments = x, labels, reference, known
    among = variance_ratio(x[judged], labels[judged], reference, known)
    own = (
        class_separation(*arguments),
        shift_without_error(*arguments),
        variance_ratio(*arguments),
        judged.double().mean(),
        among,
    )
    assert torch.allclose(value, torch.tensor(own, dtype=torch.float64), rtol=1e4 * EPS64, atol=0)
    again = resampled(labels, 3)[1]
    by_hand = class_separation(x[again], labels[again], reference, known)
    moved_by = float(drawn[:, 0].mean()) - own[0]  # resamples have the mean of the samples
    assert abs(moved_by) < 1e4 * EPS64 and abs(float(drawn[:, 2].mean()) - own[2]) < 1e4 * EPS64
    plain = sum(class_separation(x[rows], labels[rows], reference, known) for rows in resampled(labels, 3)) / 3
    assert abs(float(drawn[1, 0]) - (by_hand + own[0] - plain)) < 1e4 * EPS64
    moved = spread(2 * x, labels, None, 3)[1]
    scaled = 4 * drawn[:, 2]
    assert torch.allclose(moved[:, 2], scaled, rtol=1e4 * EPS64, atol=0) and moved[:, 3:].isnan().all()


def test_intervals_of_few_samples_hold_the_truth() -> None:
    """Two classes with 12 samples in 8 directions, whose means moved by 0.5. Each of 60 intervals should contain the
    variance ratio 1 and the shift 0.25 in 95 % of the cases; a bootstrap of 12 rows gives short intervals, so at least
    80 %."""
    random = torch.Generator().manual_seed(1)
    labels, known = torch.arange(2).repeat_interleave(12), torch.arange(2).repeat_interleave(4000)
    center = torch.zeros(2, 8, dtype=torch.float64)
    center[1, 0] = 4
    spread = Spread(torch.randn(8000, 8, generator=random, dtype=torch.float64) + center[known], known)
    held, shifts = torch.zeros(2), []
    for _ in range(60):
        x = torch.randn(24, 8, generator=random, dtype=torch.float64) + center[labels]
        x[:, 1] += 0.5
        value, drawn = spread(x, labels, None, 200)
        low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0)
        assert (low <= value)[:3].all() and (value <= high)[:3].all()
        held += torch.stack([low[place] <= truth <= high[place] for place, truth in ((2, 1.0), (1, 0.25))])
        shifts.append(float(value[1]))
    assert (held >= 0.8 * 60).all(), held
    # A plain norm of the difference would have a mean of sqrt(0.25 + 8 / 12) / 2 = 0.48.
    assert abs(sum(shifts) / 60 - 0.25) < 0.1


def row(schedule: str, separation: float, variance: float, share: float, draws: Tensor | None = None) -> Row:
    def known(value: float) -> Interval:
        return Interval(value, value, value)

    names = ("right_variance_ratio", "mean_shift", "precision", "recall", "density", "coverage", "vendi")
    others = dict.fromkeys(names, known(1.0))
    measured = {"separation": known(separation), "variance_ratio": known(variance), "right": known(share)}
    return Row(schedule, "g", 1, 1, 1, 1.0, **measured, **others, draws=draws)  # type: ignore[arg-type]


def test_the_frontier_of_a_curve() -> None:
    """V = 1 / separation on the line of the constants; accuracy saturates, and its first point counts."""
    constants = [row("0", 1.0, 1.0, 0.8), row("2", 2.0, 0.5, 1.0), row("1", 1.5, 0.75, 0.9), row("4", 4.0, 0.25, 1.0)]
    windows = [
        row("3@5,-1", 2.0, 0.75, 1.0), row("2@5,-1", 1.25, 0.875, 0.95),
        row("9@5,-1", 4.1, 1.0, 1.0), row("5@5,-1", 3.0, 0.3, 0.7),
    ]  # fmt: skip
    found = {(r.schedule, r.at): r.value for r in frontier([*windows, *constants])}
    assert found["3@5,-1", "separation"] == 0.5 and found["3@5,-1", "accuracy"] == 0.5
    assert found["2@5,-1", "separation"] == 0.0 and abs(found["2@5,-1", "accuracy"] - (0.875 - 0.625) / 0.375) < 1e-9
    assert math.isnan(found["9@5,-1", "separation"]) and math.isnan(found["5@5,-1", "accuracy"])
    assert abs(found["5@5,-1", "separation"] - (0.3 - 0.375) / 0.625) < 8 * EPS64
    assert all(math.isnan(end) for r in frontier([*windows, *constants]) for end in r.interval)
    with pytest.raises(InputError, match=r"rows: expected schedules among which are 0 and another constant, got 1, 2"):
        frontier(constants[1:3][::-1])


def test_intervals_of_what_is_recovered() -> None:
    """For known resamples: the variance of the window is uniform, everything else is fixed."""
    n = 400

    def draws(separation: float, variance: Tensor | float, share: float) -> Tensor:
        values = torch.ones(n, 5, dtype=torch.float64)
        values[:, 0], values[:, 2], values[:, 3] = separation, torch.as_tensor(variance), share
        return values

    line = [row("0", 1, 1, 0.5, draws(1, 1.0, 0.5)), row("1", 2, 0.5, 1, draws(2, 0.5, 1.0))]
    spread = torch.linspace(0.5, 1, n, dtype=torch.float64)
    at = row("2@5,-1", 2.0, 0.75, 1.0, draws(2, spread, 1.0))
    found = frontier([*line, at])[0]
    assert abs(found.interval[0] - 0.025) < 0.01 and abs(found.interval[1] - 0.975) < 0.01
    outside = at.draws.clone()  # type: ignore[union-attr]
    outside[:80, 0] = 3
    found = frontier([*line, row("2@5,-1", 2.0, 0.75, 1.0, outside)])[0]
    assert found.value == 0.5 and math.isnan(found.interval[0])


def test_a_diagnosis_goes_on_where_it_stopped(tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(guidance: Guidance, *given: Any) -> Tensor:
        calls.append(str(guidance))
        if len(calls) == 4:
            raise InterruptedError
        return gaussians(guidance, *given)

    def never(*_: Any) -> Tensor:
        raise AssertionError

    def run(sample: Callable[..., Tensor], **options: Any) -> Diagnosis:
        given: dict[str, Any] = {"keep": tmp_path, "made_from": "a", "draws": 8, "batch": 120, "seeds": (0, 1)}
        given |= {"grid": GRID, "reference": real(), "prompts": LABELS, "schedules": ("0", "1", "2")} | options
        return diagnose(sample, lambda x: x, **given)

    with pytest.raises(InterruptedError):
        run(counted)
    shown: list[int] = []
    resumed = run(counted, progress=lambda done, total: shown.append(done))
    assert calls == ["0", "0", "1", "1", "1", "2", "2"] and shown == sorted(shown) and shown[-1] == 720
    whole = run(gaussians, keep=None)
    for one, two in zip(resumed.rows, whole.rows, strict=True):
        assert one.separation == two.separation and one.vendi == two.vendi
    other = real()[0] + 1, real()[1]
    for changed in ({"grid": Grid.parse("karras:11@20..0.05", NoiseSchedule.cosine())}, {"reference": other}):
        with pytest.raises(AssertionError):  # the stored samples belong to another call
            run(never, **changed)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:20])
    run(counted, made_from="b")
    run(counted)  # with damaged files
    assert len(calls) == 7 + 6 + 6
    assert math.isnan(resumed.rows[0].right.value) and {r.at for r in resumed.recovered} <= {"separation"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"schedules": ("0", "2@90,-1")}, r"guidance: expected thresholds .* got 90 in '2@90,-1,?0?'"),
        ({"schedules": ()}, r"schedules: expected at least one, got none"),
        ({"schedules": ("1", 1.0)}, r"schedules: expected each once, got '1' twice"),
        ({"prompts": torch.tensor([0] + [1] * 12 + [2] * 12)}, r"classes: expected at least 2 .* got 1 of class 0"),
        ({"prompts": LABELS + 1}, r"classes: expected those of the reference, got \[1, 2, 3\] and \[0, 1, 2\]"),
        ({"prompts": LABELS[::20]}, r"prompts: expected more than 11: 5 neighbours in each half, got 6"),
        ({"prompts": LABELS.double()}, r"prompts: expected dtype int64, got float64"),
        ({"prompts": LABELS.tolist()}, r"prompts: expected a tensor, got list"),
        ({"reference": real()[0]}, r"reference: expected real samples and their classes, got Tensor"),
        ({"reference": (real()[0], real()[1][1:])}, r"reference: expected int64 \[900\], got torch.int64 \(899,\)"),
        ({"seeds": (1, 1)}, r"seeds: expected at least one, each once, got \[1, 1\]"),
        ({"batch": 0}, r"batch: expected at least 1, got 0"),
        ({"features": lambda x: x[:, 0]}, r"features: expected features \[256, D\] of a float dtype, got .*\(256,\)"),
    ],
)
def test_what_is_refused_before_anything_is_sampled(changed: dict[str, Any], message: str) -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError

    given: dict[str, Any] = {"features": lambda x: x, "prompts": LABELS, "schedules": ("0",), "reference": real()}
    given |= {"seeds": (0,), "batch": 8} | changed
    options = {name: given[name] for name in ("seeds", "batch")}
    with pytest.raises(InputError, match=f"^{message}"):
        diagnose(never, given["features"], given["prompts"], given["reference"], given["schedules"], GRID, **options)


def test_samples_that_do_not_fit() -> None:
    def wider(*given: Any) -> Tensor:
        return torch.cat([gaussians(*given)] * 2, 1)

    def run(sample: Any) -> None:
        diagnose(sample, lambda x: x, LABELS, real(), ("0",), GRID)

    with pytest.raises(InputError, match=r"features: expected 2 values, as of the reference, got 4"):
        run(wider)
    with pytest.raises(InputError, match=r"sample: expected finite samples, got NaN or infinity with 0"):
        run(lambda *given: gaussians(*given) * math.nan)
    with pytest.raises(InputError, match=r"sample: expected 64 samples, one per prompt, got 63"):
        run(lambda *given: gaussians(*given)[1:])
    with pytest.raises(InputError, match=r"right: expected bool \[64\], got "):
        diagnose(gaussians, lambda x: x, LABELS, real(), ("0",), GRID, right=lambda x, prompts: x[:, 0])
