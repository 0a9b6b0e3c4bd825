# SPDX-License-Identifier: Apache-2.0
"""Features of images: of their pixels, of a CLIP or DINO model in a folder, or of Inception-v3. Nothing is downloaded.

An extractor is any function that maps images [b, 1 or 3, H, W] in [0, 1] to features [b, D].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.errors import InputError, StorageError, quoted
from fastdistill.evaluate._optional import require
from fastdistill.files import json_value, located

Extractor = Callable[[Tensor], Tensor]

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # file name in torch-fidelity's releases
_SIDE = 8  # side of the small images in ``pixel_features``


def pixel_features(images: Tensor) -> Tensor:
    """Colors of 8 x 8 areas, from -1 to 1, and a constant, so that no image is a vector of zeros: [b, 3 x 64 + 1].

    They need no weights and describe composition and color, but no objects.
    """
    images = _rgb(images)
    areas = nn.functional.adaptive_avg_pool2d(images, _SIDE).flatten(1)
    return torch.cat([2 * areas - 1, torch.ones_like(areas[:, :1])], 1)


class FolderFeatures:
    """A model of transformers saved in a folder with its preprocessor_config.json. Features are the projected image
    embedding of CLIP or SigLIP, or else (DINO, DINOv2, ViT) the first token; float32 on the device of the model.

    ``texts`` gives the embeddings of texts in the same space, if the model has a text encoder.

    Raises:
        FastdistillError: transformers is not installed.
        StorageError: a folder that is missing, damaged or without all weights.
    """

    def __init__(self, folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        self.folder, self.device = located(folder, "folder"), torch.device(device)
        if not (self.folder / "config.json").is_file():
            raise StorageError(f"{self.folder}: expected the folder of a model of transformers, got no config.json")
        transformers = require("transformers", "pipelines")
        self._settings = _settings(self.folder / "preprocessor_config.json")
        try:
            model, found = transformers.AutoModel.from_pretrained(
                self.folder, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise StorageError(f"{self.folder}: could not be loaded: {quoted(error)}") from error
        if missing := sorted(key for key in found["missing_keys"] if not key.startswith("pooler.")):  # not used
            raise StorageError(f"{self.folder}: expected all weights of its config.json, got none for {missing[0]}")
        self.model = model.to(self.device).float().eval()
        self._tokenizer: Any = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = self.preprocessed(images)
        if hasattr(self.model, "get_image_features"):
            return _embedding(self.model.get_image_features(pixel_values=pixels))
        features: Tensor = self.model(pixel_values=pixels).last_hidden_state[:, 0]
        return features

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """[b, D]. InputError for a model without a text encoder."""
        if not hasattr(self.model, "get_text_features"):
            raise InputError.of("clip", "a model of images and texts, such as CLIP", f"{self.folder}, of images alone")
        if self._tokenizer is None:
            transformers = require("transformers", "pipelines")
            try:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            except (OSError, ValueError) as error:
                raise StorageError(f"{self.folder}: its tokenizer could not be loaded: {quoted(error)}") from error
        most = self.model.config.text_config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": most, "return_tensors": "pt"}
        tokens = self._tokenizer(list(texts), **options).to(self.device)
        given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return _embedding(self.model.get_text_features(**given))

    def preprocessed(self, images: Tensor) -> Tensor:
        """[b, 3, h, w] as the model expects: resized (antialiased), center-cropped and normalized."""
        settings = self._settings
        images = _rgb(images).to(self.device)
        if settings.get("do_resize", True) and (size := settings.get("size")):
            images = _resized(images, size, "bilinear" if settings.get("resample", 3) == 2 else "bicubic")
        if settings.get("do_center_crop", False) and (crop := settings.get("crop_size")):
            height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
            top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
            images = images[:, :, top : top + height, left : left + width]
        if settings.get("do_normalize", True):
            mean, std = (images.new_tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
            images = (images - mean) / std
        return images


def inception_features(weights: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu") -> Extractor:
    """The 2048 features of Inception-v3 for FID and KID, as torch-fidelity and torchmetrics compute them.

    Args:
        weights: torch-fidelity's file of weights; None: in torch's cache (``torch.hub.get_dir()/checkpoints``).

    Raises:
        StorageError: the file is missing. FastdistillError: torchmetrics or torch-fidelity is not installed.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION if weights is None else located(weights, "weights")
    if not path.is_file():
        rule = f"the weights of Inception-v3 ({INCEPTION} of torch-fidelity's releases)"
        raise StorageError(f"{path}: expected {rule}, got no file; put it there or name it by evaluate.inception")
    require("torch_fidelity", "metrics")
    make = require("torchmetrics.image.fid", "metrics").NoTrainInceptionV3
    try:
        model = make("inception-v3-compat", ["2048"], str(path)).to(device)
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, UnpicklingError) as error:
        raise StorageError(f"{path}: could not be loaded: {quoted(error)}") from error

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        found: Tensor = model((_rgb(images).to(device) * 255).round().byte())
        return found

    return features


def _rgb(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError.of("images", "[b, 1 or 3, H, W]", tuple(images.shape))
    return images.float().expand(-1, 3, -1, -1)


def _resized(images: Tensor, size: Any, mode: str) -> Tensor:
    height, width = images.shape[2:]
    shortest = size if isinstance(size, int) else size.get("shortest_edge")
    if shortest is None:
        wanted = (int(size["height"]), int(size["width"]))
    else:
        wanted = (int(shortest * height / min(height, width)), int(shortest * width / min(height, width)))
    if wanted == (height, width):
        return images
    return nn.functional.interpolate(images, wanted, mode=mode, antialias=True).clamp(0, 1)


def _settings(path: Path) -> dict[str, Any]:
    """The preprocessing settings of a model."""
    try:
        settings = json_value(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: expected how the model takes images (JSON): {quoted(error)}") from error
    missing = [name for name in ("image_mean", "image_std") if name not in settings]
    if settings.get("do_normalize", True) and missing:
        raise StorageError(f"{path}: expected an entry {missing[0]}, got none")
    return dict(settings)


def _embedding(output: Any) -> Tensor:
    """The projected embedding, which newer versions of transformers return inside an object."""
    embedding: Tensor = getattr(output, "pooler_output", output)
    return embedding
