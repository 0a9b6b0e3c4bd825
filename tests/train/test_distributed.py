# SPDX-License-Identifier: Apache-2.0
"""Two processes train like one: the same draws to the bit; weights differ only by the order of sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fastdistill.errors import FastdistillError, InputError, StorageError
from fastdistill.train import distributed
from tests import processes
from tests.train import ranks, scenarios

Found = dict[str, tuple[Any, Any]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which both ranks have run the scenarios."""

    def make(directory: Path) -> None:
        directory.mkdir()
        processes.as_ranks(scenarios.both, str(directory))

    return processes.once(tmp_path_factory, "ranks", make)


@pytest.fixture(scope="module")
def found(place: Path) -> Found:
    """The results of the scenarios on each rank."""
    one, two = (torch.load(place / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    return {name: (one[name], two[name]) for name in scenarios.SCENARIOS}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return ranks.finished(ranks.make())


def done(outcome: Any) -> dict[str, Any]:
    if isinstance(outcome, Exception):
        raise outcome
    assert isinstance(outcome, dict)
    return outcome


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    states = one["state"], two["state"]
    equal = all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    return states[0].keys() == states[1].keys() and equal and one["history"] == two["history"]


def parted(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the spread of features, which uses the first two samples of each part of a batch."""
    return [{name: value for name, value in line.items() if not name.startswith("spread/")} for line in history]


def assert_close(one: dict[str, Any], two: dict[str, Any]) -> None:
    """The order of summation of gradients differs. Their norm is at most 0.5 after clipping, so they differ by about
    1e-7 of it. An update is at most lr / eps = 0.1 times that, several updates about 1e-7; moments are as large as
    gradients."""
    for name, value in one["state"].items():
        if name != "totals":  # one row per rank
            torch.testing.assert_close(value, two["state"][name], rtol=2e-5, atol=1e-6, msg=name)
    for mine, theirs in zip(parted(one["history"]), parted(two["history"]), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("name", ["draws", "from_disk", "encoded"])
def test_the_draws_are_those_of_one_process(found: Found, name: str) -> None:
    for *halves, whole in zip(*found[name], scenarios.draws(0, Path()), strict=True):
        for one, two, wanted in zip(*halves, whole, strict=True):
            assert torch.equal(torch.cat([one, two]), wanted)


@pytest.mark.parametrize("name", ["run", "shards", "parts", "shards_parts"])
def test_a_run_is_that_of_one_process(found: Found, alone: dict[str, Any], name: str) -> None:
    one, two = map(done, found[name])
    assert same(one, two)
    assert_close(one, alone)
    assert one["history"][-1]["gradient_norm"] > 0.5  # clipped


def test_rolling_states_are_those_of_one_process(found: Found) -> None:
    """Each rank has its part of them; a checkpoint contains all, and a run can be continued from it."""
    one, two = map(done, found["rolling"])
    assert same(one, two) and one["state"]["objective.timestep"].shape == (1, 2)
    assert_close(one, ranks.finished(ranks.make(rolling=scenarios.ROLLING, steps=5)))
    again, other = map(done, found["rolling_interrupted"])
    assert same(again, other)
    for name, value in one["state"].items():
        assert name == "totals" or torch.equal(again["state"][name], value), name


def test_ranks_agree_on_a_measured_probability_and_on_regions(found: Found) -> None:
    """Their distances are summed over the ranks; a checkpoint between two updates of the table contains the sums."""
    one, two = map(done, found["adaptive"])
    alone = ranks.finished(ranks.make(**scenarios.ADAPTIVE))
    assert same(one, two) and int(alone["state"]["objective.region_seen"].sum()) > 0
    assert torch.equal(one["state"]["objective.region_seen"], alone["state"]["objective.region_seen"])
    assert_close(one, alone)
    again, other = map(done, found["adaptive_interrupted"])
    assert same(again, other)
    for name, value in one["state"].items():
        assert name == "totals" or torch.equal(again["state"][name], value), name


def test_a_closed_trainer_lets_go_of_the_process_group(found: Found) -> None:
    """Otherwise its end would wait for a thread of gloo, at the end of the process and sometimes forever."""
    assert found["released"] == (True, True)


def test_ranks_draw_from_the_same_of_several_caches(found: Found) -> None:
    one, two = map(done, found["buckets"])
    assert same(one, two)
    assert_close(one, ranks.finished(ranks.make(latents=scenarios.sizes())))


@pytest.mark.parametrize(("name", "whole"), [("interrupted", "run"), ("shards_interrupted", "shards")])
def test_resume_is_exact(found: Found, name: str, whole: str) -> None:
    """All ranks stop within a log interval; the sums of metrics of each rank are restored too."""
    for outcome in found[name]:
        assert same(done(outcome), done(found[whole][0]))


@pytest.mark.parametrize("name", ["run", "shards"])
def test_any_number_of_ranks_goes_on(found: Found, place: Path, name: str) -> None:
    """Started on two ranks, finished on one."""
    done(found[name][0])
    assert_close(ranks.finished(ranks.make(steps=6), place / name), ranks.finished(ranks.make(steps=6)))


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_lower_precision(found: Found, precision: str) -> None:
    """The ranks skip the same updates and have the same scale as one process; also with shards."""
    one, two = map(done, found[precision])
    wanted = done(scenarios.SCENARIOS[precision](0, Path()))
    assert same(one, two)
    for mine, theirs in zip(parted(one["history"]), parted(wanted["history"]), strict=True):
        assert mine == pytest.approx(theirs, rel=0.01)
    if precision == "float16":
        assert 0 < wanted["state"]["skipped"] < 4
        for shards in found["shards_half"]:
            for key, theirs in zip(("loss_scale", "good_steps", "skipped"), shards, strict=True):
                assert torch.equal(one["state"][key], wanted["state"][key]) and torch.equal(theirs, one["state"][key])


def test_a_sharded_student_is_cut_and_its_average_whole(found: Found) -> None:
    shards, trainer = done(found["shards"][0]), ranks.make()
    trainer.fit()
    assert shards["sharded"]
    for name, value in trainer.ema_student().state_dict().items():
        torch.testing.assert_close(shards["average"][name], value, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["fused", "shards_fused"])
def test_fused_unets_too(found: Found, name: str) -> None:
    """Fused, then wrapped or sharded; in the mean of two steps."""
    assert found[name] == pytest.approx((scenarios.fused(0, Path()),) * 2, rel=1e-5)


def test_guidance_weights_are_those_of_one_process(found: Found) -> None:
    assert found["guided"] == pytest.approx((scenarios.guided(0, Path()),) * 2, rel=1e-5)


@pytest.mark.parametrize("name", ["adapters", "shards_adapters"])
def test_adapters_on_frozen_weights(found: Found, place: Path, name: str) -> None:
    """Interrupted, and compared with an uninterrupted process; one rank exports the whole averages."""
    one, two = map(done, found[name])
    assert same(one, two)
    single = ranks.make(student=scenarios.adapted())
    wanted = ranks.finished(single)
    trained = {key for key in wanted["state"] if key.startswith("student.")}
    assert len(trained) == 6 and trained == {key for key in one["state"] if key.startswith("student.")}
    assert_close(one, wanted)
    exported = safetensors.torch.load_file(place / name / "adapters" / "adapter_model.safetensors")
    averages = single.ema_student().state_dict()
    assert len(exported) == 6
    for key, value in exported.items():
        torch.testing.assert_close(value, averages[key.replace(".weight", ".default.weight")], rtol=2e-5, atol=1e-6)


def test_ddp_waits_for_nothing(found: Found) -> None:
    for counter in found["guarded"]:
        assert counter.tolist() == [0, 3]


def test_ctrl_c_on_one_rank_stops_all(found: Found) -> None:
    assert found["pressed"] == ((130, "stopped after step 2 of 4", [2]),) * 2


def test_shards_in_another_precision(found: Found) -> None:
    """A run with bfloat16 shards continues sharded in float32, from the masters of its checkpoint."""
    for weights, masters in found["shards_in_float32"]:
        assert weights.keys() == masters.keys() and all(torch.equal(weights[k], masters[k]) for k in weights)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("nowhere", StorageError, "/proc/fastdistill: the directory could not be created"),
        ("full", StorageError, r"step-00000006.safetensors: could not be written: No such file"),
        ("uneven", InputError, "config.batch: expected a multiple of the 2 ranks that share it, got 5"),
        ("unlike", InputError, r"rank 1: expected what rank 0 .*config.lr: expected 0\.001, got 0\.002"),
        ("unlike_logs", InputError, r"rank 1: expected what rank 0 .*config.log_every: expected 1, got 2"),
        ("unlike_places", InputError, r"rank 1: expected what rank 0 .*directory: expected 'none', got 'given'"),
        ("unlike_shards", InputError, r"rank 1: expected what rank 0 .*shard: expected 'none', got 'given'"),
        ("wrapped", InputError, "student: expected the model itself, which the trainer wraps.*DistributedDataParallel"),
        (
            "resting",
            InputError,
            "student: expected a gradient for every parameter.*none for outer.weight, outer.bias, time.weight",
        ),
        ("shards_copied", InputError, "to: expected a model .*is sharded by FSDP"),
        ("sharded_before", InputError, "student: expected a model that is not sharded yet .*given as shard"),
        ("unsharded", InputError, "shard: expected a function that calls fully_shard on the student"),
    ],
)
def test_every_rank_has_the_error(found: Found, name: str, kind: type[Exception], message: str) -> None:
    """Also an error of rank 0, if only rank 0 writes."""
    for outcome in found[name]:
        with pytest.raises(kind, match=message):
            raise outcome


def test_rank_0_says_how_all_run(found: Found, alone: dict[str, Any]) -> None:
    one, two = map(done, found["measured"])
    assert same(one, two) and one["strides"] == two["strides"]
    assert one["execution"] == two["execution"] == "eager, channels_last"
    assert_close(one, alone)


def test_rank_0_says_whether_processors_multiply_bfloat16(found: Found) -> None:
    one, two = map(done, found["unlike_processors"])
    assert same(one, two) and one["dtypes"] == two["dtypes"] == {"torch.bfloat16"}


def test_compiled_is_eager(found: Found) -> None:
    """With DDP the bits are equal; the compiled gathers of FSDP2 may round the norm differently."""
    assert same(done(found["compiled"][0]), done(found["run"][0]))
    if torch.__version__ < (2, 13):
        with pytest.raises(
            FastdistillError, match=r"execution 'compiled': the model is sharded .* cannot compile .* use 'eager'"
        ):
            done(found["shards_compiled"][1])
        return
    assert_close(done(found["shards_compiled"][1]), done(found["shards"][1]))


def test_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (distributed.size(), distributed.rank()) == (1, 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="expected init_process_group before the trainer, as torchrun started 4"):
        ranks.make()


def test_where_torch_has_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment variables of other launchers are ignored."""
    monkeypatch.setenv("WORLD_SIZE", "")
    ranks.make()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_torchelastic_launched")
    ranks.make()


def test_what_rank_0_says_reaches_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of another package keeps its type on rank 0; the other ranks get its message."""
    sent: list[Any] = []

    def broadcast(outcome: list[Any], src: int) -> None:
        if distributed.rank() == src:
            sent[:] = outcome
        outcome[:] = sent

    def fail() -> None:
        raise ValueError("no")

    acts: list[Callable[[], Any]] = [lambda: 7, fail]
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    for act, errors in zip(acts, (None, (ValueError, FastdistillError)), strict=True):
        for rank in (0, 1):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            if errors is None:
                assert distributed.first(act) == 7
            else:
                with pytest.raises(errors[rank], match="no"):
                    distributed.first(act)
