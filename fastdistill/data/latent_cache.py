# SPDX-License-Identifier: Apache-2.0
"""The latent cache: samples of the teacher for few prompts, the data of image-free distillation (arXiv 2504.02011)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fastdistill.data import values
from fastdistill.data.fingerprint import differences, hashes, listed, plain, sha256_of_json, sha256_of_tensors
from fastdistill.data.manifest import Manifest, TensorSpec
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.data.shards import RowWriter, load_rows
from fastdistill.data.stored import open_rows
from fastdistill.errors import InputError, StorageError


@dataclass(frozen=True, eq=False)
class LatentCache:
    """Latents and the prompt of each.

    latents: [N, *S], scaled as for the model. prompt_index: [N] int64, the row of the prompt bank for each latent.
    fingerprint: the origin of the latents (JSON values).

    Raises:
        InputError: different lengths or wrong dtypes; a value that is not finite (checked in memory; for a cache on
            disk call ``check_finite``).
    """

    kind: ClassVar[str] = "latent_cache"
    columns: ClassVar[tuple[str, ...]] = ()  # additional tensors

    latents: Any  # Tensor, or StoredRows of an opened cache
    prompt_index: Tensor
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values.require_bank(self.latents, "latents")
        if self.latents.ndim < 2:
            got = f"{self.latents.dtype} {tuple(self.latents.shape)}"
            raise InputError.of("latents", "a floating-point tensor [N, ...]", got)
        _check_prompt_index(self.prompt_index, len(self.latents))
        object.__setattr__(self, "fingerprint", _plain(self.fingerprint))
        if values.has_values(self.latents):
            self.check_finite()

    def __len__(self) -> int:
        return len(self.latents)

    @cached_property
    def identity(self) -> str:
        """A hash that identifies the cache in fingerprints of results made from it, the same on every machine.

        It is a hash of the cache's fingerprint, or if there is none, of its values; a cache on disk is then read once.
        """
        if self.fingerprint:
            return sha256_of_json(self.fingerprint)
        return sha256_of_tensors({"latents": self.latents, "prompt_index": self.prompt_index})

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        expect: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        verify: bool = True,
    ) -> Self:
        """Load the cache of a directory, its latents as ``dtype`` (None: as stored).

        ``expect`` has the required values of some fields of the fingerprint, such as ``{"teacher": sha256}``: a cache
        of another teacher is refused with both values (StorageError), before its latents are read. StorageError also
        for directories that are missing or unfinished, and for shards (named) that are missing or damaged;
        ``verify=False`` skips the checksums. InputError if a latent is out of the range of ``dtype``.
        """
        check = _as_expected(path, expect)
        manifest, rows = load_rows(path, kind=cls.kind, device=device, dtype=dtype, verify=verify, check=check)
        others = {name: rows[name] for name in cls.columns}
        return cls(rows["latents"], rows["prompt_index"], manifest.fingerprint, **others)

    @classmethod
    def open(cls, path: str | Path, *, expect: Mapping[str, Any] | None = None, verify: bool = True) -> Self:
        """Like ``load``, but the latents stay on disk (``StoredRows``), for a cache larger than the memory.

        ``verify`` reads the whole cache once.
        """
        manifest, rows = open_rows(path, kind=cls.kind, verify=verify, check=_as_expected(path, expect))
        others = {name: rows[name][:] for name in cls.columns}
        return cls(rows["latents"], rows["prompt_index"][:], manifest.fingerprint, **others)

    def remapped(self, made_with: PromptBank, prompts: PromptBank) -> Self:
        """The same latents for another bank that contains their prompts: a larger pool, or one in another order.

        Args:
            made_with: the bank that the rows of this cache refer to. prompts: the bank that they will refer to, by
                equal texts.

        Raises:
            InputError: this cache refers to another bank than ``made_with``; ``prompts`` lacks one of its texts, or is
                from another text encoder (if both banks have its fingerprint).
        """
        told, own = self.fingerprint.get("prompts"), made_with.identity
        if hashes(told, own) and told != own:
            raise InputError.of("made_with", f"the bank {told} that the latents point into", own)
        self.check_prompts(len(made_with))
        changed = differences(plain(made_with.encoder), plain(prompts.encoder))
        if changed and made_with.encoder and prompts.encoder:
            raise InputError.of("prompts", "the text encoder of made_with", listed(changed))
        used, place = torch.unique(self.prompt_index, return_inverse=True)
        rows = prompts.indices_of([made_with.texts[row] for row in used.tolist()]).to(place.device)
        fingerprint = {**self.fingerprint, "prompts": prompts.identity, "made_with": own} if self.fingerprint else {}
        return replace(self, prompt_index=rows[place], fingerprint=fingerprint)

    def check_prompts(self, prompts: int) -> None:
        """InputError unless every row refers to one of ``prompts`` prompts (``len`` of the prompt bank)."""
        for row in map(int, self.prompt_index.aminmax()):
            if not 0 <= row < prompts:
                raise InputError.of("prompt_index", f"rows of a bank of {prompts} prompts", f"row {row}")

    def check_finite(self) -> None:
        """InputError, naming the row, if a value is not finite; a cache on disk is read in blocks."""
        values.check_finite(self.latents, "latents")


def generate_latent_cache(
    path: str | Path,
    generate: Callable[[Tensor, Tensor], Tensor],
    prompt_index: Tensor,
    row_shape: Sequence[int],
    dtype: torch.dtype,
    fingerprint: Mapping[str, Any],
    *,
    rows_per_shard: int = 1024,
    batch: int = 64,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Writes a cache of N = len(prompt_index) latents to the directory ``path``, or continues an unfinished one.

    ``generate(rows, prompt_index[rows])``, both int64 [b] on the CPU and b <= batch, returns latents [b, *row_shape]
    on any device, stored as ``dtype``. Latent n must depend only on n and its prompt (use ``initial_noise`` of
    ``diffusion.sampler``): batches begin at each shard, so an interrupted run that is resumed with the same ``batch``
    gives the same bits; with another ``batch`` only the rounding may differ.
    ``fingerprint`` must contain all other inputs that affect the values, such as ``{"teacher": weights_hash(teacher),
    "prompts": bank.identity, "sampling": ..., "seed": 0}`` (``fastdistill.models.weights.weights_hash``): a
    trainer compares the first two with its own teacher and bank. A hash of ``prompt_index`` is added to it.
    ``progress(rows done, N)`` is called at the start and after each batch.

    Processes that make the same call at the same time (the ranks of ``torchrun``, or any that can access ``path``)
    share the shards, and all return when the cache is complete. The bytes are those of a single process.

    Errors: those of RowWriter, before anything is written; InputError if ``generate`` returns another shape or a value
    that is not finite as ``dtype``; StorageError for a full disk. Finished shards stay, and the next call continues
    after them.
    """
    _check_prompt_index(prompt_index)
    rows = len(prompt_index)
    if batch < 1:
        raise InputError.of("batch", "at least 1", batch)
    values.require_dtype(dtype, "dtype")
    made_from = _plain(fingerprint)
    prompt_index = prompt_index.cpu()
    report = progress or (lambda done, total: None)
    shape = tuple(row_shape)
    with RowWriter(
        path,
        kind=LatentCache.kind,
        fingerprint={**made_from, "prompt_index": sha256_of_tensors({"prompt_index": prompt_index})},
        rows=rows,
        tensors={"latents": TensorSpec(shape, dtype), "prompt_index": TensorSpec((), torch.int64)},
        rows_per_shard=rows_per_shard,
    ) as writer:
        report(writer.rows_done, rows)
        for span in writer.claims(lambda: report(writer.rows_done, rows)):
            done = writer.rows_done
            latents = torch.empty((span.stop - span.start, *shape), dtype=dtype, device="cpu")
            for start in range(span.start, span.stop, batch):
                numbers = torch.arange(start, min(start + batch, span.stop), device="cpu")
                with torch.no_grad():
                    made = generate(numbers, prompt_index[numbers])
                latents[start - span.start :][: len(numbers)] = _checked(made, shape, dtype, numbers)
                if start + len(numbers) < span.stop:
                    report(done + start + len(numbers) - span.start, rows)
            writer.write(span, {"latents": latents, "prompt_index": prompt_index[span.start : span.stop]})
            report(writer.rows_done, rows)


def _as_expected(path: str | Path, expect: Mapping[str, Any] | None) -> Callable[[Manifest], None]:
    wanted = plain(expect or {}, "expect")

    def check(manifest: Manifest) -> None:
        found = manifest.fingerprint
        changed = differences(wanted, {key: found[key] for key in wanted if key in found})
        if changed:
            raise StorageError(
                f"{path}: this cache was made differently ({'; '.join(changed)}); make one in an empty directory"
            )

    return check


def _plain(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(fingerprint, Mapping):
        raise InputError.of("fingerprint", "a mapping of JSON values", type(fingerprint).__name__)
    return plain(fingerprint)


def _check_prompt_index(prompt_index: Tensor, rows: int | None = None) -> None:
    """``rows``: the number of latents; None: any number."""
    if not isinstance(prompt_index, Tensor) or prompt_index.is_meta:
        got = "one on the meta device" if isinstance(prompt_index, Tensor) else type(prompt_index).__name__
        raise InputError.of("prompt_index", "a tensor with values", got)
    if prompt_index.layout is not torch.strided:
        raise InputError.of("prompt_index", "a dense tensor", prompt_index.layout)
    many = prompt_index.numel() if rows is None else rows
    if prompt_index.dtype != torch.int64 or tuple(prompt_index.shape) != (many,) or many == 0:
        got = f"{prompt_index.dtype} {tuple(prompt_index.shape)}"
        raise InputError.of("prompt_index", f"torch.int64 ({many or 'N'},), at least one row", got)
    if int(prompt_index.min()) < 0:
        raise InputError.of("prompt_index", "rows of the prompt bank, from 0", int(prompt_index.min()))


def _checked(made: Any, shape: tuple[int, ...], dtype: torch.dtype, numbers: Tensor) -> Tensor:
    argument, wanted = "generate(rows, prompt_index)", (len(numbers), *shape)
    latents = values.as_tensor(made, argument, f"latents {wanted}").cpu()
    if tuple(latents.shape) != wanted:
        raise InputError.of(argument, f"latents of shape {wanted}", tuple(latents.shape))
    row = values.misfit(latents, dtype)
    if row is not None:
        rule = f"latents that are finite as {dtype}"
        raise InputError.of(argument, rule, f"row {int(numbers[row])} with others")
    return latents.to(dtype)
