# SPDX-License-Identifier: Apache-2.0
"""Banks on disk: the batches equal those of banks in memory, whatever the disk does."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastdistill.data import stored
from fastdistill.data.encoded import Encodings
from fastdistill.data.staged import Batches
from fastdistill.data.stored import StoredRows
from fastdistill.diffusion.matching import match_table
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError, StorageError
from fastdistill.ops import output_match, use
from fastdistill.ops.noise_gather import Draw

N, M, T, BATCH, SEED = 11, 9, 40, 4, 2**40 + 3


def on_disk(path: Path, bank: Tensor) -> StoredRows:
    """A bank in two files; in the second, other bytes precede its rows."""
    path.mkdir(exist_ok=True)
    parts, cut = [], len(bank) // 2
    for rows, skipped in ((bank[:cut], 0), (bank[cut:], 13)):
        file = path / f"{len(list(path.iterdir()))}.bin"
        file.write_bytes(b"x" * skipped + rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        parts.append(stored.Part(file, skipped, len(rows)))
    return StoredRows(parts, bank.shape[1:], bank.dtype)


def banks() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    prompts = {
        "embeddings": torch.randn(M, 4, 6, generator=g).half(),
        "mask": torch.rand(M, 7, generator=g) < 0.5,
        "label": torch.arange(M) * 5,
    }
    return {"latents": torch.randn(N, 3, 5, generator=g), "latent_prompts": torch.arange(N) % 6, "prompts": prompts}


def encodings(prompts: dict[str, Tensor], batch: int = 3) -> Encodings:
    """An encoder whose texts are row numbers of these banks, which end with the null prompt."""

    def encode(texts: list[str]) -> dict[str, Tensor]:
        assert len(texts) <= batch and threading.current_thread().name.startswith("fastdistill-rows")
        return {name: bank[[int(text) for text in texts]] for name, bank in prompts.items()}

    null = {name: bank[-1:] for name, bank in prompts.items()}
    return Encodings([str(row) for row in range(M - 1)], encode, null, batch=batch)


def batches(given: dict[str, Any], **options: Any) -> Batches:
    device = given["latent_prompts"].device
    replace = (torch.linspace(0, 1, T, dtype=torch.float64) * 2**32).long().to(device)
    settings = {"batch": BATCH, "null_index": M - 1, "null_probability": 0.2, "target": True} | options
    return Batches(**given, coefficients=NoiseSchedule.cosine(T).coefficients().to(device), replace=replace, **settings)


def run(given: Batches, steps: Any, seed: int = SEED) -> list[tuple[Tensor, ...]]:
    drawn = []
    for step in steps:
        given.prepare(seed, step)
        draw = given(torch.tensor([seed, step], device=given.out.x_t.device))
        drawn.append(tuple(t.clone() for t in flat(draw)))
    given.close()
    return drawn


def flat(draw: Draw[Any]) -> list[Tensor]:
    return tree_leaves(tuple(draw))


def same(one: list[tuple[Tensor, ...]], two: list[tuple[Tensor, ...]]) -> bool:
    pairs = [pair for a, b in zip(one, two, strict=True) for pair in zip(a, b, strict=True)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def stage(given: dict[str, Any], path: Path, which: str) -> dict[str, Any]:
    if which in ("latents", "both"):
        given = given | {"latents": on_disk(path / "latents", given["latents"])}
    if which in ("prompts", "both"):
        given = given | {"prompts": tree_map(lambda bank: on_disk(path / f"{bank.dtype}", bank), given["prompts"])}
    if which.startswith("encoded"):
        given = given | {"prompts": encodings(given["prompts"]).banks()}
        given = stage(given, path, which.removeprefix("encoded").strip())
    if which == "one of the prompts":
        stays = given["prompts"]
        given = given | {"prompts": stays | {"embeddings": on_disk(path / "embeddings", stays["embeddings"])}}
    return given


@pytest.mark.parametrize("which", ["latents", "prompts", "both", "one of the prompts", "encoded", "encoded latents"])
@pytest.mark.parametrize("ahead", [1, 3])
def test_batches_are_those_of_banks_in_memory(tmp_path: Path, which: str, ahead: int) -> None:
    """Over several epochs, from any first step, forwards and backwards."""
    expected = run(batches(banks()), range(12))
    staged = batches(stage(banks(), tmp_path, which), ahead=ahead)
    assert same(run(staged, range(12)), expected)
    assert same(run(staged, [7, 8, 9]), expected[7:10])
    assert same(run(staged, [3, 2, 2, 9, 10, 0]), [expected[i] for i in (3, 2, 2, 9, 10, 0)])
    assert same(run(staged, [4, 5], seed=1), run(batches(banks()), [4, 5], seed=1))


def test_the_task_of_a_staged_batch_is_that_of_banks_in_memory(tmp_path: Path) -> None:
    """If the latents are not in memory, the task uses the target that the draw has stored."""
    losses = []
    for given in (banks(), stage(banks(), tmp_path, "latents")):
        drawn = batches(given, task=True, target=False)
        drawn.prepare(5, 3)
        counter = torch.tensor([5, 3])
        draw = drawn(counter)
        table = match_table(NoiseSchedule.cosine(T).coefficients())
        losses.append(output_match(draw.x_t, None, draw.timestep, table, task=drawn.task(draw, counter)).samples)
        drawn.close()
    assert torch.equal(*losses) and losses[0][:, 1].min() > 0


@pytest.mark.parametrize(
    "options",
    [{"with_replacement": True}, {"first_sample": 4, "global_batch": 12}, {"pool": 3}, {"null_index": 0}],
    ids=str,
)
def test_options_reach_both_draws(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = run(batches(banks(), **options), range(5))
    assert same(run(batches(stage(banks(), tmp_path, "both"), **options), range(5)), expected)


def test_a_slow_disk_is_waited_for_and_read_ahead_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(batches(banks()), range(6))
    read, seen = stored._read, []

    def slow(part: stored.Part, offset: int, target: memoryview) -> None:
        time.sleep(0.003)
        seen.append(threading.current_thread().name)
        read(part, offset, target)

    monkeypatch.setattr(stored, "_read", slow)
    staged = batches(stage(banks(), tmp_path, "latents"), ahead=2)
    staged.prepare(SEED, 0)
    draw = staged(torch.tensor([SEED, 0]))
    assert all(torch.equal(a, b) for a, b in zip(flat(draw), expected[0], strict=True))
    deadline = time.monotonic() + 10
    while len(seen) < 3 * BATCH and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(seen) == 3 * BATCH and {name.split("_")[0] for name in seen} == {"fastdistill-rows"}
    staged.close()
    assert same(run(staged, range(6)), expected)


def test_a_failing_read_is_an_error_of_its_step_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(batches(banks()), range(8))
    staged = batches(stage(banks(), tmp_path, "both"), ahead=1)
    given = run(staged, range(4))
    read = stored.os.preadv

    def broken(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(stored.os, "preadv", broken)
    with pytest.raises(StorageError, match=r"\.bin: could not be read: Input/output error"):
        staged.prepare(SEED, 4)
    with pytest.raises(InputError, match="counter: expected a step that was prepared, got none"):
        staged(torch.tensor([SEED, 4]))
    monkeypatch.setattr(stored.os, "preadv", read)
    assert same(given + run(staged, range(4, 8)), expected)


def test_files_that_are_gone_or_cut_short(tmp_path: Path) -> None:
    bank = on_disk(tmp_path / "bank", banks()["latents"])
    file = tmp_path / "bank" / "1.bin"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    assert torch.equal(bank[:10], banks()["latents"][:10])
    with pytest.raises(StorageError, match=r"1\.bin: damaged: it ends after \d+ bytes, in the middle of a row"):
        bank[10]
    file.unlink()
    with pytest.raises(StorageError, match=r"1\.bin: could not be read: No such file or directory"):
        run(batches(banks() | {"latents": bank}), range(3))


def test_nothing_runs_on_after_the_end(tmp_path: Path) -> None:
    def readers() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name.startswith("fastdistill-rows")]

    staged = batches(stage(banks(), tmp_path, "both"))
    staged.prepare(SEED, 0)
    assert readers()
    staged.close()
    staged.close()
    assert not readers()
    staged.prepare(SEED, 0)
    del staged
    gc.collect()
    deadline = time.monotonic() + 10
    while readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not readers()


def test_a_draw_that_was_not_prepared_is_refused(tmp_path: Path) -> None:
    staged = batches(stage(banks(), tmp_path, "latents"))
    with pytest.raises(InputError, match="counter: expected a step that was prepared, got none since the last draw"):
        staged(torch.tensor([SEED, 0]))
    staged.prepare(SEED, 5)
    with pytest.raises(InputError, match=rf"counter: expected the seed and step .* \[{SEED}, 5\], got \[{SEED}, 4\]"):
        staged(torch.tensor([SEED, 4]))
    staged.close()


def test_the_host_draws_with_its_own_kernel_whichever_is_forced(tmp_path: Path) -> None:
    expected = run(batches(banks()), range(2))
    with use("reference"):
        drawn = run(batches(stage(banks(), tmp_path, "both")), range(2))
    for one, two in zip(drawn, expected, strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=8e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("which", ["both", "encoded latents"])
def test_a_captured_draw_reads_what_is_prepared_before_each_replay(tmp_path: Path, which: str) -> None:
    expected = run(batches(tree_map(Tensor.cuda, banks())), range(12))
    given = banks()
    if which != "both":  # by an encoder on the GPU
        given["prompts"] = tree_map(Tensor.cuda, given["prompts"])
    given = stage(given, tmp_path, which)
    staged = batches(given | {"latent_prompts": given["latent_prompts"].cuda()}, ahead=2)
    assert same(run(staged, range(3)), expected[:3])
    counter = torch.tensor([SEED, 0], device="cuda")
    staged.prepare(SEED, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        draw = staged(counter)
    for step in range(12):
        staged.prepare(SEED, step)
        counter[1] = step
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(flat(draw), expected[step], strict=True)), step
    staged.close()


def test_memmap(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.float16).reshape(10, 2, 3)
    array = np.memmap(tmp_path / "bank.bin", np.float16, "w+", offset=32, shape=values.shape)
    array[:] = values
    array.flush()
    rows, tensor = StoredRows.of_memmap(array), torch.from_numpy(values)
    assert (rows.shape, rows.dtype, len(rows), rows.ndim) == (tensor.shape, tensor.dtype, 10, 3)
    index = torch.tensor([9, 0, 0, 4])
    for which in (index, slice(None), slice(2, 7), slice(1, 9, 3), slice(5, 5), 3):
        assert torch.equal(rows[which], tensor[which])
    with pytest.raises(InputError, match=r"row: expected 0 to 9, got 10"):
        rows[torch.tensor([10])]
    for wrong in (values, array.T, np.memmap(tmp_path / "bank.bin", "U1", "r", shape=4)):
        with pytest.raises(InputError, match="array: expected"):
            StoredRows.of_memmap(wrong)


def test_bad_input(tmp_path: Path) -> None:
    given = stage(banks(), tmp_path, "latents")
    with pytest.raises(InputError, match="ahead: expected at least 1, got 0"):
        batches(given, ahead=0)
    wrong: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"latents": [1.0]}, {}, r"latents: expected rows: a tensor, .*, got \[1.0\]"),
        ({"prompts": None}, {}, r"prompts\[0\]: expected rows"),
        ({}, {"batch": 2.5}, r"batch: expected a whole number, got 2.5"),
        ({}, {"ahead": True}, r"ahead: expected a whole number, got True"),
        ({}, {"target": "no"}, r"target: expected True or False, got 'no'"),
        ({}, {"dtype": torch.int32}, r"dtype: expected "),
    ]
    for tables, options, message in wrong:
        with pytest.raises(InputError, match=message):
            batches(given | tables, **options)
    with pytest.raises(InputError, match=r"prompts: expected banks of as many rows, got \[9, 8\]"):
        batches(given | {"prompts": [torch.ones(9), torch.ones(8)]})
    for banks_ in (given, banks()):  # on the disk, in memory
        for row in (99, -1):
            outside = banks_ | {"latent_prompts": (torch.arange(N) % 9).index_fill(0, torch.tensor(3), row)}
            with pytest.raises(InputError, match=rf"latent_prompts\[3\]: expected a row of prompts, 0 to 8, got {row}"):
                batches(outside)
