# SPDX-License-Identifier: Apache-2.0
"""Narrower students: which parts of the teacher's weights they get, and what they compute."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistill.errors import InputError
from fastdistill.models import BlockSpec, StudentSpec, Taps, make_student
from fastdistill.models.families import family_named
from tests import tiny
from tests.harness import assert_alike
from tests.models import tiny_families as small

#: What else changes in a configuration of ``tiny_families`` that is twice as wide, besides its heads.
TWICE: dict[str, dict[str, Any]] = {
    "sd": {"block_out_channels": (16, 32)},
    "sdxl": {"block_out_channels": (16, 32)},
    "dit": {},
    "pixart_alpha": {"cross_attention_dim": 48},
    "pixart_sigma": {"cross_attention_dim": 32},
    "sd3": {"caption_projection_dim": 32},
    "sd35": {"caption_projection_dim": 32},
    "flux": {},
    "sana": {"cross_attention_dim": 32, "num_cross_attention_heads": 4},
}
HEADS = re.compile(r".*\.(to_q|to_k|to_v|add_[qkv]_proj|norm_q|norm_k)\.(weight|bias)")


def doubled(values: Tensor, key: str, axis: int, head: int) -> Tensor:
    """Each channel, or each head, occurs twice, side by side."""
    of_heads = HEADS.fullmatch(key) if axis == 0 else re.fullmatch(r".*\.(to_out\.0|to_add_out)\.weight", key)
    if of_heads:
        shape = (*values.shape[:axis], -1, head, *values.shape[axis + 1 :])
        return values.reshape(shape).repeat_interleave(2, axis).flatten(axis, axis + 1)
    return values.repeat_interleave(2, axis)


def twice_as_wide(name: str, narrow: Any) -> Any:
    """A model with every channel and head twice that computes the same function."""
    family, config = small.TINY[name]
    unet, width = family == "unet", TWICE[name]
    heads = {} if unet else {"num_attention_heads": 4}
    wide: Any = family_named(family).kind(**(config | heads | width))
    own, theirs = narrow.state_dict(), wide.state_dict()
    for key, values in own.items():
        layer = wide.get_submodule(key.rpartition(".")[0])
        head = 1 if unet else 8 if ".attn" not in key or name != "pixart_alpha" else 12
        for axis in range(values.dim()):
            if theirs[key].shape[axis] == own[key].shape[axis]:
                continue
            if key.startswith("single_transformer_blocks") and key.endswith("proj_out.weight") and axis == 1:
                values = torch.cat((doubled(values[:, :16], "x.to_out.0.weight", 1, 8),
                                    values[:, 16:].repeat_interleave(2, 1)), 1)  # fmt: skip
            else:
                values = doubled(values, key, axis, head)
            if axis == 1 and key.endswith("weight") and isinstance(layer, nn.Linear | nn.Conv2d):
                values = values / 2
        if unet and ".to_q." in key:  # its heads become wider
            values = values / math.sqrt(2)
        theirs[key].copy_(values)
    for module, other in zip(wide.modules(), narrow.modules(), strict=True):
        if isinstance(table := other._buffers.get("pos_embed"), Tensor):
            module._buffers["pos_embed"] = table.repeat_interleave(2, -1)
    return wide


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "sdxl" else n for n in TWICE])
@torch.no_grad()
def test_equal_copies_of_channels_and_heads_are_taken_apart(name: str) -> None:
    """The teacher is a narrow model with each channel and head twice. Its student is that narrow model, except for the
    size
    of sums: for every axis of every tensor the matching entries are taken."""
    narrow: Any = small.model(name).eval()
    if small.TINY[name][0] == "unet":  # sines of fewer frequencies are not copies of each other
        narrow.time_embedding.linear_1.weight.zero_()
    wide = twice_as_wide(name, narrow).eval()
    family, rows = family_named(small.TINY[name][0]), small.banks(narrow)
    rows = {bank: values[:2] for bank, values in rows.items()}
    exact = {bank: values.double() if values.is_floating_point() else values for bank, values in rows.items()}
    x, t = small.cache(name).latents[:2], torch.tensor([3.0, 700.0])
    expected = family.call(narrow, x, t, rows)
    truth = family.call(copy.deepcopy(narrow).double(), x.double(), t, exact)
    as_tensor = lambda output: getattr(output, "sample", output)  # noqa: E731
    assert_alike(as_tensor(family.call(wide, x, t, rows)), as_tensor(expected), as_tensor(truth))
    made = make_student(wide, StudentSpec(width=0.5) if family.name == "unet" else "half_width")
    assert made.needs_adapters and made.copied is not None
    own, halves = made.model.state_dict(), wide.state_dict()
    for key, expected in narrow.state_dict().items():
        inputs = key.endswith("weight") and isinstance(made.model.get_submodule(key[:-7]), nn.Linear | nn.Conv2d)
        if inputs and halves[key].shape[1] != expected.shape[1]:  # halved in the teacher, times sqrt(2) in the student
            expected = expected / math.sqrt(2)
        if family.name == "unet" and ".to_q." in key:
            expected = expected / math.sqrt(2)
        bound = 4 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert (own[key] - expected).abs().max() <= bound, key


def test_evenly_spaced_channels_and_whole_heads() -> None:
    """Three of four heads, in half of the blocks."""
    config = small.TINY["flux"][1] | {"num_attention_heads": 4}
    teacher: Any = family_named("flux").kind(**config)
    made = make_student(teacher, BlockSpec(every=2, width=0.75))
    own, theirs = made.model.state_dict(), teacher.state_dict()
    channels = torch.tensor([i * 4 // 3 for i in range(24)])
    heads = torch.cat([torch.arange(8) + 8 * h for h in (0, 1, 2)])
    query, source = "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.1.attn.to_q.weight"
    assert torch.equal(own[query], theirs[source][heads][:, channels] * math.sqrt(32 / 24))
    out, source = "single_transformer_blocks.0.proj_out.weight", "single_transformer_blocks.1.proj_out.weight"
    both = torch.cat((heads, 32 + torch.tensor([i * 4 // 3 for i in range(96)])))
    assert torch.equal(own[out], theirs[source][channels][:, both] * math.sqrt(32 / 24))
    assert torch.equal(own["x_embedder.weight"], theirs["x_embedder.weight"][channels])
    copied = made.copied
    assert copied is not None and copied.sources.keys() == own.keys() and made.channels == ((24, 32),) * 2
    assert copied.sliced[query] == "24 x 24, times 1.1547" and "proj_out.bias" not in copied.sliced
    assert f"{query} <- transformer_blocks.1.attn.to_q.weight: 24 x 24, times 1.1547" in copied.table().splitlines()
    assert str(copied).startswith(f"{len(own)} tensors copied from the teacher, ")
    assert f"{len(copied.sliced)} of them slices" in str(copied)


def test_positions_of_a_student_of_half_the_width_are_its_channels_of_the_teacher_s() -> None:
    """The tables of DiT and PixArt are computed from the width, not stored."""
    teacher: Any = family_named("dit").kind(**small.TINY["dit"][1] | {"num_attention_heads": 4})
    made = make_student(teacher, "half_width").model
    own, theirs = made.pos_embed.pos_embed, teacher.pos_embed.pos_embed[..., ::2]
    assert_alike(own, theirs, theirs.double())


@pytest.mark.parametrize("name", ["flux", *(pytest.param(n, marks=pytest.mark.slow) for n in TWICE if n != "flux")])
def test_a_narrow_student_is_trained_through_adapters(name: str) -> None:
    teacher: Any = small.model(name)
    made = make_student(teacher, StudentSpec(width=0.5) if small.TINY[name][0] == "unet" else "half_width")
    taps = tuple(zip(made.teacher_taps, made.student_taps, strict=True))
    run = tiny.trainer(teacher, made, tiny.features(*taps), latents=small.cache(name), prompts=small.bank(name))
    adapters = run.step.objective._knowledge.adapters  # type: ignore[attr-defined]
    before = [p.clone() for p in adapters.parameters()]
    assert list(made.channels) == list(adapters.pairs) and all(own < theirs for own, theirs in adapters.pairs)
    assert run.fit().history[0]["feature"] > 0
    assert all(not torch.equal(a, b) for a, b in zip(before, adapters.parameters(), strict=True))


def test_the_first_blocks_of_sd3() -> None:
    """Its last block has another structure; it gets the matching parts of the previous block."""
    teacher: Any = small.model("sd3").eval()
    made = make_student(teacher, BlockSpec(first=2)).model.eval()
    rows = {bank: values[:2] for bank, values in small.banks(teacher).items()}
    x, t = small.cache("sd3").latents[:2], torch.tensor([3.0, 700.0])
    exact = {bank: values.double() for bank, values in rows.items()}
    del teacher.transformer_blocks[2:]
    call = family_named("sd3").call
    with torch.no_grad():
        truth = call(copy.deepcopy(teacher).double(), x.double(), t, exact).sample
        assert_alike(call(made, x, t, rows).sample, call(teacher, x, t, rows).sample, truth)


@pytest.mark.parametrize(("name", "spec", "message"), [
    ("dit", {"width": 0}, r"spec.width: expected a factor above 0, at most 1 \(the teacher's own width\), got 0"),
    ("dit", {"width": 1.5}, r"spec.width: expected a factor above 0, at most 1"),
    ("dit", {"width": 0.9}, r"spec: expected a part to remove from the teacher, got .*width=0.9"),
    ("sd", {"block_out_channels": [8, 12]}, r"student.block_out_channels: expected one and the same part of"),
])  # fmt: skip
def test_widths_that_do_not_fit(name: str, spec: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_student(small.model(name), spec)


def test_embedded_sizes_of_pixart_share_the_width() -> None:
    config = small.TINY["pixart_alpha"][1] | {"attention_head_dim": 8, "num_attention_heads": 3}
    teacher = family_named("pixart").kind(**config)
    with pytest.raises(InputError, match=r"spec.width: expected a width that three embeddings of sizes share, got 16"):
        make_student(teacher, BlockSpec(width=0.6))


def test_taps_of_narrow_flux_take_the_image() -> None:
    teacher: Any = small.model("flux")
    made = make_student(teacher, "half_width")
    rows = {bank: values[:2] for bank, values in small.banks(teacher).items()}
    with Taps(made.model, made.student_taps) as taps, torch.no_grad():
        family_named("flux").call(made.model, small.cache("flux").latents[:2], torch.tensor([3.0, 700.0]), rows)
        assert [feature.shape for feature in taps.features()] == [(2, 16, 8)] * 4
