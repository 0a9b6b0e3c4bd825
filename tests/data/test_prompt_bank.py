# SPDX-License-Identifier: Apache-2.0
"""The prompt bank: its rows, its null prompt, its width, its directory."""

import json
import os
import re

import numpy as np
import pytest
import torch

from fastdistill.data.fingerprint import sha256_of_json, sha256_of_tensors
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.errors import InputError, StorageError

TEXTS = ["a red seven", "a blue seven", "a green one", "ein grüner Einser"]


D = torch.float32, torch.float16


def encode(texts):
    return torch.tensor([[[len(text), ord(text[-1]) if text else 0, k] for k in range(2)] for text in texts]).float()


@pytest.fixture
def bank():
    return PromptBank.build(TEXTS, encode, batch=3, encoder={"name": "lengths", "sha256": "e" * 8})


def test_rows_belong_to_their_texts_and_the_null_prompt_is_last(bank):
    assert bank.embeddings.shape == (5, 2, 3) and len(bank) == bank.null_index == 4
    assert torch.equal(bank.embeddings, encode([*TEXTS, ""]))
    assert torch.equal(bank.null, encode([""])[0])
    assert torch.equal(PromptBank.build(TEXTS, encode, null_text="nothing").null, encode(["nothing"])[0])


def test_each_text_is_encoded_once_in_batches():
    calls, seen = [], []
    PromptBank.build(
        TEXTS, lambda t: (calls.append(list(t)), encode(t))[1], batch=2, progress=lambda d, n: seen.append((d, n))
    )
    assert calls == [TEXTS[:2], TEXTS[2:], [""]]
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_texts_are_found_again(bank):
    assert bank.indices_of(["a green one", "a red seven"]).tolist() == [2, 0]
    assert bank.indices_of([]).tolist() == []
    with pytest.raises(
        InputError, match=r"texts: expected prompts of the bank \(near: 'a red seven'.*got 'a red sevn'"
    ):
        bank.indices_of(["a blue seven", "a red sevn"])
    with pytest.warns(UserWarning, match="0 empty and 1 repeated"):
        twice = PromptBank.build(["a", "b", "a"], encode)
    assert twice.indices_of(["a", "b"]).tolist() == [0, 1]


def test_subset_keeps_the_null_prompt(bank):
    small = bank.subset(["a green one", "a red seven"])
    assert small.texts == ["a green one", "a red seven"] and small.null_index == 2
    assert torch.equal(small.embeddings, bank.embeddings[[2, 0, 4]])
    assert small.identity != bank.identity


def test_width(bank):
    bank.check_width(3)
    message = "prompts: expected rows of width 768 (cross_attention_dim of the model), got 3"
    with pytest.raises(InputError, match=re.escape(message)):
        bank.check_width(768)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(bank, tmp_path, dtype):
    bank = PromptBank(bank.embeddings.to(dtype), bank.texts, encoder=bank.encoder)
    bank.save(tmp_path, rows_per_shard=2)
    loaded = PromptBank.load(tmp_path, width=3)
    assert loaded.texts == TEXTS and loaded.null_text == "" and loaded.encoder == {"name": "lengths", "sha256": "e" * 8}
    assert torch.equal(loaded.embeddings, bank.embeddings) and loaded.embeddings.dtype == dtype
    assert loaded.identity == bank.identity
    assert PromptBank.load(tmp_path, dtype=torch.float16).embeddings.dtype == torch.float16
    bank.save(tmp_path, rows_per_shard=2)  # the same bank: nothing to do
    with pytest.raises(InputError, match="prompts: expected rows of width 4"):
        PromptBank.load(tmp_path, width=4)
    with pytest.raises(StorageError, match="expected a latent_cache, got a prompt_bank"):
        LatentCache.load(tmp_path)
    other = PromptBank.build(TEXTS, lambda texts: encode(texts) + 1)
    with pytest.raises(StorageError, match=r"identity: expected '.*choose another directory"):
        other.save(tmp_path, rows_per_shard=2)


def test_the_encoding_may_be_a_numpy_array():
    bank = PromptBank.build(TEXTS, lambda texts: encode(texts).numpy()[:, ::-1])
    assert torch.equal(bank.embeddings, encode([*TEXTS, ""]).flip(1))


def test_a_bank_of_a_known_encoder_is_identified_by_what_went_into_it(bank):
    """So the bank stays the same if another processor computes other last bits."""
    elsewhere = bank.embeddings * (1 + torch.finfo(torch.float32).eps)
    assert not torch.equal(elsewhere, bank.embeddings)
    assert PromptBank(elsewhere, TEXTS, encoder=bank.encoder).identity == bank.identity
    assert PromptBank(elsewhere, tuple(TEXTS), encoder={"sha256": "e" * 8, "name": "lengths"}).identity == bank.identity
    assert bank.to(dtype=torch.float16).identity == bank.to("cpu").identity == bank.identity
    for other in (
        PromptBank(bank.embeddings, TEXTS[::-1], encoder=bank.encoder),
        PromptBank(bank.embeddings, TEXTS, "nothing", bank.encoder),
        PromptBank(bank.embeddings, TEXTS, encoder={"name": "lengths", "sha256": "f" * 8}),
        PromptBank(bank.embeddings[:, :1], TEXTS, encoder=bank.encoder),
        PromptBank(bank.embeddings, TEXTS),
        bank.subset(TEXTS[:2]),
    ):
        assert other.identity != bank.identity


def test_a_bank_of_an_unknown_encoder_keeps_the_identity_it_was_made_with(tmp_path):
    bank = PromptBank.build(TEXTS, encode)
    assert bank.identity != PromptBank.build(TEXTS, lambda texts: encode(texts) + 1).identity
    assert bank.identity == sha256_of_json([TEXTS, "", sha256_of_tensors({"embeddings": bank.embeddings})])
    half = bank.to(dtype=torch.float16)
    bank.save(tmp_path / "a")
    half.save(tmp_path / "b")
    for read in (
        half,
        half.to(dtype=torch.float32),
        PromptBank.load(tmp_path / "a"),
        PromptBank.load(tmp_path / "a", dtype=torch.bfloat16),
        PromptBank.open(tmp_path / "a"),
        PromptBank.open(tmp_path / "a").to(dtype=torch.float64),
        PromptBank.load(tmp_path / "b").to("cpu"),
    ):
        assert read.identity == bank.identity


@pytest.mark.parametrize("encoder", [{}, {"name": "lengths"}], ids=str)
def test_a_directory_of_before_banks_had_an_identity(tmp_path, encoder):
    bank = PromptBank.build(TEXTS, encode, encoder=encoder)
    bank.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    values = sha256_of_json([TEXTS, "", sha256_of_tensors({"embeddings": bank.embeddings})])
    manifest["fingerprint"] = {"encoder": encoder, "sha256": values}
    manifest["fingerprint_sha256"] = sha256_of_json(manifest["fingerprint"])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for how in (PromptBank.load, PromptBank.open):
        assert how(tmp_path).identity == bank.identity


def test_width_is_checked_before_rows_are_read(bank, tmp_path):
    bank.save(tmp_path)
    os.unlink(tmp_path / "shard-00000.safetensors")
    with pytest.raises(InputError, match="prompts: expected rows of width 4"):
        PromptBank.load(tmp_path, width=4)


def test_damaged_texts_are_named_and_repaired_by_saving_again(bank, tmp_path):
    bank.save(tmp_path)
    (tmp_path / "texts.json").write_text("[]")
    with pytest.raises(StorageError, match=r"texts\.json: damaged"):
        PromptBank.load(tmp_path)
    bank.save(tmp_path)
    assert PromptBank.load(tmp_path).texts == TEXTS


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", range(1, 8))
def test_interrupted_saving_is_finished_by_the_next(bank, tmp_path, monkeypatch, error, call):
    calls, real = 0, os.replace

    def replace(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(error):
            bank.save(tmp_path, rows_per_shard=2)
    with pytest.raises(StorageError, match=r"unfinished|got none"):
        PromptBank.load(tmp_path)
    bank.save(tmp_path, rows_per_shard=2)
    assert torch.equal(PromptBank.load(tmp_path).embeddings, bank.embeddings)


@pytest.mark.parametrize(
    ("texts", "encoder", "message"),
    [
        ([], encode, "texts: expected a list of at least one text, got []"),
        ("abc", encode, "texts: expected a list of at least one text, got 'abc'"),
        (TEXTS, lambda t: encode(t)[:, 0], "encode(texts): expected [3 texts, length, width]"),
        (TEXTS, lambda t: encode(t)[:-1], "encode(texts): expected [3 texts, length, width]"),
        (TEXTS, lambda t: encode(t)[:, : 1 + (len(t) == 3)], "the same for all, got (2, 1, 3)"),
        (TEXTS, lambda t: encode(t) / encode(t)[:, :, 1:2], "expected finite values, got others for ''"),
        (TEXTS, lambda t: (encode(t),), "encode(texts): expected a tensor [3 texts, length, width], got tuple"),
        (TEXTS, lambda t: None, "encode(texts): expected a tensor [3 texts, length, width], got NoneType"),
        (TEXTS, lambda t: np.array([t] * 3), "encode(texts): expected a tensor [3 texts, length, width], got a NumPy"),
        (TEXTS, lambda t: encode(t).long(), "encode(texts): expected a floating-point type, got torch.int64"),
        (
            TEXTS,
            lambda t: encode(t).to(D[len(t) == 3]),
            "encode(texts): expected torch.float16, as before, got torch.f",
        ),
        (TEXTS, lambda t: (encode(t) * float("nan")).to(torch.float8_e4m3fn), "expected finite values, got others for"),
    ],
)
def test_what_the_encoder_returns_is_checked(texts, encoder, message):
    with pytest.raises(InputError, match=re.escape(message)):
        PromptBank.build(texts, encoder, batch=3)


def test_embeddings_and_texts_must_belong_together(bank):
    with pytest.raises(InputError, match=re.escape("embeddings: expected floating point [3 texts + 1, length, width]")):
        PromptBank(bank.embeddings, TEXTS[:3])
