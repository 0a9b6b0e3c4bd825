# SPDX-License-Identifier: Apache-2.0
"""Values of banks: casts without overflow, finite values, independence of torch's defaults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdistill.data import values
from fastdistill.data.latent_cache import LatentCache, generate_latent_cache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.data.stored import StoredRows
from fastdistill.diffusion.sampler import initial_noise
from fastdistill.errors import InputError
from fastdistill.tasks.digits import text_encoder

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROW = 5


def rows(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """8 rows, one of which has this value."""
    made = torch.zeros(8, 2, 3, dtype=dtype)
    made[ROW, 1, 2] = value
    return made


def texts(n: int = 7) -> list[str]:
    return [f"prompt {i}" for i in range(n)]


@pytest.mark.parametrize(
    ("value", "source", "target"),
    [
        (1e5, torch.float32, torch.float16), (-1e5, torch.float32, torch.float16), (1e39, torch.float64, torch.float32),
        (1e39, torch.float64, torch.bfloat16), (65536.0, torch.bfloat16, torch.float16), (1000.0, torch.float32, E4M3),
        (-500.0, torch.float16, E4M3), (6e4, torch.float32, E5M2), (float("nan"), torch.float32, torch.float16),
        (float("inf"), torch.float32, torch.float64), (float("nan"), E4M3, torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_a_cast_that_loses_values_names_the_row(value: float, source: torch.dtype, target: torch.dtype) -> None:
    rule = r"latents: expected finite values within \+-.*, got others in row 25"
    with pytest.raises(InputError, match=rule):
        values.cast(rows(value, source), target, "latents", first=20)


@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.bfloat16, torch.float16, E4M3, E5M2])
def test_a_cast_that_fits(target: torch.dtype) -> None:
    for value in (torch.finfo(target).max, -torch.finfo(target).max, torch.finfo(target).tiny, 0.0):
        given = rows(value, torch.float64)
        assert torch.equal(values.cast(given, target, "latents").double(), given)
    assert values.cast(torch.empty(0, 3), target, "latents").shape == (0, 3)


def test_a_cache_or_bank_that_does_not_fit_the_dtype_is_not_loaded(tmp_path: Path) -> None:
    generate_latent_cache(
        tmp_path / "latents", lambda r, _: rows(1e5)[r], torch.zeros(8, dtype=torch.int64), (2, 3), torch.float32, {},
        rows_per_shard=3,
    )  # fmt: skip
    bank = PromptBank(rows(-1e5), texts())
    bank.save(tmp_path / "prompts", rows_per_shard=3)
    for dtype in (torch.float16, E4M3):
        with pytest.raises(InputError, match=rf"latents: expected finite values within .*{dtype}.* row {ROW}"):
            LatentCache.load(tmp_path / "latents", dtype=dtype)
        with pytest.raises(InputError, match=rf"embeddings: expected finite values within .* row {ROW}"):
            PromptBank.load(tmp_path / "prompts", dtype=dtype)
        for banks in (bank, PromptBank.open(tmp_path / "prompts")):
            with pytest.raises(InputError, match=rf"embeddings: expected finite values within .* row {ROW}"):
                banks.to(dtype=dtype)
    assert LatentCache.load(tmp_path / "latents", dtype=torch.bfloat16).latents.dtype == torch.bfloat16
    for wrong in (torch.int32, "float16"):
        with pytest.raises(InputError, match=r"dtype: expected a (floating-point type|dtype of torch)"):
            LatentCache.load(tmp_path / "latents", dtype=wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"dtype: expected a (floating-point type|dtype of torch)"):
            bank.to(dtype=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="device: expected a device"):
        bank.to(torch.float16)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, E5M2])
def test_values_that_are_not_finite_are_refused(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    index = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(InputError, match=rf"latents: expected finite values, got others in row {ROW}"):
        LatentCache(rows(value, dtype), index)
    with pytest.raises(InputError, match=rf"embeddings: expected finite values, got others in row {ROW}"):
        PromptBank(rows(value, dtype), texts())
    if dtype == torch.float32:  # banks on disk are checked on request
        np.save(tmp_path / "bank.npy", rows(value).numpy())
        stored = StoredRows.of_memmap(np.load(tmp_path / "bank.npy", mmap_mode="r"))
        for bank in (LatentCache(stored, index), PromptBank(stored, texts())):
            with pytest.raises(InputError, match=rf"expected finite values, got others in row {ROW}"):
                bank.check_finite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, E4M3, E5M2])
def test_banks_of_every_dtype_that_files_hold(dtype: torch.dtype, tmp_path: Path) -> None:
    embeddings = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    bank = PromptBank.build(texts(), lambda t: embeddings[: len(t)], batch=8)
    bank.save(tmp_path)
    for read in (PromptBank.load(tmp_path), PromptBank.open(tmp_path)):
        assert read.embeddings.dtype == dtype and read.identity == bank.identity
        assert torch.equal(read.embeddings[:].double(), embeddings.double())
    assert PromptBank.load(tmp_path, dtype=torch.float64).embeddings.dtype == torch.float64


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (np.zeros((3, 2, 2), np.float32), "a NumPy array"), ([[0.0]], "list"), (None, "NoneType"),
        (torch.zeros(3, 2, 2, dtype=torch.int64), "torch.int64"),
        (torch.zeros(3, 2, 2).to(torch.float8_e8m0fnu), "e8m0"),
    ],
)  # fmt: skip
def test_what_is_not_a_bank_is_refused(wrong: Any, got: str) -> None:
    with pytest.raises(InputError, match=f"latents: expected a .*, got .*{got}"):
        LatentCache(wrong, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match=f"embeddings: expected a .*, got .*{got}"):
        PromptBank(wrong, ["a", "b"])
    with pytest.raises(InputError, match="prompt_index: expected a tensor with values, got list"):
        LatentCache(torch.zeros(3, 2), [0, 0, 0])  # type: ignore[arg-type]


@pytest.fixture(params=["meta", torch.float64], ids=str)
def defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    device = request.param if isinstance(request.param, str) else "cpu"
    before = torch.get_default_dtype()
    try:
        torch.set_default_device(device)
        torch.set_default_dtype(request.param if isinstance(request.param, torch.dtype) else before)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@pytest.mark.usefixtures("defaults")
def test_torchs_defaults_change_nothing(tmp_path: Path) -> None:
    """Another default device than the CPU ("meta" stands for any), float64 as the default dtype."""
    cpu, f32 = torch.device("cpu"), torch.float32
    index = torch.arange(6, device=cpu) % 2
    generate_latent_cache(
        tmp_path / "c",
        lambda r, p: initial_noise(0, r, (4, 3)) + p[:, None, None],
        index,
        (4, 3),
        f32,
        {"x": 1},
        batch=4,
    )
    embedded = torch.arange(24, device=cpu, dtype=f32).reshape(3, 2, 4)
    bank = PromptBank.build(["a", "b"], lambda t: embedded[: len(t)], batch=3)
    bank.save(tmp_path / "p", rows_per_shard=2)
    for cache in (LatentCache.load(tmp_path / "c"), LatentCache.open(tmp_path / "c")):
        latents = cache.latents
        for read in (latents[:], latents[1], latents[[0, 2]], latents[index], latents[::2], latents[..., 0]):
            assert read.device == cpu and read.dtype == f32 and read.isfinite().all()
        assert cache.prompt_index.device == cpu and cache.identity
        cache.check_finite()
        cache.check_prompts(2)
    for loaded in (PromptBank.load(tmp_path / "p"), PromptBank.open(tmp_path / "p")):
        assert torch.equal(loaded.embeddings[:], embedded) and torch.equal(loaded.null, embedded[2])
        assert loaded.indices_of(["b"]).tolist() == [1] and torch.equal(loaded.subset(["b"]).null, embedded[2])
        assert loaded.to(dtype=torch.float16).embeddings.device == cpu and loaded.to("cpu").embeddings.dtype == f32
        assert loaded.identity == bank.identity
    text_encoder._weights.cache_clear()
    encoded = text_encoder.encode(["a red seven"])
    text_encoder._weights.cache_clear()
    assert encoded.device == cpu and encoded.dtype == f32 and text_encoder.prompt_bank().embeddings.device == cpu
