# SPDX-License-Identifier: Apache-2.0
"""Pipeline folders of diffusers: their contents, the parts that distillation needs, and export of a student."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistill import files
from fastdistill.data.encoded import rows_of
from fastdistill.data.fingerprint import listed as some
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.data.texts import listed
from fastdistill.diffusion.flow import schedule_of
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.sampler import initial_noise
from fastdistill.diffusion.schedule import PredictionType, Schedule, check_prediction_type
from fastdistill.diffusion.scheduled import sample_with, set_timesteps
from fastdistill.errors import FastdistillError, InputError, StorageError, quoted
from fastdistill.models import families
from fastdistill.models.calling import Call, with_guidance
from fastdistill.models.export import INDEX, export
from fastdistill.models.folder_files import WEIGHTS, deciding, read_json, variant_in
from fastdistill.models.weights import weights_hash

_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # not used for sampling from texts


def open_pipeline(folder: str | os.PathLike[str], *, any_model: bool = False) -> PipelineFolder:
    """Open a pipeline folder of diffusers (``DiffusionPipeline.save_pretrained``); no weights are read.

    Args:
        any_model: also accept a model of no known family; it must be called by a function (``call``). If its class is
            not from diffusers, its module is imported, which runs the user's own code.

    Raises:
        StorageError: no folder, or a file that is missing or damaged.
        InputError: a pipeline whose model has no family (``fastdistill.models.families``); with ``any_model``, a
            pipeline without a model, or whose prompts are encoded differently than in diffusers' class.
    """
    path = files.located(folder, "folder")
    if not path.is_dir():
        hint = " (download a model of the Hub first: huggingface_hub.snapshot_download)" if not path.exists() else ""
        raise StorageError(f"{path}: expected a pipeline folder of diffusers, got no folder{hint}")
    index = read_json(path / INDEX)
    kind = index.get("_class_name")
    family = next((family for family in families.FAMILIES.values() if kind in family.pipelines), None)
    if family is None and not any_model:
        known = ", ".join(name for family in families.FAMILIES.values() for name in family.pipelines)
        got = f"{kind!r} (a model of another kind is called by a function of your own: call)"
        raise InputError.of(f"{path / INDEX}: _class_name", f"one of {known}", got)
    part = families.other.denoiser(str(path / INDEX), index) if family is None else family.part
    entry = index.get(part)
    library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    config = read_json(path / part / "config.json") if name is not None else {}
    if family is None or name not in (family.kind.__name__, *family.aliases):
        if not any_model or name is None:
            rule = "a model" if family is None else " or ".join((family.kind.__name__, *family.aliases))
            hint = "" if name is None else " (call, a function of your own, calls another model)"
            raise InputError.of(f"{path / INDEX}: {part}", rule, f"{name}{hint}")
        model = families.other.model_class(f"{path / INDEX}: {part}", str(library), str(name))
        family = families.other.other_family(f"{path / INDEX}: _class_name", family, str(kind), part, model, config)
    return PipelineFolder(path, str(kind), family, index, families.other.defaults(family.kind) | config)


@dataclass(frozen=True, eq=False)
class PipelineFolder:
    """A pipeline folder; ``open_pipeline`` makes it.

    kind: the class of the pipeline. family: the family of its model. index: the content of ``model_index.json``.
    config: the configuration of the model, with the defaults of its class. A ``size`` is (height, width) of images in
    pixels; None: the size for which the model was made.
    """

    path: Path
    kind: str
    family: families.Family
    index: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.resolve().name

    @cached_property
    def vae(self) -> dict[str, Any]:
        """The configuration of the VAE."""
        return read_json(self.path / "vae" / "config.json")

    @cached_property
    def variant(self) -> str | None:
        """The ``variant`` of weights with which the folder is loaded: ``fp16`` if a component has no other weights."""
        folders = [self.path / name for name in self.components()]
        return next(filter(None, (variant_in(folder) for folder in folders if folder.is_dir())), None)

    def size(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Height and width in pixels of the images that belong to ``latent_shape(size)``."""
        _, height, width = self.latent_shape(size)
        factor = families.vae_factor(self.vae)
        return height * factor, width * factor

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """[C, H, W] of the latents of images of this size; InputError for a size that the model does not support."""
        with _read(self.path, "used", f"the configurations of {self.family.part} and vae "):
            return self.family.latent_shape(self.config, self.vae, size)

    def scheduler(self) -> Any:
        """The scheduler of diffusers with the pipeline's settings: for ``sample_with``, or as a trainer's schedule."""
        return self.family.scheduler(self.kind, self._part("scheduler"))

    def schedule(self, size: tuple[int, int] | None = None) -> Schedule:
        """The noise with which the model is trained, from its scheduler; a dynamic shift depends on ``size``."""
        return schedule_of(self.scheduler(), self.family.tokens(self.config, self.latent_shape(size)))

    @property
    def prediction_type(self) -> PredictionType:
        """What the model predicts: from the scheduler, or else the default of the family."""
        stated = self.scheduler().config.get("prediction_type") or self.family.prediction_type
        return check_prediction_type(stated or self.schedule().prediction_types[0])

    def model(self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """The denoiser in eval mode. On the meta device it has no values, and no weights are read."""
        kind: Any = self.family.kind
        if torch.device(device).type == "meta":
            with torch.device("meta"), _read(self.path / self.family.part / "config.json", "used"):
                model = kind.from_config(dict(self.config)).eval()
            return model if dtype == torch.float32 else model.to(dtype)
        return self._loaded(kind, self.family.part, dtype).to(device).eval()

    def autoencoder(self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """The VAE in eval mode, for ``family.decode``."""
        return self._loaded(self._class("vae"), "vae", dtype).to(device).eval()

    def encoders(self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """The pipeline without model and VAE, for ``family.encode``. On the meta device it has no values."""
        import diffusers

        left_out = {name: None for name in (self.family.part, "vae", *_UNUSED) if name in self.index}
        for name in self.components().keys() - left_out:
            self._folder(name)
        options: dict[str, Any] = {"variant": self.variant, **_as(dtype)}
        if "safety_checker" in left_out:
            options["requires_safety_checker"] = False
        try:
            with _read(self.path, "loaded", "the text encoders "):
                kind = getattr(diffusers, self.kind)
                if torch.device(device).type == "meta":
                    options |= self._encoders_without_values()
                pipeline = kind.from_pretrained(str(self.path), local_files_only=True, **left_out, **options)
        except ImportError as error:
            message = (
                "transformers: expected to be installed for text encoders; run: pip install 'fastdistill[pipelines]'"
            )
            raise FastdistillError(f"{message} ({quoted(error)})") from error
        return pipeline.to(device)

    def encode(
        self, texts: Iterable[str], pipeline: Any = None, *, on_demand: bool = False, **options: Any
    ) -> PromptBank:
        """The bank of these texts and of the null prompt, encoded by the pipeline's own text encoders.

        Args:
            pipeline: with the text encoders; None: ``encoders()``.
            on_demand: prompts are encoded whenever their rows are read, for a pool whose encodings are too large to
                store; as long as a trainer has the bank, nothing else may use the pipeline.
            options: ``size``, ``guidance_scale`` and others from ``family.encode``; ``null_text``, ``batch`` and
                ``progress`` from ``PromptBank.build``, or ``dtype`` from ``PromptBank.on_demand``.
        """
        make = PromptBank.on_demand if on_demand else PromptBank.build
        own = {"null_text", "batch", "dtype" if on_demand else "progress"}
        build = {name: options.pop(name) for name in own & options.keys()}
        given: dict[str, Any] = options | {"size": self.size(options.get("size"))}
        texts = listed(texts)
        pipeline = self.encoders() if pipeline is None else pipeline
        encoders = {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder")}
        weights = {name: weights_hash(part) for name, part in encoders.items() if part is not None}
        return make(
            texts,
            lambda part: self.family.encode(pipeline, part, config=self.config, **given),
            encode_null=lambda text: self.family.encode_null(pipeline, text, config=self.config, **given),
            encoder={"pipeline": self.kind, "weights": weights, "options": given},
            **build,
        )

    def sized(self, prompts: PromptBank, size: tuple[int, int] | None = None) -> PromptBank:
        """The bank for images of another size: the rows with the size (SDXL, PixArt-alpha) are replaced."""
        said = self.family.of_size(self.config, self.size(size))
        rows = {name: row.expand(len(prompts) + 1, *row.shape) for name, row in said.items()}
        return replace(prompts, banks=prompts.banks | rows) if rows else prompts

    def own_prompts(self) -> list[str] | None:
        """The built-in prompts of the model: its classes, by a unique name or by number; None: it reads texts."""
        if any(name.startswith("text_encoder") for name in self.components()):
            return None
        names = self.index.get("id2label")
        if not names:
            return [str(number) for number in range(self.config["num_embeds_ada_norm"])]
        named = {int(number): [name.strip() for name in text.split(",")] for number, text in names.items()}
        found = {name: number for number, own in named.items() for name in own}  # as the pipeline interprets them
        return [
            next((name for name in own if name and found[name] == number), str(number))
            for number, own in sorted(named.items())
        ]

    def usual(self) -> dict[str, Any]:
        """Sections of a run file for this pipeline: steps and guidance are the defaults of its class."""
        import diffusers

        takes = inspect.signature(getattr(diffusers, self.kind).__call__).parameters
        named = {"steps": "num_inference_steps", "guidance_scale": "guidance_scale"}
        return {"cache": {field: takes[name].default for field, name in named.items() if name in takes}}

    def loads(self, base: str | None = None) -> list[str]:
        """Lines of Python that load the result of ``export``, or with a ``base``, adapters."""
        lines = ["from diffusers import DiffusionPipeline", ""]
        if base is None:
            return [*lines, 'pipeline = DiffusionPipeline.from_pretrained("this folder")']
        own = f'pipeline = DiffusionPipeline.from_pretrained("{base}")'
        return [*lines, own, 'pipeline.load_lora_weights("this folder")']

    def files(self, name: str) -> list[Path]:
        """The files of a component that affect what it computes."""
        return deciding(self._folder(name))

    def row(self) -> dict[str, Tensor]:
        """A row of each bank that ``encode`` makes, without values (on the meta device)."""
        if isinstance(self.family, families.Other):
            try:
                with _Unread():  # type: ignore[no-untyped-call]
                    found = self.family.encode_null(self.encoders(device="meta"), config=self.config)
            except (RuntimeError, TypeError) as error:
                rule = f"{self.kind} to encode without values, or prompts that are encoded already (fastdistill cache)"
                raise InputError.of("prompts", rule, quoted(error)) from error
            return {name: rows[0].to("meta") for name, rows in found.items()}
        place = self.path / "tokenizer" / "tokenizer_config.json"
        longest = read_json(place).get("model_max_length", 77) if place.exists() else 77
        return self.family.row(self.config, self.kind, int(longest))

    def sample(
        self,
        model: Any,
        prompts: PromptBank,
        prompt_index: Tensor,
        rows: Tensor | None = None,
        *,
        steps: int,
        guidance_scale: float | None = None,
        guidance: Guidance | float | str | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        call: Call | None = None,
    ) -> Tensor:
        """Latents [b, C, H, W] of prompts by the pipeline's scheduler, float32 on the model's device.

        Latent i depends only on its prompt and (seed, rows[i]), as ``generate_latent_cache`` requires.

        Args:
            model: teacher or student, in eval mode. prompt_index: [b] int64, rows of the bank.
            rows: [b] int64, numbers of the initial noise; None: 0..b-1.
            guidance_scale: as in diffusers. A model that has the scale as an input (LCM, Flux) gets the scale in the
                bank if there is one, otherwise this one, and is evaluated once per step. None: 1, or by ``guidance``.
            guidance: instead of guidance_scale, a schedule of w = g - 1; not for models that have the scale as an
                input. Other arguments are those of ``sample_with``.
        """
        if prompt_index.ndim != 1 or prompt_index.dtype != torch.int64:
            raise InputError.of("prompt_index", "int64 rows [b]", f"{prompt_index.dtype} {tuple(prompt_index.shape)}")
        outside = prompt_index[(prompt_index < 0) | (prompt_index > prompts.null_index)]
        if len(outside):
            raise InputError.of("prompt_index", f"rows of the bank, 0 to {prompts.null_index}", int(outside[0]))
        device = next(model.parameters()).device
        rows = torch.arange(len(prompt_index), device=device) if rows is None else rows.to(device)
        noise = initial_noise(seed, rows, self.latent_shape(size))
        given = rows_of(prompts.banks, prompt_index, device)
        null = {name: rows[0] for name, rows in rows_of(prompts.banks, slice(-1, None), device).items()}
        config = families.unwrapped(model).config if families.find(model) else self.config
        options: dict[str, Any] = {"steps": steps, "seed": seed, "rows": rows, "call": call, "guidance": guidance}
        if guidance is not None and self.family.reads_guidance(config):
            raise InputError.of("guidance", "None for a model that reads the guidance scale itself", str(guidance))
        if guidance is None:
            guidance_scale = 1.0 if guidance_scale is None else guidance_scale
            given, null = (with_guidance(model, banks, guidance_scale - 1) for banks in (given, null))
        if guidance_scale is not None:
            options["guidance_scale"] = self.family.guided(config, guidance_scale)
        return sample_with(self.scheduler(), model, noise, given, null, **options)

    def check_steps(
        self, model: Any, steps: int, guidance: Guidance | float | str | None = None, *, argument: str = "steps"
    ) -> None:
        """InputError unless ``sample`` can make this number of steps, and use the schedule ``guidance`` at the noise
        levels of these steps.

        Args:
            model: on any device, also meta. argument: the name of the steps in the message.
        """
        scheduler = self.scheduler()
        set_timesteps(scheduler, steps, self.latent_shape(), model, argument=argument)
        if guidance is not None:
            Guidance.parse(guidance).passes(Grid.visited(scheduler))

    def export(
        self,
        student: Any,
        target: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        link: bool = False,
        overwrite: bool = False,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """``target`` becomes this folder with ``student`` in place of its model (``fastdistill.models.export``)."""
        export(self, student, files.located(target, "target"), dtype=dtype, link=link, overwrite=overwrite, texts=texts)

    def components(self) -> dict[str, str]:
        """The class of each component that the folder has, by name."""
        named = {name: entry for name, entry in self.index.items() if isinstance(entry, list) and len(entry) == 2}
        return {name: kind for name, (_, kind) in named.items() if kind is not None}

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        if not folder.is_dir():
            raise StorageError(f"{folder}: expected the {name} of the pipeline, got no folder")
        return folder

    def _encoders_without_values(self) -> dict[str, Any]:
        import transformers

        found = {}
        for name, kind in self.components().items():
            if name.startswith("text_encoder"):
                made: Any = getattr(transformers, kind)
                config = made.config_class.from_pretrained(str(self._folder(name)))
                with torch.device("meta"):
                    found[name] = made(config).eval()
        return found

    def _class(self, name: str) -> Any:
        import diffusers

        self._folder(name)
        named = self.components().get(name)
        kind = getattr(diffusers, str(named), None)
        if kind is None:
            raise InputError.of(f"{self.path / INDEX}: {name}", "a class of diffusers", named)
        return kind

    def _part(self, name: str) -> Any:
        kind = self._class(name)
        with _read(self.path / name):
            return kind.from_pretrained(str(self.path), subfolder=name, local_files_only=True)

    def _loaded(self, kind: Any, name: str, dtype: torch.dtype) -> Any:
        folder = self._folder(name)
        if not any(file.suffix in WEIGHTS for file in folder.iterdir()):
            raise StorageError(f"{folder}: expected weights (diffusion_pytorch_model.safetensors), got none")
        options = {"local_files_only": True, "variant": variant_in(folder), **_as(dtype)}
        with _read(folder):
            model, found = kind.from_pretrained(str(self.path), subfolder=name, output_loading_info=True, **options)
        if missing := sorted(found["missing_keys"]):
            raise StorageError(f"{folder}: expected all weights of its config.json, got none for {some(missing)}")
        return model


@contextmanager
def _read(place: Path, how: str = "loaded", what: str = "") -> Iterator[None]:
    """StorageError about ``place`` for any error of other libraries, each of which has its own exceptions."""
    try:
        yield
    except (FastdistillError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise StorageError(f"{place}: {what}could not be {how}: {quoted(error)}") from error


class _Unread(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes tensors without values true if code tests them, for example whether masks are all ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


def _as(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument of ``from_pretrained`` for the dtype."""
    from diffusers.utils import deprecation_utils

    return {"dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype": dtype}
