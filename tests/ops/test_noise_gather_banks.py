# SPDX-License-Identifier: Apache-2.0
"""Banks of noise_gather: several banks of any dtype, staged banks, and banks in host memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from fastdistill.errors import InputError, KernelError
from fastdistill.ops import empty_draw, noise_gather, use
from fastdistill.ops.noise_gather.banks import check_host_memory
from tests.harness import check_op, device_of, emulated, generator
from tests.ops.test_noise_gather import KERNELS, banks, case_of, flat


def several() -> dict[str, Tensor]:
    """Nine rows each: embeddings, SDXL's pooled embeddings and time ids, masks and labels; also with odd row sizes."""
    g = generator(3)
    return {
        "mask": torch.rand((9, 7), generator=g) < 0.5,
        "embeddings": torch.randn((9, 4, 6), generator=g).half(),
        "pooled": torch.randn((9, 20), generator=g),
        "time_ids": torch.arange(54.0).view(9, 6),
        "label": torch.arange(9) * 3 - 2**40,
        "byte": torch.arange(9, dtype=torch.uint8).view(9, 1),
        "three": torch.arange(27, dtype=torch.int8).view(9, 3),
    }


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("structure", [dict, list, tuple])
def test_several_banks_in_any_structure(kernel: str, structure: Any) -> None:
    latents, own, _, *rest = banks((4, 4))
    prompts = several() if structure is dict else structure(several().values())
    check_op(case_of((latents, own, prompts, *rest), 5), kernel, registration=structure is list)
    with use(kernel):
        draw = noise_gather(latents, own, prompts, *rest, batch=5, null_index=8)
        assert type(draw.prompt) is structure
        again = noise_gather(latents, own, prompts, *rest, out=draw, null_index=8)
    assert again is draw and tree_structure(draw.prompt) == tree_structure(prompts)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", several())
def test_each_bank_alone_and_first_or_last_beside_a_large_one(kernel: str, name: str) -> None:
    """Labels [M] are a bank too; the division into pieces does not depend on which bank is the largest."""
    latents, own, _, *rest = banks((4, 4))
    large, bank = (
        torch.arange(9 * (9_000 if emulated(kernel) else 40_000), dtype=torch.int32).view(9, -1),
        several()[name],
    )
    for prompts in (bank, [bank, large], [large, bank]):
        with use(kernel):
            draw = noise_gather(latents, own, prompts, *rest, batch=3, null_index=8)
        row = draw.prompt_index
        expected = tree_map(lambda b, row=row: b[row], prompts)
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(draw.prompt), tree_leaves(expected), strict=True))


def test_more_banks_than_a_kernel_takes() -> None:
    latents, own, prompts, *rest = banks((4, 4))
    draw = noise_gather(latents, own, [prompts] * 9, *rest, batch=3, null_index=8)
    assert all(torch.equal(out, prompts[draw.prompt_index]) for out in draw.prompt)
    for kernel in set(KERNELS) - {"reference"}:
        with use(kernel), pytest.raises(KernelError, match="9 banks of prompts are more than 8"):
            noise_gather(latents, own, [prompts] * 9, *rest, batch=3, null_index=8)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("staged", ["latents", "prompts", "both"])
def test_a_ring_of_staged_rows_draws_what_the_bank_does(kernel: str, staged: str) -> None:
    """The ring contains the rows of one step at their places; the other rows are NaN and must not be read."""
    latents, own, _, *tables, counter = banks((3, 5))
    prompts, batch = several(), 3
    for step, turns in ((0, 1), (7, 4), (11, 2), (-3, 4)):
        counter[1] = step
        with use(kernel):
            expected = noise_gather(latents, own, prompts, *tables, counter, batch=batch, null_index=8, pool=8)

        def ring(bank: Tensor, index: Tensor, turns: int = turns, at: int = step % turns * batch) -> Tensor:
            rows = torch.empty((turns * batch, *bank.shape[1:]), dtype=bank.dtype)
            rows.view(torch.uint8).fill_(0xFF) if bank.dtype != torch.bool else rows.fill_(True)
            rows[at : at + batch] = bank[index]
            return rows

        at = ring(latents, expected.latent_index), {n: ring(p, expected.prompt_index) for n, p in prompts.items()}
        banks_given = at[0] if staged != "prompts" else latents, own, at[1] if staged != "latents" else prompts
        rows = {"latent_rows": 11 * (staged != "prompts"), "prompt_rows": 9 * (staged != "latents")}
        with use(kernel):
            draw = noise_gather(*banks_given, *tables, counter, batch=batch, null_index=8, pool=8, **rows)
        assert all(torch.equal(a, b) for a, b in zip(flat(draw), flat(expected), strict=True))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({2: torch.ones(())}, {}, r"prompts: expected \[M, ...\] with at least one row, got \(\)"),
        ({2: None}, {}, "prompts: expected a tensor, got NoneType"),
        ({2: {"text": [1.0]}}, {}, r"prompts\['text'\]: expected a tensor, got list"),
        ({2: []}, {}, "prompts: expected at least one bank, got none"),
        ({2: [torch.ones(9), torch.ones(8)]}, {}, r"prompts\[1\]: expected as many rows as prompts\[0\] \(9\), got 8"),
        (
            {2: {"text": torch.ones(9), "mask": torch.ones(0, 2)}},
            {},
            r"prompts\['mask'\]: expected \[M, ...\] with at least one row, got \(0, 2\)",
        ),
        ({}, {"latent_rows": 11}, r"latents: expected a ring of whole batches, \[R \* 4, ...\], got \(11, 3, 5, 7\)"),
        ({}, {"prompt_rows": 11}, r"prompts: expected a ring of whole batches, \[R \* 4, ...\], got \(9, 4, 6\)"),
        ({}, {"latent_rows": -1}, r"latent_rows: expected 1 to 2\*\*32, the rows of a bank, got -1"),
    ],
)
def test_bad_banks(change: dict[int, Any], options: dict[str, Any], message: str) -> None:
    inputs = [change.get(i, t) for i, t in enumerate(banks())]
    with pytest.raises(InputError, match=message):
        noise_gather(*inputs, **({"batch": 4, "null_index": 8} | options))


def test_buffers_of_another_structure() -> None:
    latents, own, prompts, *rest = banks()
    with pytest.raises(InputError, match=r"out.prompt: expected a buffer for each of prompts\[0\], got prompt$"):
        noise_gather(latents, own, [prompts], *rest, null_index=8, out=empty_draw(latents, prompts, 4))


def test_banks_in_host_memory_beside_a_gpu() -> None:
    """Fake tensors follow the GPU's path; memory that is not pinned is refused before anything is launched."""
    latents, own, prompts, *rest = banks()
    with FakeTensorMode():
        tables = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in (own, *rest)]
        draw = noise_gather(
            torch.empty(latents.shape), tables[0], [torch.empty(prompts.shape)], *tables[1:], batch=4, null_index=8
        )
        assert {t.device.type for t in flat(draw)} == {"cuda"}
    with pytest.raises(
        InputError, match=r"prompts: expected memory .* \(cuda\) or pinned host memory .*, got host memory"
    ):
        check_host_memory({"prompts": prompts}, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [k for k in KERNELS if device_of(k) == "cuda"])
def test_pinned_banks_are_read_by_the_gpu(kernel: str) -> None:
    latents, own, _, *rest = banks()
    host, prompts = latents.cpu().pin_memory(), tree_map(lambda bank: bank.cpu().pin_memory(), several())
    with use(kernel):
        expected = noise_gather(latents, own, several(), *rest, batch=6, null_index=8)
        draw = noise_gather(host, own, prompts, *rest, batch=6, null_index=8)
    assert all(torch.equal(a, b) for a, b in zip(flat(draw), flat(expected), strict=True))
    with pytest.raises(InputError, match="latents: expected memory of the device of counter"):
        noise_gather(latents.cpu(), own, prompts, *rest, batch=6, null_index=8)
