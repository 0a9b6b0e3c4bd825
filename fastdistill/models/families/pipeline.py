# SPDX-License-Identifier: Apache-2.0
"""A family's pipelines in diffusers: how they encode prompts, and the latents of their models."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdistill.data.texts import checked, listed
from fastdistill.errors import InputError, described

_GUIDANCE = {"guidance", "timestep_cond"}  # banks with the guidance scale
_OWN = {"prompt", "device", "num_images_per_prompt", "do_classifier_free_guidance", "negative_prompt", "self", "kwargs"}
_LARGEST = 2**16  # pixels per side of an image


class OfPipelines:
    """The part of a ``Family`` that has to do with pipelines.

    pipelines: classes of diffusers that sample from its models. part: the component with the model. aliases: other
    names under which the model's class was published. encoded: for each bank the positions of the prompts' rows and of
    the null prompt's in the output of ``encode_prompt``. bins: the module of diffusers with the tables of sizes for
    ``use_resolution_binning``, and the pixels per unit of ``sample_size`` that select the table.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
    part: ClassVar[str] = "transformer"
    aliases: ClassVar[tuple[str, ...]] = ()
    encoded: ClassVar[Mapping[str, tuple[int, int]]] = {}
    bins: ClassVar[tuple[str, int] | None] = None

    def conditions(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        raise NotImplementedError

    def channels(self, config: Mapping[str, Any]) -> int:
        raise NotImplementedError

    def patch(self, config: Mapping[str, Any]) -> int:
        """Rows and columns of a latent per token."""
        return int(config.get("patch_size") or 1)

    def encode(
        self,
        pipeline: Any,
        prompts: Any,
        *,
        config: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """The rows [B, ...] of ``prompts`` in every bank that the model needs, as the pipeline encodes them.

        Args:
            pipeline: one of ``pipelines`` with its text encoders; it needs neither model nor VAE.
            prompts: B texts; for DiT the names of classes, or their numbers as text.
            config: of the model; None: that of the pipeline's model.
            size: height and width in pixels, inputs of SDXL and PixArt-alpha; None: the size for which the model was
                made.
            guidance_scale: an input of guidance-distilled models (Flux, LCM); None: the default of the pipeline.
            options: further arguments of the pipeline's ``encode_prompt``, such as ``max_sequence_length`` or
                ``clip_skip``; without them, the defaults of its call.

        Raises:
            InputError: a pipeline of another family, without text encoders or model; invalid texts; an option that
                ``encode_prompt`` does not have. All before anything is encoded.
        """
        texts = listed(prompts, "prompts")
        if not texts:
            raise InputError.of("prompts", "at least one text", "none")
        return self._rows(pipeline, texts, False, config, size, guidance_scale, options)

    def encode_null(
        self,
        pipeline: Any,
        text: str = "",
        *,
        config: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """The row [1, ...] of the null prompt in every bank: the negative side of the pipeline's guidance.

        It is not always the encoding of the empty text: SDXL has zeros (``force_zeros_for_empty_prompt``), Sana leaves
        its instruction out, DiT has a class for it. text: a negative prompt instead. Other arguments as in ``encode``.
        """
        return self._rows(pipeline, [checked(text, "text")], True, config, size, guidance_scale, options)

    def _rows(
        self,
        pipeline: Any,
        texts: list[str],
        null: bool,
        config: Mapping[str, Any] | None,
        size: tuple[int, int] | None,
        guidance_scale: float | None,
        options: dict[str, Any],
    ) -> dict[str, Tensor]:
        config = self._config(pipeline, config)
        if guidance_scale is None:
            guidance_scale = float(inspect.signature(type(pipeline).__call__).parameters["guidance_scale"].default)
        own = self.added(pipeline, config, size, guidance_scale)
        with torch.no_grad():
            rows = self._encode(pipeline, texts, null, config, options)
        for name, value in own.items():
            rows[name] = value.to(pipeline._execution_device).expand(len(texts), *value.shape).contiguous()
        wanted = self.conditions(config)
        return {name: rows[name] for name in wanted if name in rows}

    def _config(self, pipeline: Any, config: Mapping[str, Any] | None) -> Mapping[str, Any]:
        if type(pipeline).__name__ not in self.pipelines:
            raise InputError.of("pipeline", " or ".join(self.pipelines), described(pipeline))
        if config is None:
            model = getattr(pipeline, self.part, None)
            if model is None:
                rule = f"a pipeline with its {self.part}, or that model's config="
                raise InputError.of("pipeline", rule, f"{type(pipeline).__name__} without")
            config = model.config
        return config

    def _encode(
        self, pipeline: Any, texts: list[str], null: bool, config: Mapping[str, Any], options: dict[str, Any]
    ) -> dict[str, Tensor]:
        takes = inspect.signature(pipeline.encode_prompt).parameters
        for name in options:
            if name not in takes or name in _OWN:
                rule = f"options among {', '.join(sorted(takes.keys() - _OWN))}"
                raise InputError.of("options", rule, name)
        encoders = [name for name in pipeline.components if name.startswith("text_encoder")]
        if all(getattr(pipeline, name, None) is None for name in encoders):
            raise InputError.of("pipeline", "one with its text encoders", f"{type(pipeline).__name__} without")
        call = inspect.signature(type(pipeline).__call__).parameters
        given = {n: p.default for n, p in call.items() if n in takes and p.default is not inspect.Parameter.empty}
        absent = [name for name in ("bs4", "ftfy") if importlib.util.find_spec(name) is None]
        if absent and options.get("clean_caption"):
            raise InputError.of("clean_caption", "bs4 and ftfy, which it needs", f"no {' and no '.join(absent)}")
        if absent and given.get("clean_caption"):
            given["clean_caption"] = False  # as in the pipeline, but there with a warning at each call
        given |= {"prompt": texts, "device": pipeline._execution_device, "num_images_per_prompt": 1}
        if "do_classifier_free_guidance" in takes:
            given["do_classifier_free_guidance"] = null
            if null and texts != [""]:
                given |= {"prompt": [""], "negative_prompt": texts}
        with _Truncated.told_once(pipeline):
            outputs = pipeline.encode_prompt(**given | options)
        return {bank: outputs[places[null]] for bank, places in self.encoded.items() if places[null] < len(outputs)}

    def added(
        self, pipeline: Any, config: Mapping[str, Any], size: tuple[int, int] | None, guidance_scale: float
    ) -> dict[str, Tensor]:
        """The model's inputs besides the encoding of a prompt, a row for each bank."""
        return {"guidance": torch.tensor(guidance_scale)} if config.get("guidance_embeds") else {}

    def of_size(self, config: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Tensor]:
        """The part of ``added`` with the size of the images."""
        return {}

    def reads_guidance(self, config: Mapping[str, Any]) -> bool:
        """Whether the guidance scale is an input of the model, as in guidance-distilled models."""
        return self.guidance_bank(config) is not None

    def guidance_bank(self, config: Mapping[str, Any]) -> str | None:
        """The bank with the guidance weight for a model of this configuration; None: it has no such input."""
        return next((bank for bank in self.conditions(config) if bank in _GUIDANCE), None)

    def guidance_rows(self, config: Mapping[str, Any], w: Tensor) -> Tensor:
        """The rows of that bank for guidance weights w [B] (g - 1 for a guidance scale g), in float32 or above."""
        raise InputError.of("model", "one that reads the guidance weight", f"a {self}")

    def guided(self, config: Mapping[str, Any], guidance_scale: float) -> float:
        """The scale of classifier-free guidance in the pipelines: 1 (no guidance) if it is not above 1 or is an input
        of the model."""
        return 1.0 if guidance_scale <= 1 or self.reads_guidance(config) else guidance_scale

    def length(self, kind: str, longest: int) -> int:
        """Tokens of a prompt in a pipeline of class ``kind``; ``longest``: the maximum of its first tokenizer."""
        import diffusers

        call = inspect.signature(getattr(diffusers, kind).__call__).parameters
        return int(call["max_sequence_length"].default) if "max_sequence_length" in call else longest

    def row(self, config: Mapping[str, Any], kind: str, longest: int) -> dict[str, Tensor]:
        """A row of each bank that ``encode`` makes, without values (on the meta device). Arguments as in ``length``."""
        length, found = self.length(kind, longest), {}
        for name, condition in self.conditions(config).items():
            if condition.required or not condition.integer or name in self.encoded:
                shape = [length if size is None else size for size in condition.shape]
                dtype = torch.int64 if condition.integer else torch.float32
                found[name] = torch.empty(shape, dtype=dtype, device="meta")
        return found

    def scheduler(self, kind: str, scheduler: Any) -> Any:
        """The scheduler of a folder, with the changes that a pipeline of class ``kind`` makes."""
        return scheduler

    def size(self, config: Mapping[str, Any], factor: int) -> tuple[int, int]:
        """Height and width in pixels for which a model was made; ``factor``: image pixels per latent position."""
        found = config.get("sample_size")
        if found is None:
            raise InputError.of("size", "height and width, as the model's sample_size does not say them", None)
        height, width = (found, found) if isinstance(found, int) else found
        return int(height) * factor, int(width) * factor

    def latent_shape(
        self, config: Mapping[str, Any], vae: Mapping[str, Any], size: tuple[int, int] | None = None
    ) -> tuple[int, int, int]:
        """[C, H, W] of the latents for images of ``size`` (height, width); None: the size for which the model was made.

        config, vae: configurations of the model and of the VAE. There is a warning for a size on which the model was
        not trained and which its pipeline would replace by the nearest one (PixArt, Sana).

        Raises:
            InputError: a size that is not a multiple of the VAE's factor times the model's patch, or is larger than the
                model's positions allow.
        """
        factor = vae_factor(vae)
        height, width = self.size(config, factor) if size is None else _two(size)
        unit = factor * self.patch(config)
        most = config.get("pos_embed_max_size")
        for name, length in (("height", height), ("width", width)):
            if length < unit or length % unit:
                raise InputError.of(name, f"a multiple of {unit} pixels", length)
            if length > _LARGEST:
                raise InputError.of(name, f"at most {_LARGEST:,} pixels", length)
            if most is not None and length > most * unit:
                raise InputError.of(name, f"at most {most * unit} pixels (pos_embed_max_size {most})", length)
        if size is not None:
            self._warn_between_bins(config, height, width)
        return self.channels(config), height // factor, width // factor

    def _warn_between_bins(self, config: Mapping[str, Any], height: int, width: int) -> None:
        if self.bins is None:
            return
        module, factor = self.bins
        try:
            sizes = getattr(importlib.import_module(module), f"ASPECT_RATIO_{config['sample_size'] * factor}_BIN", {})
        except ImportError:  # without transformers
            return
        if sizes and [height, width] not in sizes.values():
            nearest = " x ".join(
                f"{length:.0f}" for length in sizes[min(sizes, key=lambda r: abs(float(r) - height / width))]
            )
            told = (
                f"size: {height} x {width} is none that the model was trained on; the nearest one, which its pipeline"
            )
            warnings.warn(f"{told} would take, is {nearest}", stacklevel=3)

    @torch.no_grad()
    def decode(self, vae: Any, latents: Tensor, *, batch: int = 8) -> Tensor:
        """Images [B, 3, height, width], float32 in [0, 1] on the VAE's device, of the model's latents [B, C, H, W].

        vae: of a pipeline, or a pipeline with one; its ``scaling_factor``, ``shift_factor``, ``latents_mean`` and
        ``latents_std`` are applied. A float16 VAE that would overflow (``force_upcast``) is used in float32.
        """
        vae = _vae_for(vae, latents, "latent_channels", "latents")
        images = []
        with _safe(vae):
            for part in torch.split(latents, batch):
                part = unscaled(vae.config, part.to(vae.device, torch.promote_types(part.dtype, torch.float32)))
                images.append(vae.decode(part.to(vae.dtype), return_dict=False)[0].float())
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def to_latents(self, vae: Any, images: Tensor, *, batch: int = 8) -> Tensor:
        """The inverse of ``decode``: latents [B, C, H, W] float32 of images [B, 3, height, width] in [0, 1].

        They are the most probable latents, without the noise of the VAE's posterior.
        """
        vae = _vae_for(vae, images, "in_channels", "images")
        latents = []
        with _safe(vae):
            for part in torch.split(images, batch):
                encoded = vae.encode((part.to(vae.device) * 2 - 1).to(vae.dtype))
                found = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
                latents.append(scaled(vae.config, found.float()))
        return torch.cat(latents)


class _Truncated(logging.Filter):
    """Shows only the first message of a pipeline about truncated prompts: a pool can have millions of them."""

    told: ClassVar[set[str]] = set()  # pipelines whose message was shown

    def filter(self, record: logging.LogRecord) -> bool:
        if "was truncated because" not in record.msg:
            return True
        first = record.name not in self.told
        self.told.add(record.name)
        return first

    @classmethod
    @contextmanager
    def told_once(cls, pipeline: Any) -> Iterator[None]:
        logger, own = logging.getLogger(type(pipeline).__module__), cls()
        logger.addFilter(own)
        try:
            yield
        finally:
            logger.removeFilter(own)


def vae_factor(config: Mapping[str, Any]) -> int:
    """Image pixels per latent position, in height and width, for a VAE with this configuration."""
    stages = config.get("encoder_block_out_channels") or config.get("block_out_channels")
    if not stages:
        raise InputError.of("vae", "a configuration with block_out_channels", ", ".join(config))
    return int(2 ** (len(stages) - 1))


def unscaled(config: Mapping[str, Any], latents: Tensor) -> Tensor:
    """The VAE's input for decoding (with this configuration), from the model's latents."""
    scale = config.get("scaling_factor") or 1.0
    if (moments := _moments(config, latents)) is not None:
        mean, std = moments
        return latents * std / scale + mean
    return latents / scale + (config.get("shift_factor") or 0.0)


def scaled(config: Mapping[str, Any], encoded: Tensor) -> Tensor:
    """The inverse of ``unscaled``."""
    scale = config.get("scaling_factor") or 1.0
    if (moments := _moments(config, encoded)) is not None:
        mean, std = moments
        return (encoded - mean) * scale / std
    return (encoded - (config.get("shift_factor") or 0.0)) * scale


def _moments(config: Mapping[str, Any], like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of each channel, if the configuration has both."""
    found = [config.get(name) for name in ("latents_mean", "latents_std")]
    if any(values is None for values in found):
        return None
    mean, std = (torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1) for values in found)
    return mean, std


def _vae_for(vae: Any, given: Any, channels: str, argument: str) -> Any:
    vae = getattr(vae, "vae", vae)
    if not hasattr(vae, "decode") or not hasattr(vae, "config"):
        raise InputError.of("vae", "a VAE of diffusers, or a pipeline with one", described(vae))
    wanted = vae.config.get(channels)
    if not isinstance(given, Tensor) or given.ndim != 4 or (wanted is not None and given.shape[1] != wanted):
        got = tuple(given.shape) if isinstance(given, Tensor) else described(given)
        raise InputError.of(argument, f"a tensor [B, {wanted or 'C'} ({channels} of the VAE), height, width]", got)
    return vae


@contextmanager
def _safe(vae: Any) -> Iterator[None]:
    """In float32, if float16 overflows in this VAE."""
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast")
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)


def _two(size: Any) -> tuple[int, int]:
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(isinstance(length, int) for length in size):
        raise InputError.of("size", "height and width in pixels", described(size))
    return size[0], size[1]
