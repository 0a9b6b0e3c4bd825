# SPDX-License-Identifier: Apache-2.0
"""Variances measured from data compared with explicit covariances; solved windows compared with the recursion."""

import json
import math
import re

import pytest
import torch

from fastdistill.data import values
from fastdistill.data.latent_cache import LatentCache, generate_latent_cache
from fastdistill.diffusion import spectrum as module
from fastdistill.diffusion.distortion import neutral_window, recursion
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.spectrum import Spectrum, variance_neutral
from fastdistill.errors import InputError, StorageError
from fastdistill.tasks.guidance.measure import measure
from fastdistill.tasks.guidance.worlds import Gaussian
from tests.diffusion.test_distortion import MU, C, U, grid_of, karras
from tests.harness import EPS64

SWITCH = 3**0.5


def data(dtype=torch.float64, counts=(5, 9, 30)):
    """Classes of several sizes around a common offset; images [2, 3] whose variance decreases over directions."""
    random = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.tensor([7, 2, 40]), torch.tensor(counts))
    scale = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.1]) * (1 + labels[:, None] / 40)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=random))
    x = (torch.randn(len(labels), 6, generator=random) * scale) @ turn + labels[:, None] / 10 + 5
    order = torch.randperm(len(labels), generator=random)
    return x[order].reshape(-1, 2, 3).to(dtype), labels[order]


def written_out(images, labels, rank):
    """c [K, rank], u [rank], and the traces, from covariances."""
    x = images.double().flatten(1)
    known = labels.unique()
    means = torch.stack([x[labels == k].mean(0) for k in known])
    own = x - means[torch.searchsorted(known, labels)]
    v = torch.linalg.eigh(own.T @ own).eigenvectors.flip(1)[:, :rank]
    inside = [torch.cov(x[labels == k].T) for k in known]
    around = torch.cov(x.T)
    along = [(v.T @ m @ v).diagonal() for m in (*inside, around)]
    return torch.stack(along[:-1]), along[-1], torch.stack([m.trace() for m in inside]), around.trace()


@pytest.mark.parametrize("rank", [1, 2, 5, 6, 50])
def test_variances_by_direction(rank):
    images, labels = data()
    found = Spectrum.estimate(images, labels, rank)
    kept = min(rank, 6)
    c, u, inside, around = written_out(images, labels, kept)
    assert found.labels.tolist() == [2, 7, 40]
    assert found.multiplicity.tolist() == [1.0] * kept + [6.0 - kept] * (kept < 6)
    size = float(around)
    assert (found.c[:, :kept] - c).abs().max() < 64 * EPS64 * size and (
        found.u[:kept] - u
    ).abs().max() < 64 * EPS64 * size
    assert ((found.c * found.multiplicity).sum(1) - inside).abs().max() < 64 * EPS64 * size  # nothing is lost
    assert abs(float((found.u * found.multiplicity).sum() - around)) < 64 * EPS64 * size


def test_directions_of_many_dimensions_settle():
    """Seven strong directions among 400 are found up to the noise of the others, whose variance is the remainder."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(300, 400, generator=random)
    x[:, :7] *= torch.linspace(9, 6, 7)
    labels = torch.arange(300) % 3
    x[labels == 1, 100:] += 2
    found = Spectrum.estimate(x, labels, 7)
    c, u, _, _ = written_out(x, labels, 7)
    assert (found.c.sum(1) / found.c[:, :7].sum(1)).shape == (3,)
    assert found.c[:, :7].sum() == pytest.approx(float(c.sum()), rel=1e-3)
    assert found.u[:7].sum() == pytest.approx(float(u.sum()), rel=1e-3)
    assert found.multiplicity[-1] == 393 and found.u[-1] > 1.3 * found.c[:, -1].mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_data_are_read_in_blocks(tmp_path, monkeypatch, dtype):
    images, labels = data(dtype)
    whole = Spectrum.estimate(images, labels, 3)
    monkeypatch.setattr(values, "BLOCK", 7 * 6 * images.element_size())
    read = []
    parts = Spectrum.estimate(images, labels, 3, progress=lambda done, total: read.append((done, total)))
    size = float(whole.u.max())
    assert (whole.c - parts.c).abs().max() < 64 * EPS64 * size and (whole.u - parts.u).abs().max() < 64 * EPS64 * size
    assert read[0] == (7, 44) and read[-1][0] == read[-1][1] and len(read) % 7 == 0


def cache(path, seed=0):
    images, labels = data(torch.float32)
    generate_latent_cache(path, lambda rows, _: images[rows] + seed, labels, (2, 3), torch.float32, {"seed": seed})
    return images, labels


def test_a_cache_has_its_spectrum_beside_it(tmp_path, monkeypatch):
    images, labels = cache(tmp_path / "cache")
    found = Spectrum.beside(tmp_path / "cache", 3)
    wanted = Spectrum.estimate(images, labels, 3)
    assert found.c.equal(wanted.c) and found.u.equal(wanted.u)
    loaded = Spectrum.load(tmp_path / "cache.spectrum.json", expect={"rank": 3})
    for name in ("c", "u", "multiplicity", "labels"):
        assert getattr(loaded, name).equal(getattr(found, name))
    assert loaded.fingerprint == {"cache": LatentCache.load(tmp_path / "cache").identity, "rank": 3}
    with monkeypatch.context() as patched:
        patched.setattr(module._Passes, "measured", lambda *_: pytest.fail("measured again"))
        assert Spectrum.beside(tmp_path / "cache", 3).c.equal(found.c)
    assert Spectrum.beside(tmp_path / "cache", 2).c.shape == (3, 3)  # measured again for another rank
    cache(tmp_path / "other", seed=1)
    (tmp_path / "cache.spectrum.json").rename(tmp_path / "other.spectrum.json")
    assert Spectrum.beside(tmp_path / "other", 2).fingerprint["cache"] != found.fingerprint["cache"]
    with pytest.raises(StorageError, match=r"something else \(rank: expected 9, got 2\)"):
        Spectrum.load(tmp_path / "other.spectrum.json", expect={"rank": 9})
    for content in ("{", json.dumps({"kind": "pool", "version": 1}), json.dumps({"kind": "spectrum", "version": 1})):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(StorageError, match=r"bad\.json: expected a spectrum, got another file"):
            Spectrum.load(tmp_path / "bad.json")
    with pytest.raises(StorageError, match=r"none\.json: could not be read"):
        Spectrum.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("steps", "alone", "continuum", "solved", "reachable"),
    [(18, 0.2895, 0.130, -1.47, False), (30, 0.331, 0.305, -0.699, True)],
)
def test_a_coarse_grid_has_its_own_neutral_window(steps, alone, continuum, solved, reachable):
    grid = grid_of(karras(steps))
    assert float(recursion(grid, 0.0, MU, C, U).variance) == pytest.approx(alone, abs=5e-4)
    window = Guidance.window(2, neutral_window(C, U, 2.0, 3.0).w, SWITCH)
    assert float(recursion(grid, window, MU, C, U).variance) == pytest.approx(continuum, abs=5e-4)
    found = variance_neutral(Spectrum.of(C, U), grid, 2.0, SWITCH, start="exact")
    assert found.w_minus == pytest.approx(solved, abs=5e-3) and found.reachable is reachable
    wanted = Guidance.window(2, found.w_minus, SWITCH)
    both = [recursion(grid, schedule, MU, C, U).variance for schedule in (0.0, wanted)]
    assert abs(float(both[1] / both[0]) - 1) < 1e-9
    assert variance_neutral(Spectrum.of(C, U), grid, 2.0, SWITCH, floor=-2.0, start="exact").reachable
    if reachable:
        assert found.schedule == wanted and abs(found.ratio - 1) < 1e-9 and found.steps == steps
    else:
        nearest = Guidance.window(2, -1, SWITCH)
        assert found.schedule == nearest
        assert found.ratio == pytest.approx(float(recursion(grid, nearest, MU, C, U).variance / both[0]), rel=1e-12)
        enough = [
            variance_neutral(Spectrum.of(C, U), module._refined(grid, n), 2.0, SWITCH, start="exact").reachable
            for n in (found.steps - 1, found.steps)
        ]
        assert enough == [False, True]


def test_what_no_number_of_steps_reaches():
    assert not neutral_window(C, U, 10.0, 3.0).reachable
    found = variance_neutral(Spectrum.of(C, U), grid_of(karras(30)), 10.0, SWITCH, start="exact")
    assert not found.reachable and found.steps is None and found.ratio < 1
    assert found.schedule == Guidance.window(10, -1, SWITCH)


@pytest.mark.parametrize("grid", [grid_of(karras(30)), Grid.flow(28, 3.0)], ids=["karras", "flow"])
@pytest.mark.parametrize("method", ["ddim", "heun", "ancestral"])
def test_the_lowest_switch_that_is_reachable(grid, method):
    spectrum = Spectrum.of([0.4, 0.1, 1.0], [2.0, 0.3, 1.0])
    found = variance_neutral(spectrum, grid, 1.5, method=method)
    assert found.reachable and -1 <= found.w_minus < 0 and abs(found.ratio - 1) < 1e-9
    c, u = torch.tensor([0.4, 0.1, 1.0], dtype=torch.float64), torch.tensor([2.0, 0.3, 1.0], dtype=torch.float64)
    sums = [recursion(grid, s, 0.0, c, u, "noise", method).variance.sum() for s in (0.0, found.schedule)]
    assert abs(float(sums[1] / sums[0]) - 1) < 1e-9
    at = found.schedule.stretches[0][0]
    levels = grid.sigma.tolist()
    below = levels[levels.index(at) + 1]
    assert below == 0 or not variance_neutral(spectrum, grid, 1.5, below, method=method).reachable


def test_where_no_switch_is_reachable_the_nearest_is_given():
    grid = grid_of([3.0, 1.5, 0.7, 0.0])
    found = variance_neutral(Spectrum.of(C, U), grid, 3.0, floor=-0.1)
    others = [variance_neutral(Spectrum.of(C, U), grid, 3.0, switch, floor=-0.1).ratio for switch in (1.5, 0.7)]
    assert not found.reachable and found.ratio == max(others) < 1


def test_classes_and_multiplicities_are_summed():
    images, labels = data()
    spectrum = Spectrum.estimate(images, labels, 2)
    grid = grid_of(karras(20))
    total = sum(
        float(m) * float(recursion(grid, 1.0, 0.0, float(c), float(u), "noise").variance)
        for row in spectrum.c
        for c, u, m in zip(row, spectrum.u, spectrum.multiplicity, strict=True)
    )
    assert spectrum.variance(grid, 1.0) == pytest.approx(total, rel=1e-12)
    flat = Spectrum(torch.tensor([[1.0, 0.0]]), torch.tensor([2.0, 0.0]), torch.ones(2), torch.zeros(1).long())
    assert flat.variance(grid, 1.0) == Spectrum.of(1.0, 2.0).variance(grid, 1.0)


def test_samples_of_the_solved_window_vary_as_without_guidance():
    grid, laws = Grid.flow(16, 3.0), ([0.5, 0.2], [0.4, 0.1], [2.0, 0.6])
    found = variance_neutral(Spectrum.of(*laws[1:]), grid, 1.5)
    free, constant, window = (
        measure(Gaussian(grid, *laws), grid, s, samples=2048).found for s in (0.0, 1.5, found.schedule)
    )
    assert constant.variance < 0.7 * free.variance and window.mean > free.mean
    assert window.variance == pytest.approx(free.variance, rel=4 * math.sqrt(2 / 2048))


def test_bad_spectra():
    one = torch.ones(1, 2)
    for make, message in (
        (lambda: Spectrum.of(0.0, 1.0), "c: expected variances above 0, got 0.0"),
        (lambda: Spectrum(one[0], one[0], one[0], one[0]), "c: expected variances [K, r], got (2,)"),
        (lambda: Spectrum(one, one[0, :1], one[0], torch.zeros(1)), "u: expected variances [2] or [1, 2], got (1,)"),
        (
            lambda: Spectrum(one, one[0], one[0, :1], torch.zeros(1)),
            "multiplicity: expected one for each direction, [2]",
        ),
        (lambda: Spectrum(one, one[0], one[0], torch.zeros(3)), "labels: expected one for each class, [1], got (3,)"),
        (lambda: Spectrum(-one, one[0], one[0], torch.zeros(1)), "c: expected values >= 0, got -1.0"),
        (lambda: Spectrum(one * math.nan, one[0], one[0], torch.zeros(1)), "c: expected finite values"),
        (lambda: Spectrum(0 * one, one[0], one[0], torch.zeros(1)), "c: expected a class that varies"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            make()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": torch.tensor([7, *[2] * 43])},
            "labels: expected at least 2 samples of each class, got 1 of class 7",
        ),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels: expected int64, one for each of 44 images"),
        ({"labels": None}, "labels: expected int64, one for each of 44 images, got None"),
        ({"rank": 0}, "rank: expected at least 1 direction, got 0"),
        ({"data": torch.full((44, 2), math.inf)}, "images: expected finite values, got others in row 0"),
        ({"data": torch.ones(44, 2)}, "c: expected a class that varies"),
        ({"data": torch.ones(44, 2).long()}, "images: expected a floating-point type"),
        ({"data": [1.0, 2.0]}, "images: expected a tensor or StoredRows, got list"),
    ],
)
def test_bad_data(changes, message):
    images, labels = data()
    with pytest.raises(InputError, match=re.escape(message)):
        Spectrum.estimate(**({"data": images, "labels": labels} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spectrum": (C, U)}, "spectrum: expected a Spectrum (Spectrum.of(c, u) of given variances), got (0.4, 2.0)"),
        ({"spectrum": Spectrum.of(U, C)}, "u: expected a variance above c in some direction (guidance widens what"),
        (
            {"spectrum": Spectrum.of([2.0, 0.1], [1.0, 0.2]), "switch": 1.0},
            "spectrum: expected variances that w = 2 above sigma = 1 shrinks, got 2.31707",
        ),
        ({"w_plus": 0}, "w_plus: expected a finite number > 0, got 0.0"),
        ({"w_plus": math.nan}, "w_plus: expected a finite number > 0, got nan"),
        ({"floor": 0.5}, "floor: expected a finite number <= 0, got 0.5"),
        ({"switch": 900.0}, "the ends of the levels, got 900 in"),
        ({"switch": 1.0, "stop": 2.0}, "thresholds: expected values of sigma that decrease, got 1, then 2"),
        ({"stop": 70.0}, "stop: expected a level below 66.1014, the second of the grid, got 70.0"),
        ({"grid": [2, 1, 0]}, "grid: expected a Grid, got [2, 1, 0]"),
        ({"switch": "high"}, "switch: expected a number, got 'high'"),
    ],
)
def test_bad_input(changes, message):
    given = {"spectrum": Spectrum.of(C, U), "grid": grid_of(karras(30)), "w_plus": 2.0} | changes
    with pytest.raises(InputError, match=re.escape(message)):
        variance_neutral(**given)
