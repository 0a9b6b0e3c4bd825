# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a sharded student: one file per rank; any number of ranks can read them, sharded or not."""

from __future__ import annotations

import shutil
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from fastdistill.data.fingerprint import sha256_of_tensors
from fastdistill.errors import InputError, StorageError
from fastdistill.train import checkpoint, distributed
from fastdistill.train.checkpoint import newest, prune, read, steps, sweep
from fastdistill.train.state import state_of
from fastdistill.train.stored import DamagedError, Stored
from fastdistill.train.writing import write
from tests import processes
from tests.train import sharded
from tests.train.ranks import Tiny, make, work
from tests.train.sharded import Uneven, loaded, run

NEWEST = "step-00000004.safetensors"
OTHER = "step-00000004.rank-1-of-2.safetensors"
LAUNCHES = {
    2: (
        sharded.first,
        sharded.interrupted,
        sharded.from_one,
        sharded.sizes,
        sharded.failing,
        sharded.pressed,
        sharded.elsewhere,
    ),
    3: (sharded.again, sharded.uncut, sharded.damaged),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks continue what one process wrote, and three what two wrote."""

    def make_all(directory: Path) -> None:
        run(directory / "one", cut=False, steps=2)
        shutil.copytree(directory / "one", directory / "from_one")
        for count, scenarios in LAUNCHES.items():
            (directory / str(count)).mkdir()
            named = {scenario.__name__: scenario for scenario in scenarios}
            processes.as_ranks(work, str(directory / str(count)), named, count, count=count)
            if count == 2:
                for name in ("again", "uncut", "damaged"):
                    shutil.copytree(directory / "2" / "first", directory / name)
                change(directory / "damaged" / OTHER)

    return processes.once(tmp_path_factory, "sharded", make_all)


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, list[Any]]:
    """The results of the scenarios on each rank."""
    told: dict[str, list[Any]] = {}
    for count in LAUNCHES:
        for rank in range(count):
            for name, value in torch.load(place / str(count) / f"{rank}.pt", weights_only=False).items():
                told.setdefault(name, []).append(value)
    return told


@pytest.fixture
def kept(place: Path, tmp_path: Path) -> Path:
    """A copy of a run of two ranks, with checkpoints 2 and 4."""
    return shutil.copytree(place / "2" / "first", tmp_path / "run")


def change(file: Path) -> None:
    """Change the last value, in a new file, because the old one may be memory-mapped."""
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.unlink()
    file.write_bytes(data)


def assert_same(one: dict[str, Any], two: dict[str, Any], *apart: str) -> None:
    assert one["state"].keys() == two["state"].keys()
    assert [k for k in one["state"] if k not in apart and not torch.equal(one["state"][k], two["state"][k])] == []


def test_each_rank_has_a_file_of_its_part(place: Path, found: dict[str, list[Any]]) -> None:
    kept = place / "2" / "first"
    names = sorted(path.name for path in kept.glob("step-*"))
    assert names == sorted(f"step-0000000{n}.{end}safetensors" for n in (2, 4) for end in ("", "rank-1-of-2."))
    stored = Stored(kept / NEWEST)
    state = found["first"][0]["state"]
    assert {*stored} == {*state} and all(torch.equal(stored[name], state[name]) for name in state)
    sizes = [{name: list(t.shape) for name, t in loaded(kept / name).items()} for name in (NEWEST, OTHER)]
    assert sizes[0]["student.outer.weight"] == [2, 6, 3, 3] and sizes[1]["student.outer.weight"] == [1, 6, 3, 3]
    assert {"student.gain", "student.mean", "trained.0.0.weight", "counter"} <= sizes[0].keys() - sizes[1].keys()


def test_resume_is_exact(found: dict[str, list[Any]]) -> None:
    for outcome in found["interrupted"]:
        assert_same(outcome, found["first"][0])
        assert outcome["history"] == found["first"][0]["history"]


def test_one_process_goes_on_with_what_two_wrote(kept: Path, found: dict[str, list[Any]]) -> None:
    assert_same(run(kept, cut=False), found["first"][0], "totals")
    run(kept, cut=False, steps=6)
    assert list(steps(kept)) == [2, 4, 6]


def test_two_ranks_go_on_with_what_one_wrote(place: Path, found: dict[str, list[Any]]) -> None:
    """Each reads its own part."""
    for outcome in found["from_one"]:
        assert_same(outcome, {"state": dict(Stored(place / "one" / "step-00000002.safetensors"))}, "totals")
        cut = [name for name in outcome["asked"] if "student." in name and not name.endswith((".step", ".mean"))]
        assert outcome["asked"] and not cut


def test_three_ranks_go_on_with_what_two_wrote(place: Path, found: dict[str, list[Any]]) -> None:
    """Sharded, or whole on each rank; they write new checkpoints."""
    for again, uncut in zip(found["again"], found["uncut"], strict=True):
        assert_same(again["restored"], found["first"][0], "totals")
        assert_same(uncut, found["first"][0], "totals")
    saved = read(place / "again" / "step-00000006.safetensors")[0]
    later = found["again"][2]["later"]["state"]
    assert all(torch.equal(saved.state[name], later[name]) for name in later) and saved.step == 6
    assert len(list((place / "again").glob("step-00000006.rank-*-of-3.*"))) == 2


def test_a_rank_stages_no_more_than_its_part(found: dict[str, list[Any]]) -> None:
    for staged, own in found["sizes"]:
        assert own < staged < 1.1 * own
    assert sum(own for _, own in found["sizes"]) == 4 * sum(p.nbytes for p in Tiny(128).parameters())


def test_a_write_that_fails_on_one_rank_fails_on_all(found: dict[str, list[Any]]) -> None:
    """There is one warning and no file left; at the end of the run there is an error on every rank."""
    for rank, (told, warned, left) in enumerate(found["failing"]):
        assert len(told) == 1 and told[0].endswith("step-00000006.safetensors: could not be written: no room")
        assert sorted(left) == ["step-00000004.rank-1-of-2.safetensors", "step-00000004.safetensors"]
        assert len(warned) == (rank == 0)
    warned = found["failing"][0][1][0]
    assert warned.startswith("checkpoint: rank 1: ") and "step-00000002.rank-1-of-2.safetensors: could not" in warned
    assert warned.endswith("no room; training goes on, there is none yet")


def test_ctrl_c_ends_the_writes_of_all(found: dict[str, list[Any]]) -> None:
    for left in found["pressed"]:
        assert sorted(left) == [".lock", "metrics.jsonl"]


def test_a_directory_that_a_rank_does_not_see(found: dict[str, list[Any]]) -> None:
    for outcome in found["elsewhere"]:
        with pytest.raises(StorageError, match=r"expected a directory that all ranks see, .*rank 1 does not see"):
            raise outcome


def test_ranks_take_the_checkpoint_before_a_damaged_one(place: Path, found: dict[str, list[Any]]) -> None:
    for outcome in found["damaged"]:
        assert outcome["state"]["counter"].tolist() == [0, 2]
    assert sorted(path.name for path in (place / "damaged").glob("*.damaged")) == [
        f"{OTHER}.damaged",
        f"{NEWEST}.damaged",
    ]


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, f"{OTHER}: damaged, not there"),
    "short": (lambda file: file.write_bytes(file.read_bytes()[:100]), f"{OTHER}: damaged, not a checkpoint"),
    "changed": (change, f"{OTHER}: damaged, its tensors do not have the hash {NEWEST} states"),
    "of another step": (
        lambda file: shutil.copy(file.with_name(OTHER.replace("4", "2")), file),
        f"{OTHER}: damaged, of another",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_of_a_rank_that_is_not_whole(kept: Path, fault: str) -> None:
    """The checkpoint counts as damaged: the message names the file, and the previous checkpoint is used."""
    FAULTS[fault][0](kept / OTHER)
    with pytest.warns(UserWarning, match=rf"{FAULTS[fault][1]}.*; the one before is taken"):
        found = newest(kept)
    assert found is not None and found[1].step == 2


def test_files_of_ranks_go_with_their_checkpoint(kept: Path) -> None:
    prune(kept, 1)
    assert sorted(path.name for path in kept.glob("step-*")) == [OTHER, NEWEST]
    (kept / NEWEST).unlink()  # as if a process was killed before the checkpoint was complete
    sweep(kept)
    assert not list(kept.glob("step-*"))


def pieces(directory: Path, *parts: tuple[Tensor, list[int], list[int]]) -> Path:
    """A checkpoint whose files contain these parts of one tensor: values, shape, offset."""
    head = {"schema": 5, "step": 7, "seconds": 0.0, "trained": [], "fingerprint": {}, "values": {"told": 1}}
    hashes = [sha256_of_tensors({"a": tensor}) for tensor, *_ in parts[1:]]
    path = directory / "step-00000007.safetensors"
    for number, (tensor, shape, offset) in enumerate(parts):
        stated = {"a": {"shape": shape, "offset": offset}}
        file = path if number == 0 else path.with_name(f"{path.stem}.rank-{number}-of-{len(parts)}.safetensors")
        write(file, {"a": tensor}, head | {"parts": stated} | ({} if number else {"files": hashes}))
    return path


def test_parts_along_any_dimension(tmp_path: Path) -> None:
    whole = torch.randn(2, 5)
    path = pieces(tmp_path, (whole[:, 3:], [2, 5], [0, 3]), (whole[:, :3], [2, 5], [0, 0]))
    saved = read(path)[0]
    assert torch.equal(saved.state["a"], whole) and saved.state["told"] == 1 and saved.outline["a"].is_meta


@pytest.mark.parametrize(
    ("shape", "first", "second"),
    [
        ([2, 5], [0, 0], [0, 2]),  # values that two files have
        ([2, 6], [0, 0], [0, 3]),  # values that no file has
        ([2, 5], [0, 0], [1, 3]),
        ([2, 10**15], [0, 0], [0, 3]),  # too large to be allocated
        ([3, 5], [0, 0], [0, 3]),
        ([2, 5, 1], [0, 0, 0], [0, 3, 0]),
        ([2, -5], [0, 0], [0, 3]),
    ],
)
def test_parts_that_are_no_whole_are_refused(
    tmp_path: Path, shape: list[int], first: list[int], second: list[int]
) -> None:
    path = pieces(tmp_path, (torch.ones(2, 3), shape, first), (torch.ones(2, 2), shape, second))
    with pytest.raises(DamagedError, match=r"damaged, (the parts of a do not make up|not a checkpoint)"):
        read(path)


@pytest.mark.slow
def test_meshes(place: Path, tmp_path: Path) -> None:
    """Copies of the shards, columns, and one process: reading returns what was written."""
    (tmp_path / "2").symlink_to(place / "2")
    for count, scenario in ((4, sharded.hybrid), (2, sharded.columns), (1, sharded.on_one)):
        (tmp_path / "of").mkdir()
        processes.as_ranks(work, str(tmp_path / "of"), {"found": scenario}, count, count=count)
        told = [torch.load(tmp_path / "of" / f"{rank}.pt", weights_only=False)["found"] for rank in range(count)]
        shutil.rmtree(tmp_path / "of")
        for outcome in told:
            if isinstance(outcome, Exception):
                raise outcome
            assert_same(outcome[0], told[0][0])
            if scenario is sharded.on_one:
                assert outcome[1] == 4 and outcome[3] == 5
            else:
                assert_same(outcome[1], outcome[0])
        if scenario is sharded.hybrid:
            assert len(told[0][2:]) == 4 and [len(names) for names in told[0][2:]].count(0) == 2


@pytest.mark.slow
def test_a_rank_that_is_killed_while_it_writes(tmp_path: Path) -> None:
    """Such a checkpoint does not count: the run continues from the previous one."""
    ranks = [processes.begin(sharded.killed, rank, tmp_path) for rank in (0, 1)]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, -signal.SIGKILL]
    assert (tmp_path / "told.txt").read_text().startswith("FastdistillError: rank 1 has died or hangs")
    assert list(steps(tmp_path / "run")) == [2]
    assert list((tmp_path / "run").glob(".step-00000004.rank-1*.tmp"))
    run(tmp_path / "run", cut=False)
    assert list(steps(tmp_path / "run")) == [2, 4] and not list((tmp_path / "run").glob(".step*"))


def test_only_ranks_of_a_sharded_student_write_together() -> None:
    trainer = make(student=Uneven())
    assert not checkpoint.shared(trainer.student) and distributed.uncommon(trainer.student.gain) is None  # type: ignore[attr-defined]
    tensors, parts = checkpoint.cut(state_of(trainer.step, trainer.student))
    assert not parts and "student.gain" in tensors


def test_parts_along_several_dimensions_are_refused() -> None:
    twice = types.SimpleNamespace(placements=(Shard(0), Shard(1)))
    copied = types.SimpleNamespace(placements=(Replicate(), Shard(1)))
    assert distributed.uncommon(twice) == "a DTensor cut as (Shard(dim=0), Shard(dim=1)), not along one dimension"
    assert distributed.uncommon(copied) is None


def test_a_student_is_sharded_over_a_group_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match=r"shard: expected none without a process group .*, got one"):
        make(shard=lambda student: None)
