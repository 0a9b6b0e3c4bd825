# SPDX-License-Identifier: Apache-2.0
"""CLARID: on a class with a known distribution, on every family, and as a set on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.flow import FlowSchedule
from fastdistill.diffusion.guided import sample
from fastdistill.diffusion.inversion import invert
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.distill.canonical import Clarid, canonical
from fastdistill.distill.canonical_set import CanonicalSet, draw_rows, extract_canonical
from fastdistill.errors import InputError, StorageError
from fastdistill.models.weights import weights_hash
from tests import tiny
from tests.harness import EPS, EPS64
from tests.models import tiny_families

SCHEDULE = NoiseSchedule.linear(100)
VARIANCES = torch.tensor([4.0, 2.5, 1.5, 0.8, 0.4, 0.2], dtype=torch.float64)
AXES = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
PROMPTS = torch.zeros(8, 1, 1, dtype=torch.float64)


class Gaussian(nn.Module):
    """The perfect epsilon model of N(0, Sigma)."""

    def __init__(self) -> None:
        super().__init__()
        self.variances, self.axes = nn.Parameter(VARIANCES), nn.Parameter(AXES)

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        a, b = SCHEDULE.signal[timestep][:, None], SCHEDULE.noise[timestep][:, None]
        return (x @ self.axes) * (b / (a**2 * self.variances + b**2)) @ self.axes.T


def gaussian_images() -> Tensor:
    return (
        torch.randn(8, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * VARIANCES.sqrt() @ AXES.T
    )


@pytest.mark.parametrize(("tap", "removed"), [("x0", [0, 1]), ("output", [4, 5])])
def test_a_gaussian_class(tap: str, removed: list[int]) -> None:
    """The x_0 prediction moves most along the directions of largest variance, eps along those of the smallest. The
    decoded samples lose exactly the variance along these."""
    model, x = Gaussian().eval(), gaussian_images()
    settings = {"t_e": 60, "tap": tap, "steps": 5, "guidance": "0"}
    plain, found = (canonical(model, x, PROMPTS, Clarid(k=k, **settings), schedule=SCHEDULE) for k in (0, 2))  # type: ignore[arg-type]
    assert found.subspace is not None and found.subspace.settled.all()
    span = AXES.T @ found.subspace.vectors  # [8, 6, 2]
    kept = [i for i in range(6) if i not in removed]
    assert span[:, kept].abs().max() <= 1e-9
    before, after = plain.samples @ AXES, found.samples @ AXES
    assert after[:, removed].abs().max() <= 1e-9
    assert (after[:, kept] - before[:, kept]).abs().max() <= 1e-9
    share = (plain.latents @ AXES)[:, removed].square().sum(1) / plain.latents.square().sum(1)
    assert (found.energy - share).abs().max() <= 1e-9
    given = canonical(model, x, PROMPTS, Clarid(k=2, **settings), schedule=SCHEDULE, directions=found.subspace.vectors)  # type: ignore[arg-type]
    assert torch.equal(given.samples, found.samples) and given.subspace is None


def test_no_direction_is_the_identity() -> None:
    model, x, clarid = Gaussian().eval(), gaussian_images(), Clarid(t_e=40, k=0, tap="x0", steps=3)
    found = canonical(model, x, PROMPTS, clarid, schedule=SCHEDULE)
    grid = clarid.grid(SCHEDULE)
    assert torch.equal(found.clareps, invert(model, x, PROMPTS, grid)) and found.subspace is None
    assert torch.equal(found.samples, sample(model, found.latents, PROMPTS, None, grid)) and not found.energy.any()
    again = canonical(model, found.latents, PROMPTS, clarid, schedule=SCHEDULE, inverted=True)
    assert torch.equal(again.samples, found.samples)


@pytest.mark.parametrize("name", ["sd", "dit", "pixart_sigma", "sd3"])
def test_families(name: str) -> None:
    """With texts and class labels; the latent has no component left along the feature's directions."""
    model = tiny_families.model(name).eval()
    schedule = FlowSchedule(100) if name == "sd3" else SCHEDULE
    banks = tiny_families.banks(model)
    rows, null = ({k: v[i] for k, v in banks.items()} for i in (slice(0, 2), slice(3, 4)))
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    clarid = Clarid(t_e=60, k=8, tap=tiny_families.tap(name), steps=2, guidance="2")
    found = canonical(model, x, rows, clarid, schedule=schedule, null_prompt=null)
    assert found.subspace is not None and found.samples.shape == x.shape and found.features.shape[0] == 2
    along = found.subspace.vectors.mT @ found.clareps.flatten(1)[:, :, None]
    assert along.abs().max() <= 64 * torch.finfo(torch.float32).eps * found.latents.abs().max()
    assert ((found.energy > 0) & (found.energy < 1)).all()


def data() -> LatentCache:
    return LatentCache(torch.randn(12, 4, 2, 2, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 2)


def extract(path: Path, **changes: Any) -> None:
    """With the three-layer model, four rows for each of two prompts."""
    arguments: dict[str, Any] = {
        "model": tiny.Net().eval(), "data": data(), "prompts": tiny.bank(), "schedule": tiny.SCHEDULE, "per_class": 4,
        "clarid": Clarid(t_e=30, k=2, tap="mid", steps=2), "batch": 2, "rows_per_shard": 3,
    }  # fmt: skip
    extract_canonical(path, **(arguments | changes))


def test_a_set_of_latents_with_directions_of_their_own(tmp_path: Path) -> None:
    """Other directions are projected out of the latents of a set; the fingerprint contains this."""
    extract(tmp_path / "whole", clarid=Clarid(t_e=30, k=0, tap="mid", steps=2))
    whole = CanonicalSet.load(tmp_path / "whole")
    latents = LatentCache(whole.clareps, whole.prompt_index)
    g = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(8, whole.clareps[0].numel(), 3, generator=g))[0]
    given: dict[str, Any] = {"data": latents, "inverted": True, "per_class": None}
    extract(tmp_path / "same", clarid=Clarid(t_e=30, k=0, tap="mid", steps=2), **given)
    extract(tmp_path / "other", directions=directions, **given)
    same, other = CanonicalSet.load(tmp_path / "same"), CanonicalSet.load(tmp_path / "other")
    assert torch.equal(same.clareps, whole.clareps[same.rows]) and other.fingerprint["inverted"] is True
    # other batches: a matrix product may be summed in another order, twice per step
    torch.testing.assert_close(same.samples, whole.samples[same.rows], rtol=1e-5, atol=1e-5)
    left = torch.einsum("bnk,bn->bk", directions[other.rows], other.clareps.flatten(1))
    assert float(left.abs().max()) <= 60 * EPS * float(other.clareps.flatten(1).norm(dim=1).max())
    assert other.values.shape == (8, 0) and other.fingerprint["directions"] != same.fingerprint.get("directions")
    with pytest.raises(InputError, match=r"directions: expected vectors \[8, n, any\] of the data"):
        extract(tmp_path / "none", directions=directions[:3], **given)
    assert not (tmp_path / "none").exists()


def test_a_set_that_was_interrupted(tmp_path: Path) -> None:
    """It is continued and has the same bytes as without the interruption; its inputs are compared."""
    extract(tmp_path / "whole")
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path / "parts", progress=stop)
    with pytest.raises(StorageError, match="unfinished: it has 3 of 8 rows"):
        CanonicalSet.load(tmp_path / "parts")
    extract(tmp_path / "parts")
    one, two = (CanonicalSet.load(tmp_path / name) for name in ("whole", "parts"))
    for name in ("rows", "prompt_index", "clareps", "samples", "features", "values", "energy", "settled"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert seen == [(0, 8), (2, 8), (3, 8), (5, 8)] and len(one) == 8
    assert torch.equal(one.rows, draw_rows(data().prompt_index, 4)) and one.features.shape == (8, 6, 2, 2)
    assert torch.equal(one.prompt_index, data().prompt_index[one.rows])
    expect = {"teacher": weights_hash(tiny.Net()), "data": data().identity}
    opened = CanonicalSet.open(tmp_path / "whole", expect=expect)
    assert torch.equal(opened.samples[2:4], one.samples[2:4])
    with pytest.raises(StorageError, match=r"made differently \(data: expected 'other', got '[0-9a-f]+'\)"):
        CanonicalSet.load(tmp_path / "whole", expect={"data": "other"})
    with pytest.raises(StorageError, match=r"clarid\.k: expected 3, got 2"):
        extract(tmp_path / "whole", clarid=Clarid(t_e=30, k=3, tap="mid", steps=2))


def test_a_set_through_a_vae(tmp_path: Path) -> None:
    """``encode`` and ``decode`` are functions of the caller; without directions the set has inverted and decoded
    images."""
    extract(tmp_path, encode=lambda x: x / 2, decode=lambda x: x[:, :3].double() * 2, per_class=None, classes=[1],
            clarid=Clarid(t_e=30, k=0, tap="mid", steps=2))  # fmt: skip
    found = CanonicalSet.load(tmp_path)
    assert found.samples.dtype == torch.float64 and found.samples.shape == (6, 3, 2, 2) and found.values.shape == (6, 0)
    assert set(found.prompt_index.tolist()) == {1} and sorted(found.rows.tolist()) == [1, 3, 5, 7, 9, 11]


def test_draws_by_counter() -> None:
    index = torch.arange(60) % 3
    few, more, every = (draw_rows(index, n, seed=2) for n in (2, 5, None))
    assert torch.equal(more.view(3, 5)[:, :2].flatten(), few)  # the first draws do not depend on how many are drawn
    assert torch.equal(every.sort().values, torch.arange(60))
    assert torch.equal(draw_rows(index, 5, classes=[1], seed=2), more.view(3, 5)[1])
    assert (
        not torch.equal(draw_rows(index, 5, seed=3), more)
        and (index[more] == torch.arange(3).repeat_interleave(5)).all()
    )


def test_wrong_settings(tmp_path: Path) -> None:
    model, x = Gaussian().eval(), gaussian_images()
    for given, message in (
        ({"t_e": 0}, "t_e: expected a whole number from 1, got 0"),
        ({"k": -1}, "k: expected a whole number from 0"),
        ({"method": "euler"}, "method: expected one of ddim, heun"),
        ({"search": "lanczos"}, "search: expected one of auto"),
        ({"tolerance": 1}, "tolerance: expected a sine"),
        ({"guidance": "8@"}, "guidance: expected a schedule"),
    ):
        with pytest.raises(InputError, match=message):
            Clarid(**({"t_e": 60, "k": 2, "tap": "x0"} | given))  # type: ignore[arg-type]
    for changes, given, message in (
        ({"t_e": 100}, {}, "t_e: expected a timestep of the schedule with signal, 1 to 99, got 100"),
        ({"steps": 62}, {}, "steps: expected 1 to 61"),
        ({"k": 7}, {}, "k: expected at most 6, the elements of a sample, got 7"),
        ({"tap": "axis"}, {}, r"'axis' \(no near match\)"),
        ({"guidance": "2"}, {}, "null_prompt: expected a row"),
        ({"guidance": "2@500,0"}, {"null_prompt": PROMPTS[0]}, "guidance: expected thresholds of sigma"),
        ({}, {"directions": x}, r"directions: expected orthonormal vectors \[8, 6, any\]"),
    ):
        clarid = Clarid(**({"t_e": 60, "k": 2, "tap": "x0"} | changes))  # type: ignore[arg-type]
        with pytest.raises(InputError, match=message):
            canonical(model, x, PROMPTS, clarid, schedule=SCHEDULE, **given)  # type: ignore[arg-type]
    other = LatentCache(data().latents, data().prompt_index, {"prompts": "0" * 64})
    for wrong, message in (
        ({"data": other}, "prompts: expected the bank 0+ that the latents point into"),
        ({"per_class": 7}, "per_class: expected at most 6, the rows of class 0, got 7"),
        ({"classes": [1, 5]}, "classes: expected classes that have rows, got 5"),
        ({"clarid": Clarid(t_e=30, k=17, tap="mid", steps=2)}, "k: expected at most 16"),
        ({"model": tiny.Net().eval().half()}, r"float32 or float64 \(model\.float\(\)\)"),
        ({"prompts": PromptBank(torch.zeros(2, 5, 6), ["a"])}, "prompt_index: expected rows of a bank of 1 prompts"),
    ):
        with pytest.raises(InputError, match=message):
            extract(tmp_path / "none", **wrong)
    assert not (tmp_path / "none").exists()


def test_the_tolerance_of_a_projection() -> None:
    """A second projection changes nothing."""
    model, x, clarid = Gaussian().eval(), gaussian_images(), Clarid(t_e=60, k=2, tap="x0", steps=2)
    once = canonical(model, x, PROMPTS, clarid, schedule=SCHEDULE)
    twice = canonical(model, once.clareps, PROMPTS, clarid, schedule=SCHEDULE, inverted=True)
    assert (twice.clareps - once.clareps).abs().max() <= 64 * EPS64 * once.latents.abs().max()
