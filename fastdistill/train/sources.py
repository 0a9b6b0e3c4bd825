# SPDX-License-Identifier: Apache-2.0
"""Sources of a run: what identifies them on any machine, whether they belong together, whether they are finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data.fingerprint import (
    dtype_name,
    hashes,
    identity_of,
    sha256_of_json,
    sha256_of_tensors,
    weights_hash,
)
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.data.staged import Rows
from fastdistill.errors import InputError

_PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
_CHUNK = 2**24  # elements looked at together


def latents_identity(latents: LatentCache) -> dict[str, Any]:
    """What made a cache; of one that does not tell, the hash of what it holds."""
    if latents.fingerprint:
        return dict(latents.fingerprint)
    parts = [sha256_of_tensors({"latents": rows}) for _, rows in _chunks(latents.latents)]
    return {"sha256": sha256_of_json([parts, sha256_of_tensors({"prompt_index": latents.prompt_index})])}


def check_sources(latents: LatentCache, prompts: PromptBank, teacher: nn.Module, weights: str) -> None:
    """Compare what a cache says of its prompts and its teacher, if it holds their hashes, with the ones given.

    ``weights``: ``weights_hash`` of the teacher.

    Raises:
        InputError: the cache points into another bank, or into this one in another order; or another teacher made it.
            One that made it in a lower precision than it has now is recognized, in a higher precision it is not.
    """
    told, bank = latents.fingerprint.get("prompts"), identity_of(prompts)
    if hashes(told, bank) and told != bank:
        rule = f"the bank {told} that the latents point into (LatentCache.remapped makes them point into another one)"
        raise InputError.of("prompts", rule, bank)
    told = latents.fingerprint.get("teacher")
    if not hashes(told, weights) or told == weights:
        return
    if all(told != weights_hash(teacher, dtype) for dtype in _PRECISIONS):
        rule = f"the model {told} that made the latents, in no lower precision than then"
        advice = "LatentCache(latents.latents, latents.prompt_index) makes no such claim"
        raise InputError.of("teacher", rule, f"{weights} ({advice})")


def explain(banks: Mapping[str, Rows], teacher: nn.Module, student: nn.Module) -> str:
    """The likely cause of a loss that is not finite. Reads all rows of the banks, until one is not finite."""
    for name, rows in banks.items():
        for dtype in {p.dtype for model in (teacher, student) for p in model.parameters() if p.dtype in _PRECISIONS}:
            if (row := _not_finite(rows, dtype)) is not None:
                cast = f" as {dtype_name(dtype)}" if rows[row : row + 1].isfinite().all() else ""
                return f"row {row} of {name} is not finite{cast}"
    for name, parameter in teacher.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            return f"the teacher's {name} is not finite"
    return "latents, prompts and the teacher's weights are finite: a lower learning rate or more warm-up usually helps"


def _not_finite(rows: Rows, dtype: torch.dtype) -> int | None:
    """The first row that holds something else than finite numbers once it is cast."""
    for start, part in _chunks(rows):
        finite = part.to(dtype).isfinite().flatten(1).all(1)
        if not finite.all():
            return start + int(finite.int().argmin())
    return None


def _chunks(rows: Rows) -> Iterator[tuple[int, Tensor]]:
    """Rows in parts that fit into memory, each with the number of its first row."""
    count = max(1, _CHUNK // max(1, rows.shape[1:].numel()))
    for start in range(0, len(rows), count):
        yield start, rows[start : start + count]
