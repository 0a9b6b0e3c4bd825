# SPDX-License-Identifier: Apache-2.0
"""The prompt bank: embeddings of the prompt pool and, last, of the empty prompt."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.data.fingerprint import sha256_of_json, sha256_of_tensors
from fastdistill.data.manifest import Manifest, TensorSpec
from fastdistill.data.shards import RowWriter, load_attachment, load_rows
from fastdistill.data.stored import open_rows
from fastdistill.errors import InputError, StorageError

KIND = "prompt_bank"
_TEXTS = "texts.json"


@dataclass(frozen=True, eq=False)
class PromptBank:
    """``embeddings`` [M+1, L, D], floating point: rows 0..M-1 belong to ``texts``, row M to the null (empty) prompt.

    ``encoder`` is a fingerprint of the text encoder (JSON values). ``len(bank)`` is M, the pool's size.
    InputError when rows and texts do not belong together.
    """

    embeddings: Any  # Tensor, or StoredRows of an opened bank
    texts: list[str]
    null_text: str = ""
    encoder: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        e = self.embeddings
        if e.ndim != 3 or len(e) != len(self.texts) + 1 or not self.texts or not e.dtype.is_floating_point:
            rule = f"floating point [{len(self.texts)} texts + 1, length, width], at least one text"
            raise InputError.of("embeddings", rule, f"{e.dtype} {tuple(e.shape)}")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def null_index(self) -> int:
        """Row of the null prompt: M, the last."""
        return len(self.texts)

    @property
    def null(self) -> Tensor:
        """Embedding of the null prompt [L, D]."""
        null: Tensor = self.embeddings[self.null_index]
        return null

    @cached_property
    def sha256(self) -> str:
        """Hash of the texts and embeddings, for the fingerprints of what is made with them."""
        return sha256_of_json([self.texts, self.null_text, sha256_of_tensors({"embeddings": self.embeddings[:]})])

    @classmethod
    def build(
        cls,
        texts: Sequence[str],
        encode: Callable[[list[str]], Tensor],
        *,
        null_text: str = "",
        batch: int = 64,
        encoder: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> PromptBank:
        """Encodes every text once: ``encode`` maps b <= batch texts to [b, L, D], the same L and D for all.

        The rows stay on the device and of the dtype that ``encode`` gives. ``progress(texts done, M + 1)`` is called
        after each batch. InputError for no texts, and for an encoding of another shape or with values not finite.
        """
        if isinstance(texts, str) or not texts:
            raise InputError.of("texts", "a list of at least one text", repr(texts))
        if batch < 1:
            raise InputError.of("batch", "at least 1", batch)
        everything = [*texts, null_text]
        rows: Tensor | None = None
        for start in range(0, len(everything), batch):
            chunk = everything[start : start + batch]
            with torch.no_grad():
                encoded = encode(chunk)
            wanted = (len(chunk), *(rows.shape[1:] if rows is not None else encoded.shape[1:]))
            if encoded.ndim != 3 or tuple(encoded.shape) != wanted:
                rule = f"[{len(chunk)} texts, length, width], the same for all"
                raise InputError.of("encode(texts)", rule, tuple(encoded.shape))
            finite = torch.isfinite(encoded).flatten(1).all(1).tolist()
            if not all(finite):
                raise InputError.of("encode(texts)", "finite values", f"others for {chunk[finite.index(False)]!r}")
            if rows is None:
                rows = encoded.new_empty((len(everything), *encoded.shape[1:]))
            rows[start : start + len(chunk)] = encoded
            if progress is not None:
                progress(start + len(chunk), len(everything))
        assert rows is not None  # there is at least the null text
        return cls(rows, list(texts), null_text, dict(encoder or {}))

    def indices_of(self, texts: Sequence[str]) -> Tensor:
        """Row of each text, int64 [len(texts)] (its first row where the bank has it twice); InputError for others."""
        missing = next((text for text in texts if text not in self._row_of), None)
        if missing is not None:
            near = difflib.get_close_matches(missing, self.texts[:10_000], n=3)
            hint = f" (near: {', '.join(map(repr, near))})" if near else ""
            raise InputError.of("texts", f"prompts of the bank{hint}", repr(missing))
        return torch.tensor([self._row_of[text] for text in texts], dtype=torch.int64)

    def subset(self, texts: Sequence[str]) -> PromptBank:
        """A bank of these texts, in this order, with the same null prompt."""
        rows = torch.cat([self.indices_of(texts), torch.tensor([self.null_index])])
        chosen = self.embeddings[rows.to(self.embeddings.device)]
        return PromptBank(chosen, list(texts), self.null_text, self.encoder)

    def to(self, device: torch.device | str) -> PromptBank:
        """The same bank with its embeddings on a device."""
        return PromptBank(self.embeddings[:].to(device), self.texts, self.null_text, self.encoder)

    def check_width(self, cross_attention_dim: int) -> None:
        """InputError naming both widths unless the rows have the width that the model's cross-attention reads."""
        _check_width(self.embeddings.shape[-1], cross_attention_dim)

    def save(self, path: str | Path, *, rows_per_shard: int = 4096) -> None:
        """Writes the bank to a directory; a bank interrupted there is finished. Errors: those of RowWriter."""
        embeddings = self.embeddings[:].detach().cpu()
        texts = json.dumps({"texts": self.texts, "null_text": self.null_text}, indent=0, ensure_ascii=False)
        with RowWriter(
            path,
            kind=KIND,
            fingerprint={"encoder": dict(self.encoder), "sha256": self.sha256},
            rows=len(embeddings),
            tensors={"embeddings": TensorSpec(tuple(embeddings.shape[1:]), embeddings.dtype)},
            rows_per_shard=rows_per_shard,
            attachments={_TEXTS: texts.encode()},
        ) as writer:
            for span in writer.missing:
                writer.write(span, {"embeddings": embeddings[span.start : span.stop]})

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
        """The bank of a directory, its embeddings as ``dtype`` (None: as stored).

        ``width``: the ``cross_attention_dim`` of the model that will read it; a bank of another width is refused
        (InputError) before its rows are read. StorageError, naming the file, for what is missing or damaged.
        """

        manifest, rows = load_rows(path, kind=KIND, device=device, dtype=dtype, verify=verify, check=_as_wide(width))
        return cls(rows["embeddings"], *_texts(path, manifest))

    @classmethod
    def open(cls, path: str | Path, *, width: int | None = None, verify: bool = True) -> PromptBank:
        """The same with its embeddings left on the disk (``StoredRows``), for a bank larger than the memory.

        ``verify`` reads all of it once.
        """
        manifest, rows = open_rows(path, kind=KIND, verify=verify, check=_as_wide(width))
        bank = cls(rows["embeddings"], *_texts(path, manifest))
        if sha256 := manifest.fingerprint.get("sha256"):
            bank.__dict__["sha256"] = sha256  # known without reading the rows
        return bank

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {text: row for row, text in reversed(list(enumerate(self.texts)))}


def _as_wide(width: int | None) -> Callable[[Manifest], None]:
    def check(manifest: Manifest) -> None:
        if width is not None:
            _check_width(manifest.tensors["embeddings"].shape[-1], width)

    return check


def _texts(path: str | Path, manifest: Manifest) -> tuple[list[str], str, Mapping[str, Any]]:
    """Texts, null text and encoder."""
    try:
        stored = json.loads(load_attachment(path, manifest, _TEXTS))
        return list(stored["texts"]), str(stored["null_text"]), manifest.fingerprint.get("encoder", {})
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{Path(path) / _TEXTS}: damaged: {error}") from error


def _check_width(width: int, cross_attention_dim: int) -> None:
    if width != cross_attention_dim:
        rule = f"rows of width {cross_attention_dim} (cross_attention_dim of the model)"
        raise InputError.of("prompts", rule, width)
