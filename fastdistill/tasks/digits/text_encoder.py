# SPDX-License-Identifier: Apache-2.0
"""A small frozen text encoder: "a red seven" becomes five tokens of 32 numbers, so that a condition is [L, D].

Word embeddings with positions, one residual attention layer that mixes the words of a prompt, and a layer norm. Its
weights are not learned: they are counter-based normals (``fastdistill.ops.philox``).

The last bits of matrix products depend on the processor. Therefore the embeddings with which the shipped teacher was
trained are shipped too: ``PromptBank.build([p.text for p in PROMPTS], encode)``, saved.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistill.data.prompt_bank import PromptBank
from fastdistill.errors import InputError
from fastdistill.ops import philox
from fastdistill.tasks.digits.data import COLORS, DIGITS

BANK = Path(__file__).parent / "weights" / "prompts"
LENGTH, WIDTH = 5, 32  # <start> a red seven <end>
VOCABULARY = ("<pad>", "<start>", "<end>", "a", *COLORS, *DIGITS)
_SEED = 7
_MIX = 0.25  # factor of the attention layer's output in the residual stream


@cache
def _weights() -> tuple[Tensor, ...]:
    """Embeddings [V, D], positions [L, D], and the attention's four projections [D, D]."""

    def normal(part: int, *shape: int) -> Tensor:
        seed, step, sample = torch.tensor([[_SEED], [part], [0]], device="cpu")
        return philox.normal(seed[0], step[0], sample, shape)[0]

    projections = [normal(2 + i, WIDTH, WIDTH) / WIDTH**0.5 for i in range(4)]
    return normal(0, len(VOCABULARY), WIDTH), 0.5 * normal(1, LENGTH, WIDTH), *projections


def tokenize(text: str) -> list[int]:
    """The LENGTH token numbers of a prompt. InputError for a word that is not in the vocabulary or too many words."""
    words = text.lower().split()
    for word in words:
        if word not in VOCABULARY[3:]:
            near = difflib.get_close_matches(word, VOCABULARY[3:], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError.of("text", f"words of {', '.join(VOCABULARY[3:])}", f"{word!r}{hint}")
    if len(words) > LENGTH - 2:
        raise InputError.of("text", f"at most {LENGTH - 2} words", f"{len(words)}: {text!r}")
    tokens = ["<start>", *words, "<end>"]
    return [VOCABULARY.index(t) for t in tokens + ["<pad>"] * (LENGTH - len(tokens))]


def encode(texts: Sequence[str]) -> Tensor:
    """Embeddings [n, LENGTH, WIDTH] float32 of n prompts; the empty text is the null prompt."""
    embedding, position, to_q, to_k, to_v, to_out = _weights()
    tokens = torch.tensor([tokenize(text) for text in texts], dtype=torch.int64, device="cpu").reshape(-1, LENGTH)
    hidden = embedding[tokens] + position
    normed = F.layer_norm(hidden, (WIDTH,))
    query, key, value = normed @ to_q, normed @ to_k, normed @ to_v
    mixed = (query @ key.transpose(1, 2) / WIDTH**0.5).softmax(-1) @ value @ to_out
    return F.layer_norm(hidden + _MIX * mixed, (WIDTH,))


def encoded(texts: Sequence[str]) -> Tensor:
    """Like ``encode``, but with the shipped embeddings if there are any: the same on every machine."""
    made, bank = encode(texts), _shipped()
    known = {text: row for row, text in enumerate([*bank.texts, bank.null_text])}
    for row, text in enumerate(texts):
        if (place := known.get(" ".join(text.lower().split()))) is not None:
            made[row] = bank.embeddings[place]
    return made


@cache
def _shipped() -> PromptBank:
    return prompt_bank()


def prompt_bank() -> PromptBank:
    """The shipped 80 prompts in the order of PROMPTS, then the null prompt; StorageError if they are damaged."""
    return PromptBank.load(BANK)
