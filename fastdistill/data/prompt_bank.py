# SPDX-License-Identifier: Apache-2.0
"""The prompt bank: the encodings of the prompts of the pool and, last, of the empty prompt."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.data import texts as prompt_texts
from fastdistill.data import values
from fastdistill.data.encoded import EMBEDDINGS as EMBEDDINGS
from fastdistill.data.encoded import Begun, Encode, Encodings, checked_encoder, checked_pool, encodings, rows_of
from fastdistill.data.fingerprint import sha256_of_json, sha256_of_tensors
from fastdistill.data.manifest import Manifest, TensorSpec
from fastdistill.data.shards import RowWriter, load_attachment, load_rows
from fastdistill.data.stored import open_rows
from fastdistill.errors import InputError, StorageError
from fastdistill.files import json_value

KIND = "prompt_bank"
_TEXTS = "texts.json"


@dataclass(frozen=True, eq=False)
class PromptBank:
    """Encoded prompts: one row for each of M texts, and a last row for the null (empty) prompt.

    banks: a tensor of embeddings [M+1, L, D], floating point, or several tensors [M+1, ...] of any dtype, by the names
    of the model's arguments (``fastdistill.models.families``): ``encoder_hidden_states``, pooled embeddings, masks,
    class labels. A single tensor is ``encoder_hidden_states``. The attribute is always a mapping. texts: the M texts.
    encoder: a fingerprint of the text encoder (JSON values): its weights, length and settings. ``len(bank)`` is M.

    Raises:
        InputError: rows and texts do not belong together; a text is not a str or cannot be written as UTF-8; a value is
            not finite (checked in memory; for a bank on disk call ``check_finite``).
    """

    banks: Any  # Tensor, StoredRows of an opened bank, EncodedRows if encoded on demand, or a mapping of these
    texts: list[str]
    null_text: str = ""
    encoder: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        texts = prompt_texts.listed(self.texts)
        own = {"texts": texts, "null_text": prompt_texts.checked(self.null_text, "null_text")}
        for name, value in {**own, "encoder": checked_encoder(self.encoder)}.items():
            object.__setattr__(self, name, value)
        banks = dict(self.banks) if isinstance(self.banks, Mapping) else {EMBEDDINGS: self.banks}
        object.__setattr__(self, "banks", banks)
        if not banks or not all(isinstance(name, str) for name in banks):
            raise InputError.of("banks", "a tensor, or tensors by name", list(banks))
        for name, bank in banks.items():
            _check_bank(bank, name, len(texts))
            if values.has_values(bank):
                values.check_finite(bank, _label(name))

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def null_index(self) -> int:
        """Row of the null prompt: M, the last."""
        return len(self.texts)

    @property
    def embeddings(self) -> Any:
        """The bank ``encoder_hidden_states`` [M+1, L, D]; InputError if there is none."""
        if EMBEDDINGS not in self.banks:
            raise InputError.of("prompts", f"a bank {EMBEDDINGS}", f"only {', '.join(self.banks)}")
        return self.banks[EMBEDDINGS]

    @property
    def rows(self) -> Any:
        """The argument of ``noise_gather`` and ``Batches``: the embeddings if there is no other bank, otherwise all
        banks."""
        return self.embeddings if list(self.banks) == [EMBEDDINGS] else self.banks

    @property
    def null(self) -> Tensor:
        """Embedding of the null prompt [L, D]."""
        null: Tensor = self.embeddings[self.null_index]
        return null

    @cached_property
    def identity(self) -> str:
        """A hash that identifies the bank in fingerprints of results made from it, the same on every machine.

        With a fingerprint of the encoder it is a hash of the fingerprint, the texts and the shape of a row. The values
        are not included, because their last bits depend on the processor. Without a fingerprint it is a hash of the
        texts and of the values with which the bank was made; saving, loading, opening, moving and casting do not change
        it.
        """
        stored = {stored_name(name): bank for name, bank in self.banks.items()}
        if self.encoder:
            shapes = {name: bank.shape[1:] for name, bank in stored.items()}
            return identity_of(self.texts, self.null_text, self.encoder, shapes)
        return sha256_of_json([self.texts, self.null_text, sha256_of_tensors(stored)])

    @classmethod
    def build(
        cls,
        texts: Iterable[str],
        encode: Encode,
        *,
        null_text: str = "",
        encode_null: Callable[[str], Tensor | Mapping[str, Tensor]] | None = None,
        batch: int = 64,
        encoder: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> PromptBank:
        """Encode every text once: ``encode`` maps b <= batch texts to [b, L, D], with the same L, D and dtype for all,
        or to a mapping of such tensors [b, ...] of any dtype.

        ``encode_null`` encodes the null prompt ([1, ...]), if ``encode`` would not encode its text correctly. The rows
        keep the device and dtype of the output of ``encode`` (a tensor or a NumPy array). ``progress(texts done, M +
        1)`` is called after each batch. Empty texts and duplicates are encoded like others and get their own rows, with
        a warning; ``read_prompts`` leaves them out.

        Raises:
            InputError: a text that the constructor would refuse, before ``encode`` is called; an encoding of another
                shape or dtype, or with values that are not finite.
        """
        everything = [*checked_pool(texts, null_text, encode, encode_null, batch), str(null_text)]
        fingerprint = checked_encoder(encoder or {})
        if message := prompt_texts.warning(everything[:-1]):
            warnings.warn(message, stacklevel=2)
        rows: dict[str, Tensor] = {}
        pool = everything if encode_null is None else everything[:-1]
        jobs = [("encode(texts)", encode, pool[start : start + batch]) for start in range(0, len(pool), batch)]
        if encode_null is not None:
            jobs.append(("encode_null(text)", lambda texts: encode_null(texts[0]), everything[-1:]))
        done = 0
        for source, encoding, chunk in jobs:
            with torch.no_grad():
                encoded = encodings(encoding(list(chunk)), chunk, rows, source)
            for name, part in encoded.items():
                if done == 0:
                    rows[name] = part.new_empty((len(everything), *part.shape[1:]))
                rows[name][done : done + len(chunk)] = part
            done += len(chunk)
            if progress is not None:
                progress(done, len(everything))
        return cls(rows, everything[:-1], null_text, fingerprint)

    @classmethod
    def on_demand(
        cls,
        texts: Iterable[str],
        encode: Encode,
        *,
        encoder: Mapping[str, Any],
        null_text: str = "",
        encode_null: Callable[[str], Tensor | Mapping[str, Tensor]] | None = None,
        batch: int = 64,
        dtype: torch.dtype | None = None,
    ) -> PromptBank:
        """The bank that ``build`` makes, but its rows are encoded whenever they are read (``EncodedRows``): for a pool
        whose encodings are too large to store. A trainer encodes the rows of the coming steps in advance.

        This call encodes only the null prompt. ``encoder``, which identifies the bank, is required; ``identity`` is
        that of the bank that ``build`` makes with it. ``dtype``: of floating-point rows (None: as encoded). ``save``
        encodes everything. Other arguments and errors are those of ``build``; errors of an encoding occur when it is
        read.
        """
        begun = Begun.of(texts, encode, encoder, null_text, encode_null, batch, dtype)
        rows = Encodings(begun.pool, begun.encoded, begun.stored_null, batch=batch)
        return cls(rows.banks(), begun.pool, null_text, begun.fingerprint)

    def indices_of(self, texts: Iterable[str]) -> Tensor:
        """Row of each text, int64 [len(texts)] (the first row if the bank has it twice); InputError for other texts."""
        texts = prompt_texts.listed(texts)
        missing = next((text for text in texts if text not in self._row_of), None)
        if missing is not None:
            near = difflib.get_close_matches(missing, self.texts[:10_000], n=3)
            hint = f" (near: {', '.join(map(repr, near))})" if near else ""
            raise InputError.of("texts", f"prompts of the bank{hint}", repr(missing))
        return torch.tensor([self._row_of[text] for text in texts], dtype=torch.int64, device="cpu")

    def subset(self, texts: Iterable[str]) -> PromptBank:
        """A bank of these texts, in this order, with the same null prompt, in memory."""
        texts = prompt_texts.listed(texts)
        rows = [*self.indices_of(texts).tolist(), self.null_index]
        return PromptBank(rows_of(self.banks, torch.tensor(rows, device="cpu")), texts, self.null_text, self.encoder)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PromptBank:
        """The same bank in the memory of a device (None: the present one), floating-point values as ``dtype`` (None:
        the present one).

        Raises:
            InputError: ``dtype`` is not a floating-point dtype, or a row is out of its range.
        """
        if isinstance(device, torch.dtype):
            raise InputError.of("device", "a device (a dtype is given by name, dtype=)", device)
        if dtype is not None:
            values.require_dtype(dtype, "dtype")
        cast = {n: dtype if dtype and b.dtype.is_floating_point else b.dtype for n, b in self.banks.items()}
        same = all(cast[name] == bank.dtype for name, bank in self.banks.items())
        identity = None if same else self.identity  # if the values are the same, the identity is too
        moved = {
            name: values.in_memory(bank, bank.device if device is None else device, cast[name], _label(name))
            for name, bank in self.banks.items()
        }
        return replace(self, banks=moved)._known_as(identity or self.__dict__.get("identity"))

    def check_finite(self) -> None:
        """InputError, naming the row, if a value is not finite; a bank on disk is read in blocks."""
        for name, bank in self.banks.items():
            values.check_finite(bank, _label(name))

    def check_width(self, cross_attention_dim: int) -> None:
        """InputError with both widths unless the rows have the width that the model's cross-attention expects."""
        _check_width(self.embeddings.shape[-1], cross_attention_dim)

    def save(self, path: str | Path, *, rows_per_shard: int = 4096) -> None:
        """Writes the bank to a directory, or finishes an interrupted one there. Errors: those of RowWriter."""
        banks = {stored_name(name): bank for name, bank in self.banks.items()}
        with RowWriter(
            path,
            kind=KIND,
            fingerprint={"encoder": self.encoder, "identity": self.identity},
            rows=len(self) + 1,
            tensors={name: TensorSpec(tuple(bank.shape[1:]), bank.dtype) for name, bank in banks.items()},
            rows_per_shard=rows_per_shard,
            attachments=attachments(self.texts, self.null_text),
        ) as writer:
            for span in writer.claims():
                rows = rows_of(banks, slice(span.start, span.stop))
                writer.write(span, {name: bank.detach() for name, bank in rows.items()})

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        width: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        verify: bool = True,
    ) -> PromptBank:
        """Load the bank of a directory, its floating-point values as ``dtype`` (None: as stored).

        ``width``: the ``cross_attention_dim`` of the model that will read it; a bank of another width is refused
        (InputError) before its rows are read. InputError also if a row is out of the range of ``dtype``. StorageError,
        naming the file, for missing or damaged files.
        """
        manifest, rows = load_rows(path, kind=KIND, device=device, dtype=dtype, verify=verify, check=_as_wide(width))
        return cls(_loaded(rows), *_texts(path, manifest))._known_as(_identity(manifest))

    @classmethod
    def open(cls, path: str | Path, *, width: int | None = None, verify: bool = True) -> PromptBank:
        """Like ``load``, but the rows stay on disk (``StoredRows``), for a bank larger than the memory.

        ``verify`` reads the whole bank once.
        """
        manifest, rows = open_rows(path, kind=KIND, verify=verify, check=_as_wide(width))
        return cls(_loaded(rows), *_texts(path, manifest))._known_as(_identity(manifest))

    @staticmethod
    def texts_of(path: str | Path, manifest: Manifest) -> list[str]:
        """The texts of a stored bank, even if it is not finished; StorageError if they are damaged."""
        return _texts(path, manifest)[0]

    def _known_as(self, identity: str | None) -> PromptBank:
        if identity is not None:
            self.__dict__["identity"] = identity
        return self

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {text: row for row, text in reversed(list(enumerate(self.texts)))}


def identity_of(
    texts: list[str], null_text: str, encoder: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> str:
    """The identity of a bank whose encoder is known; ``shapes`` of a row in each bank, by its stored name."""
    listed: Any = {name: list(shape) for name, shape in shapes.items()}
    return sha256_of_json(
        [texts, null_text, encoder, listed["embeddings"] if list(listed) == ["embeddings"] else listed]
    )


def attachments(texts: list[str], null_text: str) -> dict[str, bytes]:
    """The files of a stored bank other than its rows."""
    value = {"texts": texts, "null_text": null_text}
    return {_TEXTS: json.dumps(value, indent=0, ensure_ascii=False).encode()}


def _label(name: str) -> str:
    """The name of a bank in a message."""
    return "embeddings" if name == EMBEDDINGS else f"banks[{name!r}]"


def stored_name(name: str) -> str:
    """The name of a bank in a file."""
    return "embeddings" if name == EMBEDDINGS else name


def _loaded(rows: Mapping[str, Any]) -> dict[str, Any]:
    return {EMBEDDINGS if name == "embeddings" else name: bank for name, bank in rows.items()}


def _check_bank(bank: Any, name: str, texts: int) -> None:
    embeddings = name == EMBEDDINGS
    values.require_bank(bank, _label(name), floating=embeddings)
    if (embeddings and bank.ndim != 3) or bank.ndim < 1 or len(bank) != texts + 1 or not texts:
        shape = f"floating point [{texts} texts + 1, length, width]" if embeddings else f"[{texts} texts + 1, ...]"
        raise InputError.of(_label(name), f"{shape}, at least one text", f"{bank.dtype} {tuple(bank.shape)}")


def _identity(manifest: Manifest) -> str | None:
    """The identity that was saved; None: it must be computed. Older directories have a hash of the values instead."""
    known = manifest.fingerprint
    identity: str | None = known.get("identity") or (None if known.get("encoder") else known.get("sha256"))
    return identity


def _as_wide(width: int | None) -> Callable[[Manifest], None]:
    def check(manifest: Manifest) -> None:
        if width is not None and "embeddings" in manifest.tensors:
            _check_width(manifest.tensors["embeddings"].shape[-1], width)

    return check


def _texts(path: str | Path, manifest: Manifest) -> tuple[list[str], str, Mapping[str, Any]]:
    """Texts, null text and encoder."""
    try:
        stored = json_value(load_attachment(path, manifest, _TEXTS))
        return list(stored["texts"]), str(stored["null_text"]), manifest.fingerprint.get("encoder", {})
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{Path(path) / _TEXTS}: damaged: {error}") from error


def _check_width(width: int, cross_attention_dim: int) -> None:
    if width != cross_attention_dim:
        rule = f"rows of width {cross_attention_dim} (cross_attention_dim of the model)"
        raise InputError.of("prompts", rule, width)
