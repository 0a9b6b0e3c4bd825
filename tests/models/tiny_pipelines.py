# SPDX-License-Identifier: Apache-2.0
"""A tiny pipeline of every family, saved by diffusers; all except DiT's have text encoders of transformers."""

from __future__ import annotations

import inspect
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from fastdistill.models.families import family_named
from fastdistill.models.families.flux import packed
from tests.models import tiny_families as small
from tests.processes import once

SIZE = (32, 32)  # image size in pixels; the latents are 16 x 16
NOISE = 3  # seed of ``noise``
_LETTERS = [*string.ascii_lowercase, *string.digits, *string.punctuation]
_FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}

#: Pipeline, denoiser (from ``tiny_families``) with changes to its configuration, text encoders by width, scheduler.
PIPELINES: dict[str, tuple[str, str, dict[str, Any], list[tuple[str, int]], Any]] = {
    "dit": ("DiTPipeline", "dit", {"num_embeds_ada_norm": 1000, "sample_size": 16}, [],
            diffusers.DDIMScheduler(clip_sample=False)),
    "sd": ("StableDiffusionPipeline", "sd", {}, [("CLIPTextModel", 8)],
           diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear")),
    "lcm": ("LatentConsistencyModelPipeline", "lcm", {}, [("CLIPTextModel", 8)], diffusers.LCMScheduler()),
    "sdxl": ("StableDiffusionXLPipeline", "sdxl", {}, [("CLIPTextModel", 4), ("CLIPTextModelWithProjection", 4)],
             diffusers.EulerDiscreteScheduler()),
    "pixart_alpha": ("PixArtAlphaPipeline", "pixart_alpha", {"sample_size": 128}, [("T5EncoderModel", 12)],
                     diffusers.DPMSolverMultistepScheduler()),
    "pixart_sigma": ("PixArtSigmaPipeline", "pixart_sigma", {}, [("T5EncoderModel", 12)],
                     diffusers.DPMSolverMultistepScheduler()),
    "sd3": ("StableDiffusion3Pipeline", "sd3", {},
            [("CLIPTextModelWithProjection", 4), ("CLIPTextModelWithProjection", 4), ("T5EncoderModel", 12)],
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "flux": ("FluxPipeline", "flux", {}, [("CLIPTextModel", 10), ("T5EncoderModel", 12)],
             diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
    "sana": ("SanaPipeline", "sana", {}, [("Gemma2Model", 12)], diffusers.DPMSolverMultistepScheduler(**_FLOW)),
}  # fmt: skip


def saver(factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the folder of a pipeline by its name; the folder is created at the first request. Tests
    change copies of it."""
    return lambda name: once(factory, f"pipelines/{name}", lambda folder: save(name, folder))


def save(name: str, folder: Path) -> Path:
    """The pipeline of this name, saved in ``folder``."""
    kind, model, changes, encoders, scheduler = PIPELINES[name]
    family = family_named(small.TINY[model][0])
    parts: dict[str, Any] = {"scheduler": scheduler, "vae": autoencoder(name)}
    parts[family.part] = noisy(family.kind(**small.TINY[model][1] | changes))
    for place, (encoder, width) in enumerate(encoders):
        suffix = f"_{place + 1}" if place else ""
        text_encoder, tokenizer = text(encoder, width, 10 if name == "sdxl" else 5)
        parts |= {f"text_encoder{suffix}": text_encoder, f"tokenizer{suffix}": tokenizer}
    if kind in ("StableDiffusionPipeline", "LatentConsistencyModelPipeline"):
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    getattr(diffusers, kind)(**parts).save_pretrained(folder)
    (folder / "LICENSE.md").write_text("as you like")
    if name == "dit":
        change(folder / "model_index.json", id2label={"3": "white cat, tom", "7": "dog"})
    return folder


def change(file: Path, **changes: Any) -> None:
    """Change some values of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def noisy(model: nn.Module, seed: int = 0) -> Any:
    """A model with random nonzero weights from ``seed``; behind zeros, errors would not be visible."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def autoencoder(name: str, **options: Any) -> Any:
    """A VAE with a factor of 2."""
    if name == "sana":
        kinds, layers = ("ResBlock", "EfficientViTBlock"), {"layers_per_block": (1, 1), "block_out_channels": (8, 8)}
        both = {"block_types": kinds, "qkv_multiscales": ((), (5,)), **layers}
        halves = {f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in both.items()}
        shape = {"latent_channels": 4, "attention_head_dim": 2, "scaling_factor": 0.41407}
        kind = {"upsample_block_type": "interpolate", "downsample_block_type": "conv"}
        return noisy(diffusers.AutoencoderDC(**halves, **shape, **kind, **options))
    shift = {"shift_factor": 0.0609} if name in ("sd3", "flux") else {}
    stages = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return noisy(diffusers.AutoencoderKL(**stages, **blocks, **shift, **options))


def text(kind: str, width: int, projected: int) -> tuple[Any, Any]:
    """A text encoder with this class and width, and a tokenizer for single letters."""
    import transformers

    sizes = {"num_attention_heads": 2, "num_hidden_layers": 2}
    if kind.startswith("CLIP"):
        endings = [letter + "</w>" for letter in _LETTERS]
        vocabulary = [*_LETTERS, *endings, "<|startoftext|>", "<|endoftext|>"]
        numbers = {token: number for number, token in enumerate(vocabulary)}
        tokenizer = transformers.CLIPTokenizer(vocab=numbers, merges=[], model_max_length=12)
        ids = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
        shape = {"hidden_size": width, "intermediate_size": 8, "projection_dim": projected, **sizes, **ids}
        config = transformers.CLIPTextConfig(vocab_size=len(vocabulary), max_position_embeddings=12, **shape)
    elif kind == "T5EncoderModel":
        scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in ("▁", *_LETTERS))]
        tokenizer = transformers.T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=512)
        config = transformers.T5Config(vocab_size=len(scores), d_model=width, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    else:
        vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *_LETTERS, *string.ascii_uppercase]
        numbers = {token: number for number, token in enumerate(vocabulary)}
        tokenizer = transformers.GemmaTokenizer(vocab=numbers, merges=[])
        shape = {"hidden_size": width, "intermediate_size": 8, "head_dim": 4, "num_key_value_heads": 2, **sizes}
        config = transformers.Gemma2Config(vocab_size=len(vocabulary), pad_token_id=0, **shape)
    return noisy(getattr(transformers, kind)(config)), tokenizer


def sampled(pipeline: Any, name: str, x: torch.Tensor, prompts: list[Any], scale: float, steps: int) -> torch.Tensor:
    """Images [B, 3, H, W] in [0, 1] from the whole pipeline of diffusers, with this noise."""
    pipeline.set_progress_bar_config(disable=True)
    if name == "dit":  # it draws its own noise
        given: dict[str, Any] = {"class_labels": prompts, "generator": torch.Generator().manual_seed(NOISE)}
    else:
        start = packed(x) if name == "flux" else x
        given = {"prompt": prompts, "latents": start, "height": SIZE[0], "width": SIZE[1]}
        if "use_resolution_binning" in inspect.signature(type(pipeline).__call__).parameters:
            given["use_resolution_binning"] = False
    if name not in ("flux", "lcm"):
        given["guidance_scale"] = scale
    images: torch.Tensor = pipeline(num_inference_steps=steps, output_type="pt", **given).images
    return images if isinstance(images, torch.Tensor) else torch.from_numpy(images).permute(0, 3, 1, 2)


def noise(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(NOISE))


def save_other(folder: Path) -> Path:
    """A pipeline whose model belongs to no family: AuraFlow's, with two lists of blocks."""
    text_encoder, tokenizer = text("T5EncoderModel", 12, 5)
    sizes = {"num_mmdit_layers": 2, "num_single_dit_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8}
    widths = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pos_embed_max_size": 64, "sample_size": 8}
    model = noisy(diffusers.AuraFlowTransformer2DModel(**sizes, **widths, in_channels=4, out_channels=4))
    parts = {"text_encoder": text_encoder, "tokenizer": tokenizer, "vae": autoencoder("sd"), "transformer": model}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    diffusers.AuraFlowPipeline(**parts, scheduler=scheduler).save_pretrained(folder)
    return folder
