# SPDX-License-Identifier: Apache-2.0
"""The choice of a CLARID setting, on a class with a known distribution and on a small model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.distill.canonical import Clarid, canonical
from fastdistill.distill.controls import others, random_directions
from fastdistill.distill.selection import Measures, chosen, sweep
from fastdistill.errors import InputError
from fastdistill.evaluate.jackknife import numbers
from tests import tiny
from tests.distill.test_canonical import AXES, PROMPTS, SCHEDULE, VARIANCES, Gaussian
from tests.harness import EPS64

FIELDS = (
    *("t_e", "sigma", "k", "tap", "nmi_raw", "nmi", "nmi_noise", "nmi_noise_projected", "nmi_shuffled_prompt"),
    *("nmi_null", "judge_right", "irrelevant_removed", "relevant_removed", "energy", "selectivity"),
    *("selectivity_random", "products", "seconds_per_image", "details"),
)
LABELS = torch.arange(24) % 4
#: The axis of the largest variance is irrelevant, an axis with less variance is relevant; all classes are equal.
MEASURES = Measures(lambda x: (x @ AXES)[:, :1], lambda x: (x @ AXES)[:, 2:3], lambda x: LABELS.clone())


def images(seed: int = 4) -> Tensor:
    drawn = torch.randn(24, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn * VARIANCES.sqrt() @ AXES.T


def swept(settings: list[Clarid], **changes: Any) -> list[dict[str, Any]]:
    given: dict[str, Any] = {"model": Gaussian().eval(), "images": images(), "labels": LABELS, "prompts": PROMPTS[:4]}
    options = {"schedule": SCHEDULE, "null_prompt": PROMPTS[:1], "measures": MEASURES, "starts": 2}
    return sweep(settings=settings, **(given | options | changes))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    settings = [Clarid(60, k, tap, 2) for tap in ("x0", "output") for k in (0, 1, 2, 3)]
    settings += [Clarid(40, 1, "x0", 2)]
    return swept(settings)


def test_a_gaussian_class(rows: list[dict[str, Any]]) -> None:
    """With the x_0 prediction, the axis of the largest variance is removed first, and completely."""
    known = {(row["t_e"], row["k"], row["tap"]): row for row in rows}
    assert len(known) == 9 and all(tuple(row) == FIELDS for row in rows)
    json.dumps(rows, allow_nan=False)
    for t, k, gone, kept in ((60, 0, 0, 0), (60, 1, 1, 0), (60, 2, 1, 0), (60, 3, 1, 1), (40, 1, 1, 0)):
        row = known[t, k, "x0"]
        assert row["irrelevant_removed"] == pytest.approx(gone, abs=1e-9)
        assert row["relevant_removed"] == pytest.approx(kept, abs=1e-9)
        assert row["selectivity"] == pytest.approx(gone - kept, abs=1e-9)
        assert row["judge_right"] == 1 and row["details"]["other_prompt"] == {"latent": 1, "prompt": 0}
        assert row["details"]["intervals"]["selectivity"] == pytest.approx([gone - kept] * 2, abs=1e-9)
        assert row["products"] == (6 if k else 0) and (row["details"]["nested"] or 0) <= 1e-9
        assert k or row["nmi"] == row["nmi_raw"]
    assert known[60, 1, "output"]["selectivity"] == pytest.approx(0, abs=1e-9)
    assert known[40, 1, "x0"]["sigma"] == pytest.approx(float(SCHEDULE.noise[40] / SCHEDULE.signal[40]))


def test_the_choice(rows: list[dict[str, Any]]) -> None:
    def given(row: dict[str, Any], selectivity: float, removed: float, interval: float) -> dict[str, Any]:
        intervals = {"selectivity": [selectivity - interval, selectivity + interval]}
        changed = {"selectivity": selectivity, "irrelevant_removed": removed}
        return row | changed | {"details": row["details"] | {"intervals": intervals}}

    found = chosen(rows)
    assert found["tap"] == "x0" and found["k"] in (1, 2) and found["selectivity"] == pytest.approx(1)
    assert found["reason"].startswith("100% of the irrelevant variance is removed with 0% of the relevant, selectivity")
    few, many, worse = (next(row for row in rows if row["k"] == k and row["tap"] == "x0") for k in (1, 2, 3))
    three = [given(few, 0.8, 0.7, 0.1), given(many, 0.75, 0.85, 0.1), given(worse, 0.55, 0.95, 0.1)]
    assert chosen(three)["k"] == 2
    assert "of the 2 whose intervals overlap that one" in chosen(three)["reason"]
    found = chosen([given(row, float(row is few), 0.5, 0.0) for row in rows])
    beside = {(row["t_e"], row["k"], row["tap"]) for row in found["neighbours"]}
    assert beside == {(40, 1, "x0"), (60, 1, "output"), (60, 2, "x0")}
    wrong = [row | {"judge_right": 0.9 if row["tap"] == "x0" else 1.0} for row in rows]
    assert chosen(wrong)["tap"] == "output" and chosen(wrong, least_right=0.8)["tap"] == "x0"
    for given, message in (
        ([row | {"judge_right": 0.5} for row in rows], "rows: expected one whose samples are judged right on 95%"),
        ([row for row in rows if not row["k"]], "rows: expected some with directions and measures"),
    ):
        with pytest.raises(InputError, match=message):
            chosen(given)


def test_random_directions_of_equal_energy() -> None:
    """They remove the given energy up to rounding, and are otherwise uniform: if both measures vary equally, the mean
    of their selectivity is 0."""
    x, energy = images(), torch.linspace(0, 1, 24, dtype=torch.float64)
    V = random_directions(x, energy, 3)
    assert (V.mT @ V - 1).abs().max() <= 8 * EPS64
    along = (V[:, :, 0] * x).sum(1)
    assert (along.square() / x.square().sum(1) - energy).abs().max() <= 16 * EPS64
    assert torch.equal(random_directions(x[:5], energy[:5], 3), V[:5]) and not torch.equal(
        random_directions(x, energy, 4), V
    )
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    V = random_directions(x, torch.full((4000,), 0.4, dtype=torch.float64), 0)
    left = x - V[:, :, 0] * (V[:, :, 0] * x).sum(1, keepdim=True)
    removed = 1 - left.square().mean(0)
    error = 4 * (2 / 4000) ** 0.5  # four standard errors of a variance
    assert (removed - 0.4).abs().max() <= error


def test_random_directions_are_not_selective() -> None:
    """If all of the latent varies equally: over several draws the mean selectivity is 0, and both removed shares are
    about the energy."""
    model = Gaussian().eval()
    model.variances.data = torch.ones(6, dtype=torch.float64)
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = [
        swept([Clarid(60, 2, "x0", 1)], model=model, images=x, seed=seed, starts=1, null_prompt=None)[0]
        for seed in range(5)
    ]
    each = torch.tensor([row["selectivity_random"] for row in found])
    assert abs(float(each.mean())) <= 4 * float(each.std()) / 5**0.5
    gone = torch.tensor([row["details"]["random"]["irrelevant_removed"] for row in found])
    assert abs(float(gone.mean()) - found[0]["energy"]) <= 4 * float(gone.std()) / 5**0.5


def test_the_leak_of_the_prompt() -> None:
    """A model whose feature is the prompt plus very little of x: clusters find the classes in noise; in images under
    another prompt they find the classes of that prompt, and under the null prompt nothing."""
    model = tiny.Net(width=6).double().eval()
    with torch.no_grad():
        model.first.weight *= 1e-3
    random = torch.Generator().manual_seed(1)
    x = torch.randn(24, 4, 3, 2, generator=random, dtype=torch.float64)
    prompts = torch.randn(4, 5, 6, generator=random, dtype=torch.float64)
    settings = [Clarid(30, k, "mid", 2) for k in (0, 2)]
    options = {"schedule": tiny.SCHEDULE, "null_prompt": prompts.mean(0), "prediction_type": "epsilon"}
    for row in sweep(model, x, LABELS, prompts, settings, **options):  # type: ignore[arg-type]
        details = row["details"]
        for name in ("nmi_raw", "nmi", "nmi_noise", "nmi_noise_projected"):
            assert row[name] == details["pooled"][name] == pytest.approx(1)
            assert details["intervals"][name] == pytest.approx([1, 1])
        assert details["nmi_shuffled_by_prompt"] == pytest.approx(1)
        assert row["nmi_shuffled_prompt"] < 0.5 and row["nmi_null"] < 0.5 and details["nmi_chance"] < 0.4
        assert row["selectivity"] is None and row["judge_right"] is None
    assert (others(LABELS) != LABELS).all()
    for label in range(4):
        count = torch.bincount(others(LABELS)[label == LABELS], minlength=4)
        assert count.tolist() == [0 if c == label else 2 for c in range(4)]


def test_directions_of_fewer_are_the_first_of_more() -> None:
    """A search at the largest k, by any method, contains the directions of every smaller k."""
    model = tiny.Net(width=6).double().eval()
    x = torch.randn(9, 4, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prompts = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for search in ("dense", "krylov"):
        settings = [Clarid(30, k, tap, 2, search=search, tolerance=1e-4) for k in (4, 2) for tap in ("mid", "last")]
        rows = sweep(model, x, torch.arange(9) % 3, prompts, settings, schedule=tiny.SCHEDULE, starts=1)
        for row, setting in zip(rows, settings, strict=True):
            assert row["details"]["nested"] <= 1e-3 and row["details"]["settled"] == 1
            labels = torch.arange(9) % 3
            alone = canonical(model, x, prompts[labels], setting, schedule=tiny.SCHEDULE)
            assert row["energy"] == pytest.approx(float(alone.energy.mean()), abs=1e-6)
            assert row["nmi_null"] is None


def test_an_interrupted_sweep(rows: list[dict[str, Any]]) -> None:
    """Known rows are kept and the others do not change; the progress ends at the announced total."""
    settings = [Clarid(60, k, tap, 2) for tap in ("x0", "output") for k in (0, 1, 2, 3)]
    settings += [Clarid(40, 1, "x0", 2)]
    seen: list[tuple[int, int]] = []
    new: list[dict[str, Any]] = []
    kept = rows[:7]
    again = swept(settings, known=kept, on_row=new.append, progress=lambda *at: seen.append(at))
    assert len(new) == 2 and again[:7] == kept
    for row, before in zip(again, rows, strict=True):
        same = {name for name in FIELDS if name != "seconds_per_image" and row[name] == before[name]}
        assert same >= {"t_e", "k", "tap", "products", "nmi_raw"}
        for name in ("irrelevant_removed", "relevant_removed", "energy", "selectivity_random"):
            assert row[name] == pytest.approx(before[name], abs=1e-12)
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def test_a_classifier_in_place_of_measures() -> None:
    """The variance of its feature is removed; it agrees on sample and image with respect to the axis that is kept."""

    def classifier(x: Tensor) -> tuple[Tensor, Tensor]:
        z = x @ AXES
        return z[:, :2], torch.stack([z[:, 2], -z[:, 2]], 1)

    for k, gone, lost in ((1, 4 / 6.5, 0), (3, 1, 1)):
        row = swept([Clarid(60, k, "x0", 4)], measures=Measures.of_classifier(classifier))[0]
        assert row["irrelevant_removed"] == pytest.approx(gone, abs=0.1 if k == 1 else 1e-9)
        assert row["relevant_removed"] == pytest.approx(lost / 2, abs=0.2 if lost else 1e-9)
        assert row["selectivity"] == pytest.approx(row["irrelevant_removed"] - row["relevant_removed"])


def test_wrong_arguments() -> None:
    right = [Clarid(60, 1, "x0", 2)]
    three = torch.arange(24) % 4
    for settings, changes, message in (
        ([], {}, "settings: expected at least one Clarid"),
        (right * 2, {}, r"settings: expected each \(t_e, k, tap\) once, got \(60, 1, 'x0'\) 2 times"),
        ([Clarid(60, 7, "x0", 2)], {}, "k: expected at most 6 at x0, got 7"),
        ([Clarid(100, 1, "x0", 2)], {}, "t_e: expected a timestep of the schedule"),
        ([Clarid(60, 1, "axis", 2)], {}, r"'axis' \(no near match\)"),
        ([Clarid(60, 1, "x0", 2, guidance="1")], {"null_prompt": None}, "null_prompt: expected a row"),
        (right, {"measures": Measures(lambda x: x / 0, lambda x: x)}, "measures.irrelevant: expected finite values"),
        (right, {"measures": lambda x: x}, "measures: expected Measures or None"),
        (right, {"schedule": None}, "schedule: expected a NoiseSchedule"),
        (right, {"batch": 0}, "batch: expected at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            swept(settings, **changes)
    for labels, message in (
        (torch.zeros(24, dtype=torch.int64), "labels: expected at least two classes, got 1"),
        (torch.cat([three[:22], torch.tensor([9, 9])]), "labels: expected at least three images of each class, got 2"),
        (LABELS[:5], r"labels: expected classes \[24\]"),
        (LABELS + 1, r"labels\[3\]: expected a row of prompts, 0 to 3, got 4"),
    ):
        with pytest.raises(InputError, match=message):
            sweep(Gaussian().eval(), images(), labels, PROMPTS[:4], right, schedule=SCHEDULE)
    with pytest.raises(InputError, match="relevant: expected what canonical samples should keep"):
        Measures(lambda x: x)
    assert numbers(torch.tensor([3, 1, 3, 3])).tolist() == [0, 0, 1, 2]
