# SPDX-License-Identifier: Apache-2.0
"""Writes prompt banks while they are encoded, for pools whose encodings do not fit into the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.data import prompt_bank as banks
from fastdistill.data.encoded import Begun, Encode
from fastdistill.data.manifest import TensorSpec
from fastdistill.data.shards import RowWriter

_SHARD = 2**27  # bytes of a shard, if the number of its rows is not given


def build_prompt_bank(
    path: str | Path,
    texts: Iterable[str],
    encode: Encode,
    *,
    encoder: Mapping[str, Any],
    null_text: str = "",
    encode_null: Callable[[str], Tensor | Mapping[str, Tensor]] | None = None,
    dtype: torch.dtype | None = None,
    batch: int = 64,
    rows_per_shard: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Writes the bank that ``PromptBank.build`` makes to the directory ``path`` as it is encoded, or continues it.

    Memory holds one shard at a time. Batches begin at each shard, and the null prompt is encoded first and separately,
    so an interrupted bank gets the same bits. Processes that make the same call at the same time share the shards, and
    all return when the bank is complete.

    Args:
        encoder: fingerprint of the text encoder; only it shows whether existing rows are from the same encoder.
        dtype: floating-point encodings are stored as this; None: as they are.
        rows_per_shard: None: as many as fit into 128 MiB, at most 4096.
        progress: ``progress(rows done, M + 1)``, at the start and after each batch.
        Other arguments are those of ``PromptBank.build``.

    Raises:
        InputError: arguments that ``PromptBank.build`` refuses; no ``encoder``; an encoding out of the range of
            ``dtype``.
        StorageError: those of RowWriter, before anything is written; a full disk.
    """
    begun = Begun.of(texts, encode, encoder, null_text, encode_null, batch, dtype)
    pool, fingerprint, last = begun.pool, begun.fingerprint, begun.stored_null
    specs = {banks.stored_name(name): TensorSpec(tuple(row.shape[1:]), row.dtype) for name, row in last.items()}
    if rows_per_shard is None:
        rows_per_shard = min(4096, max(1, _SHARD // max(1, sum(spec.row_bytes for spec in specs.values()))))
    shapes = {name: spec.shape for name, spec in specs.items()}
    total = len(pool) + 1
    report = progress or (lambda done, total: None)
    with RowWriter(
        path,
        kind=banks.KIND,
        fingerprint={"encoder": fingerprint, "identity": banks.identity_of(pool, null_text, fingerprint, shapes)},
        rows=total,
        tensors=specs,
        rows_per_shard=rows_per_shard,
        attachments=banks.attachments(pool, null_text),
    ) as writer:
        report(writer.rows_done, total)
        for span in writer.claims(lambda: report(writer.rows_done, total)):
            done, rows = writer.rows_done, span.stop - span.start
            shard = {
                name: torch.empty((rows, *row.shape[1:]), dtype=row.dtype, device="cpu") for name, row in last.items()
            }
            for start in range(span.start, min(span.stop, len(pool)), batch):
                part = pool[start : min(start + batch, span.stop)]
                at = start - span.start
                for name, bank in begun.encoded(part).items():
                    shard[name][at : at + len(part)] = bank
                if start + len(part) < min(span.stop, len(pool)):
                    report(done + at + len(part), total)
            if span.stop == total:
                for name, row in last.items():
                    shard[name][-1:] = row
            writer.write(span, {banks.stored_name(name): bank for name, bank in shard.items()})
            report(writer.rows_done, total)
