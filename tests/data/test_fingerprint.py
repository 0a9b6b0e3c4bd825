# SPDX-License-Identifier: Apache-2.0
"""Hashes of tensors and JSON values."""

import hashlib
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistill.data.fingerprint import differences, plain, sha256_of_json, sha256_of_tensors
from fastdistill.errors import InputError


def test_hash_of_tensors_sees_names_dtypes_shapes_and_values_and_nothing_else():
    x = torch.arange(24, dtype=torch.float32).reshape(1, 2, 3, 4)
    base = sha256_of_tensors({"a": x, "b": x.bfloat16()})
    assert base == sha256_of_tensors({"b": x.bfloat16(), "a": x.clone(memory_format=torch.channels_last)})
    assert base == sha256_of_tensors({"a": torch.nn.Parameter(x), "b": x.bfloat16()})
    changed = x.clone()
    changed[0, 1, 2, 3] = torch.nextafter(changed[0, 1, 2, 3], torch.tensor(1e9))
    for other in (
        {"a": changed, "b": x.bfloat16()},
        {"a": x, "c": x.bfloat16()},
        {"a": x, "b": x.half()},
        {"a": x.reshape(2, 12), "b": x.bfloat16()},
        {"a": x},
    ):
        assert sha256_of_tensors(other) != base


def test_the_hash_is_specified_to_the_byte():
    """So the hash in a published file never changes with a new version of this package."""
    header = b'["w", "float32", [2]]'
    specified = b"%d:%s" % (len(header), header) + struct.pack("<2f", 1.0, -2.5)
    assert sha256_of_tensors({"w": torch.tensor([1.0, -2.5])}) == hashlib.sha256(specified).hexdigest()


def test_hash_of_scalars_empty_tensors_and_meta():
    assert sha256_of_tensors({"n": torch.tensor(3)}) != sha256_of_tensors({"n": torch.tensor([3])})
    assert sha256_of_tensors({"n": torch.empty(0, 2)}) != sha256_of_tensors({"n": torch.empty(2, 0)})
    assert sha256_of_tensors({"n": torch.tensor([True, False])})
    with pytest.raises(InputError, match=r"tensors\['w'\]: expected a tensor with values, got one on the meta device"):
        sha256_of_tensors({"w": torch.empty(2, device="meta")})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_a_fingerprint_does_not_differ_from_itself(value):
    read_back = plain(value)
    assert differences(read_back, plain(read_back)) == []
    assert sha256_of_json(value) == sha256_of_json(dict(reversed(read_back.items())))


def test_differences_name_the_field_and_both_values():
    wanted = {"teacher": "aaa", "sampler": {"steps": 25, "guidance": 7.5}, "seed": 0}
    found = {"teacher": "bbb", "sampler": {"steps": 50, "guidance": 7.5}}
    assert differences(wanted, found) == [
        "sampler.steps: expected 25, got 50",
        "seed: expected 0, got nothing",
        "teacher: expected 'aaa', got 'bbb'",
    ]


def test_a_fingerprint_must_be_json():
    with pytest.raises(InputError, match=r"fingerprint: expected values that JSON holds"):
        plain({"weights": torch.ones(2)})
    with pytest.raises(InputError):
        plain({"scale": float("nan")})
