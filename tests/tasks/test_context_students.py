# SPDX-License-Identifier: Apache-2.0
"""Classifiers of the context task: their kinds, their sets, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill import cli
from fastdistill.diffusion.posterior import diffusion_posterior
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.distill.canonical_set import CanonicalSet
from fastdistill.errors import InputError
from fastdistill.ops import philox
from fastdistill.tasks.context import data, students
from fastdistill.tasks.context.sets import Sets, make_sets
from fastdistill.tasks.context.students import KINDS, SET, StudentConfig, objective, train_student
from fastdistill.train.config import TrainSettings
from tests import tiny
from tests.harness import EPS

SHORT = TrainSettings(steps=2, batch=8, lr=1e-3, log_every=1, checkpoint_every=1)


def a_set(seed: int) -> CanonicalSet:
    """Two rows per digit, from noise."""
    labels, g = data.students().digit, torch.Generator().manual_seed(seed)
    rows = torch.cat([(labels == digit).nonzero().flatten()[:2] for digit in range(10)])
    made = torch.randn(20, *data.SHAPE, generator=g)
    none = torch.zeros(20)
    return CanonicalSet(
        rows, labels[rows], made, made, torch.randn(20, 6, 2, 2, generator=g), none[:, None], none, none == 0
    )


def sets() -> Sets:
    found = {name: a_set(number) for number, name in enumerate(("canonical", "samples", "random", "generated"))}
    return Sets(**found, originals=a_set(9), posterior=torch.full((20, 10), 0.1))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_by_the_same_budget(kind: Any) -> None:
    found = train_student(StudentConfig(kind=kind, train=SHORT, canonical_batch=8), sets())
    assert found["kind"] == kind and set(found["right"]) == set(data.HELD_OUT)
    losses, own = found["losses"], objective(StudentConfig(kind=kind))
    assert all((losses[name] != 0) == bool(getattr(own, name)) for name in ("align", "canonical", "posterior"))
    assert (losses["own_labels"] > 0) == own.own_labels == (kind in SET and not kind.endswith("_kd"))
    assert torch.equal(students.restored(found["weights"]).head.bias, found["weights"]["head.bias"])
    if kind in SET:
        with pytest.raises(InputError, match=rf"sets: expected {SET[kind]} \(make_sets\), for the kind {kind}"):
            train_student(StudentConfig(kind=kind, train=SHORT), Sets())


def test_a_part_of_the_sets_has_the_first_rows_of_each_class() -> None:
    whole = sets()
    part = whole.part(1)
    assert part.canonical is not None and whole.canonical is not None and part.posterior is not None
    assert torch.equal(part.canonical.samples, whole.canonical.samples[::2]) and len(part.posterior) == 10
    with pytest.raises(InputError, match="per_class: expected 1 to the 2 rows of a class, got 3"):
        whole.part(3)


def test_the_command_goes_on_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cadistill", "--kinds", "plain", "augment", "--output", str(tmp_path / "run"), "--json"]
    short = ["--student.train.steps", "2", "--student.train.batch", "8", "--student.train.log-every", "1"]
    assert cli.main([*words, *short]) == 0
    first = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in first["students"]] == ["plain", "augment"]
    assert (tmp_path / "run" / "plain-0" / "student.safetensors").exists()
    assert cli.main([*words, *short]) == 0
    again = json.loads(capsys.readouterr().out)
    told = json.loads((tmp_path / "run" / "students.json").read_text())
    untimed = [
        [{name: value for name, value in row.items() if name != "seconds"} for row in report["students"]]
        for report in (first, again, told)
    ]
    assert untimed[0] == untimed[1] == untimed[2] and untimed[0][0]["sha256"] != untimed[0][1]["sha256"]
    assert cli.main([*words, *short, "--student.width", "24"]) == 2
    assert "started differently" in capsys.readouterr().err


def test_the_command_refuses_and_shows_its_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("kinds: [plain]\nseeds: [3]\n")
    assert cli.main(["cadistill", "--config", str(tmp_path / "own.yaml"), "--k", "15", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "k: 15" in shown and "- plain" in shown and "- 3" in shown
    output = ["--output", str(tmp_path / "none")]
    assert cli.main(["cadistill", "--kinds", "plane", *output]) == 2
    assert cli.main(["cadistill", "--student.align", "-1", *output]) == 2
    assert "align: input should be greater than or equal to 0" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_sets_of_the_task(tmp_path: Path) -> None:
    """With one image per digit; a second call reads the sets."""
    made = make_sets(tmp_path, per_class=1)
    assert made.canonical is not None and made.samples is not None and made.random is not None
    assert made.generated is not None and made.originals is not None and made.posterior is not None
    for found in (made.canonical, made.samples, made.random, made.generated, made.originals):
        assert torch.equal(found.rows, made.canonical.rows) and found.prompt_index.tolist() == list(range(10))
    taken = 1 - made.random.clareps.flatten(1).square().sum(1) / made.samples.clareps.flatten(1).square().sum(1)
    assert float((taken - made.canonical.energy).abs().max()) < 1e-4
    assert torch.equal(made.originals.features, made.samples.features)
    assert torch.equal(made.originals.samples, data.students().images[made.canonical.rows])
    again = make_sets(tmp_path, ("random", "posterior"), per_class=1)
    assert again.canonical is None and again.random is not None and again.posterior is not None
    assert torch.equal(again.random.samples, made.random.samples) and torch.equal(again.posterior, made.posterior)


def test_a_diffusion_model_as_a_classifier() -> None:
    """Computed again for each image, noise and class; splitting a batch changes only rounding."""
    model, schedule = tiny.Net().eval(), NoiseSchedule.linear(50)
    x, prompts = torch.randn(3, 4, 5, 3, generator=torch.Generator().manual_seed(0)), tiny.bank().embeddings
    found = diffusion_posterior(model, x, prompts, schedule=schedule, draws=2, seed=4, batch=4)
    assert found.shape == (3, 3) and float((found.sum(1) - 1).abs().max()) <= 4 * EPS
    errors = torch.zeros(3, 3, dtype=torch.float64)
    for number, t in ((1, 12), (2, 37)):
        for row in range(3):
            noise = philox.normal(
                torch.tensor(4), torch.tensor(number), torch.tensor([row]), (4, 5, 3), stream=philox.INITIAL_NOISE
            )
            x_t = schedule.signal[t] * x[row] + schedule.noise[t] * noise
            for label in range(3):
                with torch.no_grad():
                    told = model(x_t.float(), torch.tensor([t]), prompts[label][None])
                errors[row, label] += (told - noise).double().square().sum() / 2
    wanted = (-errors).softmax(1)
    bound = 100 * EPS * float(errors.abs().max())  # of sums of 60 squares, and their differences in the exponent
    assert float((found.double() - wanted).abs().max()) <= bound
    part = diffusion_posterior(model, x[1:], prompts, schedule=schedule, draws=2, seed=4, rows=torch.tensor([1, 2]))
    assert float((part.double() - wanted[1:]).abs().max()) <= bound
    with pytest.raises(InputError, match="draws: expected at most 50, the timesteps, got 51"):
        diffusion_posterior(model, x, prompts, schedule=schedule, draws=51)
