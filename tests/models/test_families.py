# SPDX-License-Identifier: Apache-2.0
"""Families: the parts of a prompt, how a model is called with it, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn

from fastdistill.errors import InputError
from fastdistill.models import make_student
from fastdistill.models.calling import Predictor
from fastdistill.models.families import family_named, family_of, find
from fastdistill.models.families.flux import packed, positions, unpacked
from tests import tiny
from tests.models import tiny_families as small


def direct(name: str, model: Any, x: Tensor, t: Tensor, rows: dict[str, Tensor]) -> Any:
    """The calls that diffusers' pipelines make."""
    text = rows.get("encoder_hidden_states")
    if name in ("sd", "lcm", "sdxl"):
        added = {key: rows[key] for key in ("text_embeds", "time_ids") if key in rows}
        options = {"timestep_cond": rows.get("timestep_cond"), "added_cond_kwargs": added or None}
        return model(x, t, text, encoder_attention_mask=rows["encoder_attention_mask"], **options).sample
    if name == "dit":
        return model(x, t, rows["class_labels"]).sample
    if name.startswith("pixart"):
        sizes = {"resolution": rows.get("resolution"), "aspect_ratio": rows.get("aspect_ratio")}
        mask = rows["encoder_attention_mask"]
        return model(x, text, timestep=t, added_cond_kwargs=sizes, encoder_attention_mask=mask).sample
    if name == "sana":
        return model(x, text, t, encoder_attention_mask=rows["encoder_attention_mask"]).sample
    if name.startswith("sd3"):
        return model(x, text, rows["pooled_projections"], t).sample
    height, width = x.shape[2] // 2, x.shape[3] // 2
    tokens = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
    ids = torch.tensor([[0.0, row, column] for row in range(height) for column in range(width)])
    none = torch.zeros(rows["encoder_hidden_states"].shape[1], 3)
    out = model(tokens, text, rows["pooled_projections"], t / 1000, ids, none, rows["guidance"]).sample
    return nn.functional.fold(out.transpose(1, 2), x.shape[2:], 2, stride=2)


@pytest.mark.parametrize("name", small.TINY)
def test_a_model_is_called_as_its_pipeline_calls_it(name: str) -> None:
    model = small.model(name).eval()
    rows = {bank: values[:2] for bank, values in small.banks(model).items()}
    x, t = small.cache(name).latents[:2], torch.tensor([3.0, 700.0])
    with torch.no_grad():
        output = Predictor(model)(x, t, rows)
        assert torch.equal(output, direct(name, model, x, t, rows)) and output.shape[2:] == x.shape[2:]
        assert not torch.equal(output, Predictor(model)(x, t, {bank: row.flip(0) for bank, row in rows.items()}))


@pytest.mark.parametrize("name", small.TINY)
def test_a_student_of_every_family_is_trained(name: str) -> None:
    tap = small.tap(name)
    teacher, student = small.model(name), small.model(name, seed=1)
    run = tiny.trainer(
        teacher, student, tiny.features((tap, tap)), latents=small.cache(name), prompts=small.bank(name), steps=2
    )
    before = [p.clone() for p in student.parameters()]
    history = run.fit().history
    assert len(history) == 2 and all(entry["output"] > 0 and entry["feature"] > 0 for entry in history)
    assert sum(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True)) > len(before) // 2
    run.close()


def test_flux_packs_squares_of_two() -> None:
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    assert torch.equal(unpacked(packed(x), (2, 3, 4, 6)), x)
    assert packed(x)[0, 1].tolist() == [v for c in range(3) for v in x[0, c, :2, 2:4].flatten().tolist()]
    assert positions(2, 3, x.device).tolist()[4] == [0, 1, 1]


def test_labels_of_dit_are_dropped_by_the_draw_alone() -> None:
    model = small.model("dit").train()
    drops = [m for m in model.modules() if hasattr(m, "dropout_prob")]
    assert len(drops) == 4 and all(m.dropout_prob == 0.1 for m in drops)
    undo = family_of(model).prepare(model)
    assert all(m.dropout_prob == 0 for m in drops)
    undo()
    assert all(m.dropout_prob == 0.1 for m in drops)


def test_families_are_found_and_named() -> None:
    for name, (family, _) in small.TINY.items():
        assert find(small.model(name)) is family_named(family)
    assert find(torch.compile(small.model("dit"))) is family_named("dit")  # type: ignore[arg-type]
    assert find(tiny.Net()) is None
    with pytest.raises(InputError, match=r"model: expected a model of diffusers, one of UNet2D.*, got Net"):
        family_of(tiny.Net())
    with pytest.raises(InputError, match=r"family: expected one of unet, .*got 'flx' \(did you mean flux\?\)"):
        family_named("flx")


def refused(name: str, message: str, change: dict[str, Any], latents: Any = None) -> None:
    model = small.model(name)
    given = {k: v for k, v in (small.banks(model) | change).items() if v is not None}
    with pytest.raises(InputError, match=re.escape(message)):
        family_of(model).check("teacher", model, latents or (6, small.cache(name).latents.shape[1], 8, 8), given)


def test_what_does_not_fit_is_named() -> None:
    rows = torch.zeros(4, 5, 9)
    refused("sdxl", "prompts: expected banks text_embeds too (the teacher is a UNet2D", {"text_embeds": None})
    message = "prompts['text_embeds']: expected rows of width 10 (projection_class_embeddings_input_dim of the teacher"
    refused("sdxl", message, {"text_embeds": torch.zeros(4, 9)})
    refused(
        "lcm", "prompts['timestep_cond']: expected rows of width 6 (time_cond", {"timestep_cond": torch.zeros(4, 5)}
    )
    refused("sd", "prompts: expected banks among encoder_hidden_states, ", {"text_embeds": torch.zeros(4, 9)})
    refused(
        "sd3", "expected rows of width 12 (joint_attention_dim of the teacher), got 9", {"encoder_hidden_states": rows}
    )
    refused("sana", "expected rows of width 12 (caption_channels of the", {"encoder_hidden_states": rows})
    refused("sd3", "expected rows of shape [any, 12], got [12]", {"encoder_hidden_states": torch.zeros(4, 12)})
    refused("dit", "prompts['class_labels'][2]: expected 0 to 5 (num", {"class_labels": torch.tensor([0, 5, 6, 0])})
    refused("dit", "prompts['class_labels']: expected integers, got torch.float32", {"class_labels": torch.zeros(4)})
    refused("flux", "prompts['guidance']: expected floating point", {"guidance": torch.zeros(4, dtype=torch.int64)})
    refused("flux", "latents: expected 4 channels (in_channels / 4 of the teacher), got 16", {}, latents=(6, 16, 8, 8))


def test_a_model_of_no_family_is_called_as_it_is_told() -> None:
    class Own(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net = tiny.Net(seed=seed)

        def forward(self, text: Tensor, image: Tensor, at: Tensor) -> Tensor:
            return self.net(image, at, text)  # type: ignore[no-any-return]

    run = tiny.trainer(Own(0), Own(1), tiny.features(("net.mid", "net.mid")), call=lambda model, x, t, rows: model(
        rows["encoder_hidden_states"], x, t))  # fmt: skip
    plain = tiny.trainer(tiny.Net(), tiny.Net(seed=1))
    assert [e["loss"] for e in run.fit().history] == [e["loss"] for e in plain.fit().history]
    with pytest.raises(
        InputError, match=r"teacher: expected .*\(call= says how another one is called\), got TypeError"
    ):
        tiny.trainer(Own(0), Own(1), tiny.features(("net.mid", "net.mid")), prompts=tiny.bank())


def test_a_student_of_sdxl_is_made_and_trained() -> None:
    """It has fewer layers and transformer blocks, taps at its self-attentions, and gets all inputs of SDXL."""
    spec = {"layers_per_block": 1, "transformer_layers": [1, 1], "taps": "self_attention"}
    teacher = small.model("sdxl")
    made = make_student(teacher, spec)
    assert made.student_taps[1:] == (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
        "up_blocks.0.attentions.0.transformer_blocks.0.attn1",
        "up_blocks.0.attentions.1.transformer_blocks.0.attn1",
        "up_blocks.1.resnets.1.conv2",
    )
    objective = tiny.features(*zip(made.teacher_taps, made.student_taps, strict=True))
    run = tiny.trainer(teacher, made, objective, latents=small.cache("sdxl"), prompts=small.bank("sdxl"))
    assert run.fit().history[0]["feature"] > 0
    with pytest.raises(InputError, match=r"spec.transformer_layers: expected one value for each of 2 stages"):
        make_student(teacher, {"transformer_layers": [1]})
    with pytest.raises(InputError, match=r"spec.taps: expected one of blocks, self_attention, got"):
        make_student(teacher, {"taps": "none", "layers_per_block": 1})


def test_v_prediction_with_zero_terminal_snr() -> None:
    """Stable Diffusion 2.x: the scheduler states what the models predict; the last timestep is pure noise."""
    scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    data = {"latents": small.cache("sd"), "prompts": small.bank("sd"), "schedule": scheduler}
    run = tiny.trainer(small.model("sd"), small.model("sd", 1), tiny.features(("mid_block",) * 2), **data)
    assert run._setting.prediction_type == "v_prediction" and run._setting.schedule.signal[-1] == 0
    assert run.fit().history[0]["output"] > 0
