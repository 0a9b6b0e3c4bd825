# SPDX-License-Identifier: Apache-2.0
"""Plans of runs: their sizes equal those of the caches and trainers that the same run file creates."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdistill import plan as plans
from fastdistill import runs
from fastdistill.cli import main
from fastdistill.errors import InputError
from fastdistill.models.pipelines import open_pipeline
from fastdistill.runs.plan import default_micro_batch, job_of
from fastdistill.train.config import to_yaml
from tests.models import tiny_pipelines as tiny
from tests.runs.conftest import run_config


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> plans.Card:
    """A simulated measured CPU."""
    made = plans.Card("a CPU", 2**30, 1e10, 1e11, 1e11, 5e-6, "cpu", "measured")
    monkeypatch.setattr(plans, "card_here", lambda device: made)
    return made


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("sdxl", "sd3", "dit") else pytest.mark.slow) for name in tiny.PIPELINES
])  # fmt: skip
def test_rows_are_those_of_encoded_prompts(name: str, saved: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(saved(name))
    bank = pipeline.encode(["white cat" if name == "dit" else "a cat"])
    found = {key: (tuple(row.shape), row.dtype) for key, row in pipeline.row().items()}
    assert found == {key: (tuple(rows.shape[1:]), rows.dtype) for key, rows in bank.banks.items()}


def test_a_plan_of_a_run_file(saved: Callable[[str], Path], tmp_path: Path) -> None:
    config = run_config(saved("sd"), tmp_path)
    found = runs.plan(config)
    teacher = open_pipeline(saved("sd")).model(device="meta")
    bytes_of = sum(p.nbytes for p in teacher.parameters())
    assert found.memory["teacher"] == bytes_of + sum(b.nbytes for b in teacher.buffers())
    assert found.memory["moments"] == 2 * found.memory["averages"] == 8 * found.parameters["trained"]
    assert (found.micro_batch, found.batch, found.execution, found.ranks) == (4, 4, "eager", 1)
    assert found.total == sum(found.memory.values()) and found.hours > 0
    made = runs.cache(config)
    shards = [p for place in (made.prompts, *made.latents) for p in place.glob("*.safetensors")]
    headers = len(shards) * 2000
    assert 0 <= sum(p.stat().st_size for p in shards) - found.disk["latents"] - found.disk["prompts"] <= headers
    assert runs.plan(config).memory == found.memory  # the stored bank has the expected sizes


def test_a_micro_batch_by_default_has_room_for_rolling_states(saved: Callable[[str], Path], tmp_path: Path) -> None:
    rolling = {"random_conditioning": {"rolling": {"every": 4}}}
    config = run_config(saved("sd"), tmp_path, objective=rolling, train={"batch": 12})
    found = runs.plan(config)
    assert (found.micro_batch, found.changed(micro_batch=6).total < found.total) == (12, True)
    assert default_micro_batch(runs.opened(config), found.total - 1) == 4
    with pytest.raises(InputError, match=r"every: expected a divisor of the part that each of 2 ranks .*, 6, got 4"):
        runs.plan(config, ranks=2)


def test_a_plan_of_a_student_that_reads_the_scale(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Its tensors have no values, and the weights that the scale multiplies are read."""
    guidance: dict[str, Any] = {"schedule": "1", "scale": [0, 11]}
    assert runs.plan(run_config(saved("sd"), tmp_path, objective={"guidance": guidance})).total > 0
    guidance["schedule"] = "-1"
    with pytest.raises(InputError, match=r"^objective.guidance.scale: expected None for a schedule without positive"):
        runs.plan(run_config(saved("sd"), tmp_path, objective={"guidance": guidance}))


def test_errors_of_a_bound_objective_name_the_field(saved: Callable[[str], Path], tmp_path: Path) -> None:
    many = {"random_conditioning": {"regions": {"count": 60}}}
    with pytest.raises(InputError, match=r"^objective.random_conditioning.regions.count: expected at most the 5 prom"):
        runs.plan(run_config(saved("sd"), tmp_path, objective=many))


def test_a_plan_needs_no_measurement(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """The tables of a measured p(t) and of regions are counted, without a measurement."""
    plain = runs.plan(run_config(saved("sd"), tmp_path))
    own = {"random_conditioning": {"probability": "measured", "regions": {"count": 2}}}
    found = runs.plan(run_config(saved("sd"), tmp_path, objective=own))
    assert 0 < found.memory["batch"] - plain.memory["batch"] < 2**16


def test_prompts_encoded_on_demand_are_those_of_the_coming_steps(saved: Callable[[str], Path], tmp_path: Path) -> None:
    run = runs.opened(
        run_config(saved("sd"), tmp_path, cache={"encodings": "on_demand"}, train={"ahead": 2, "batch": 6})
    )
    lengths = [len(job_of(run, "cpu", ranks=ranks).prompts["encoder_hidden_states"]) for ranks in (1, 2)]
    assert lengths == [3 * 6, 3 * 3] and job_of(run, "cpu").encoders > 0


def test_a_named_card_needs_none(saved: Callable[[str], Path], tmp_path: Path) -> None:
    config = run_config(saved("dit"), tmp_path, device="cuda")
    found = runs.plan(config, card="h100")
    assert found.execution == "graph" and found.card.source == "model"
    assert found.memory["masters"] == 4 * found.parameters["trained"]
    with pytest.raises(InputError, match=r"card: expected one of .*h100.*, got 'h101'"):
        runs.plan(config, card="h101")
    with pytest.raises(InputError, match=r"train.batch: expected a multiple of the 3 ranks that share it, got 4"):
        runs.plan(config, card="h100", ranks=3)
    with pytest.raises(InputError, match=r"ranks: expected a whole number of at least 1, got 0"):
        runs.plan(config, card="h100", ranks=0)


def test_remedies_are_computed(saved: Callable[[str], Path], tmp_path: Path) -> None:
    found = runs.plan(run_config(saved("dit"), tmp_path))
    assert plans.fits(found, found.total) is None
    remedies = plans.fits(found, found.total - 1)
    assert remedies is not None and remedies[0].enough
    by_name = {name: remedy for remedy in remedies if len(remedy.settings) == 1 for name in remedy.settings}
    assert found.changed(gradient_checkpointing=True).total == by_name["train.gradient_checkpointing"].bytes
    half = by_name["train.micro_batch"]
    assert half.settings["train.micro_batch"] == 2 and found.changed(micro_batch=2).total == half.bytes < found.total
    hopeless = plans.fits(found, found.memory["teacher"])
    assert hopeless and not any(remedy.enough for remedy in hopeless) and len(hopeless[-1].settings) > 1
    run = runs.opened(run_config(saved("dit"), tmp_path))
    assert default_micro_batch(run, found.total) == 4
    assert default_micro_batch(run, found.total - 1) == 2
    assert default_micro_batch(run, found.memory["teacher"]) is None


def test_more_ranks_share_what_is_sharded(saved: Callable[[str], Path], tmp_path: Path) -> None:
    one = runs.plan(run_config(saved("dit"), tmp_path), card="h100")
    two = one.changed(ranks=2, sharded=True, micro_batch=2)
    for part in ("student", "masters", "moments", "averages"):
        assert two.memory[part] == -(-one.memory[part] // 2)
    assert two.memory["teacher"] == one.memory["teacher"] and two.memory["gathered"] > 0 and two.batch == 2


@pytest.mark.parametrize("arguments", [["--json"], ["--card", "rtx4090"]])
def test_the_command(
    arguments: list[str], saved: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(run_config(saved("dit"), tmp_path)))
    assert main(["plan", str(file), *arguments]) == 0
    text = capsys.readouterr().out
    if arguments == ["--json"]:
        told: dict[str, Any] = json.loads(text)
        assert told["total"] == sum(told["memory"].values()) and told["card"]["name"] == "a CPU"
        return
    assert all(len(line) <= 100 for line in text.splitlines())
    assert ("model" if arguments else "measured") in text and "teacher" in text and "images/s" in text


def test_the_documentation_has_every_card() -> None:
    text = (Path(__file__).parents[2] / "docs/plan.md").read_text(encoding="utf-8")
    cards = re.findall(r"^\| ([a-z0-9, -]+) \| [\d.]", text, re.MULTILINE)
    assert {name for row in cards for name in row.split(", ")} == {*plans.CARDS}
