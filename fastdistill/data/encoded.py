# SPDX-License-Identifier: Apache-2.0
"""Prompts that are encoded in parts: to be stored, or, if a pool is too large to store, whenever they are read."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdistill.data import texts as prompt_texts
from fastdistill.data import values
from fastdistill.data.fingerprint import plain
from fastdistill.data.indexing import split
from fastdistill.errors import InputError
from fastdistill.ops.noise_gather.banks import mapped

EMBEDDINGS = "encoder_hidden_states"  # the bank's name if there is only one tensor of embeddings
Encode = Callable[[list[str]], Tensor | Mapping[str, Tensor]]


class Encodings:
    """The text encoder's output for M texts and, last, the null prompt; only the null prompt's rows are kept in memory.

    encode: maps b <= ``batch`` texts to rows [b, ...] by bank, with the shapes and dtypes of ``null`` [1, ...]. It is
    called by one thread at a time, because tokenizers have state.
    """

    def __init__(
        self,
        texts: Sequence[str],
        encode: Callable[[list[str]], Mapping[str, Tensor]],
        null: Mapping[str, Tensor],
        *,
        batch: int = 64,
    ) -> None:
        self.null = dict(null)
        self._texts, self._encode, self._batch = texts, encode, batch
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._texts) + 1

    def banks(self) -> dict[str, EncodedRows]:
        """The banks by name."""
        return {name: EncodedRows(self, name) for name in self.null}

    @torch.no_grad()
    def rows(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Rows ``numbers`` of every bank. A text that occurs several times in the request is encoded once."""
        wanted, place = torch.unique(torch.tensor(numbers, dtype=torch.int64, device="cpu"), return_inverse=True)
        texts = [self._texts[number] for number in wanted.tolist() if number < len(self._texts)]
        with self._lock:
            parts = [self._encode(texts[i : i + self._batch]) for i in range(0, len(texts), self._batch)]
        parts.append(self.null)  # it has the largest number
        found = {name: torch.cat([part[name] for part in parts]) for name in self.null}
        return {name: rows[place.to(rows.device)] for name, rows in found.items()}


class EncodedRows:
    """One bank [M + 1, *S] of ``Encodings``. Indexing (as in torch or NumPy) encodes the rows it needs; ``rows_of``
    reads several banks of one encoder at once."""

    __contains__ = None  # "in" would encode everything

    def __init__(self, source: Encodings, name: str) -> None:
        like = source.null[name]
        self.source, self.name = source, name
        self.shape, self.dtype, self.device = torch.Size((len(source), *like.shape[1:])), like.dtype, like.device

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        numbers, rest = split(index, self.shape)
        rows = self.source.rows(numbers)[self.name]
        return rows[rest] if rest else rows


def rows_of(banks: Any, index: Tensor | slice, device: torch.device | str | None = None) -> Any:
    """Rows ``index`` of banks (one, or several as ``noise_gather`` takes them), as tensors in the banks' structure.

    Rows that are encoded on demand are encoded once for all banks. ``device``: of the result; None: each bank's own.
    """
    encoded: dict[Encodings, dict[str, Tensor]] = {}

    def rows(bank: Any) -> Tensor:
        if isinstance(bank, EncodedRows):
            if bank.source not in encoded:
                encoded[bank.source] = bank.source.rows(split(index, bank.shape)[0])
            found = encoded[bank.source][bank.name]
        else:
            found = bank[index.to(bank.device) if isinstance(index, Tensor) else index]
        return found if device is None else found.to(device)

    return mapped(rows, banks)


def encodings(
    encoded: Any, texts: list[str], before: Mapping[str, Tensor], source: str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The output of a text encoder by name, after checks. ``before``: rows of earlier batches. ``dtype``:
    floating-point rows are cast to it."""
    named = dict(encoded) if isinstance(encoded, Mapping) else {EMBEDDINGS: encoded}
    if before and list(named) != list(before):
        raise InputError.of(source, f"banks {', '.join(before)}, as before", ", ".join(map(str, named)))
    alone = not isinstance(encoded, Mapping)
    return {
        name: _encoding(bank, texts, before.get(name), name, source + ("" if alone else f"[{name!r}]"), dtype)
        for name, bank in named.items()
    }


def _encoding(
    encoded: Any, texts: list[str], before: Tensor | None, name: str, argument: str, dtype: torch.dtype | None
) -> Tensor:
    """One bank of a text encoder's output, after checks."""
    sizes = "length, width" if name == EMBEDDINGS else "..."
    tensor = values.as_tensor(encoded, argument, f"a tensor [{len(texts)} texts, {sizes}]")
    wanted = (len(texts), *(tensor.shape[1:] if before is None else before.shape[1:]))
    if (name == EMBEDDINGS and tensor.ndim != 3) or tuple(tensor.shape) != wanted:
        rule = f"[{len(texts)} texts, {sizes}], the same for all"
        raise InputError.of(argument, rule, tuple(tensor.shape))
    values.require_dtype(tensor.dtype, argument, floating=name == EMBEDDINGS)
    if before is not None and tensor.dtype != before.dtype:
        raise InputError.of(argument, f"{before.dtype}, as before", tensor.dtype)
    if not tensor.dtype.is_floating_point:
        return tensor
    row = values.misfit(tensor, dtype or tensor.dtype)
    if row is not None:
        rule = "finite values" + ("" if dtype is None else f" within {values.range_of(dtype)}")
        raise InputError.of(argument, rule, f"others for {texts[row]!r}")
    return tensor.to(dtype or tensor.dtype)


@dataclass(frozen=True, eq=False)
class Begun:
    """A bank that is encoded in parts: its arguments, checked, and its null prompt, as encoded and as stored."""

    pool: list[str]
    fingerprint: dict[str, Any]
    encode: Encode
    dtype: torch.dtype | None
    null: dict[str, Tensor]
    stored_null: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        texts: Iterable[str],
        encode: Encode,
        encoder: Mapping[str, Any],
        null_text: str,
        encode_null: Callable[[str], Tensor | Mapping[str, Tensor]] | None,
        batch: int,
        dtype: torch.dtype | None,
    ) -> Begun:
        pool = checked_pool(texts, null_text, encode, encode_null, batch)
        if not (fingerprint := checked_encoder(encoder)):
            raise InputError.of("encoder", "what identifies the text encoder, as no values do", "nothing")
        if dtype is not None:
            values.require_dtype(dtype, "dtype")
        if message := prompt_texts.warning(pool):
            warnings.warn(message, stacklevel=3)
        with torch.no_grad():
            null = encode([null_text]) if encode_null is None else encode_null(null_text)
        source = "encode(texts)" if encode_null is None else "encode_null(text)"
        own, stored = (encodings(null, [null_text], {}, source, kind) for kind in (None, dtype))
        return cls(pool, fingerprint, encode, dtype, own, stored)

    def encoded(self, part: Sequence[str]) -> dict[str, Tensor]:
        """The rows of some texts, as stored."""
        with torch.no_grad():
            return encodings(self.encode(list(part)), list(part), self.null, "encode(texts)", self.dtype)


def checked_pool(texts: Iterable[str], null_text: str, encode: Any, encode_null: Any, batch: int) -> list[str]:
    """The texts of a bank to build; InputError for arguments that ``build`` refuses."""
    pool = prompt_texts.listed(texts)
    prompt_texts.checked(null_text, "null_text")
    if not pool:
        raise InputError.of("texts", "a list of at least one text", "[]")
    for name, function in {"encode": encode, "encode_null": encode_null or encode}.items():
        if not callable(function):
            raise InputError.of(name, "a function of texts", type(function).__name__)
    if batch < 1:
        raise InputError.of("batch", "at least 1", batch)
    return pool


def checked_encoder(encoder: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(encoder, Mapping):
        raise InputError.of("encoder", "a mapping of JSON values", type(encoder).__name__)
    return plain(encoder, "encoder")
