# SPDX-License-Identifier: Apache-2.0
"""Images of a folder, at one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastdistill.errors import StorageError
from fastdistill.files import located

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def image_files(folder: str) -> list[Path]:
    """The images in a folder and below it, in the order of their paths. StorageError where there are none."""
    place = located(folder, "folder")
    files = sorted(file for file in place.rglob("*") if file.suffix.lower() in _ENDINGS)
    if not files:
        raise StorageError(f"{place}: expected images ({', '.join(_ENDINGS)}), got none")
    return files


def image_batches(files: Sequence[Path], size: tuple[int, int], batch: int) -> Iterator[Tensor]:
    """[b, 3, height, width] in [0, 1]: scaled, and cut to the middle. StorageError for a file that is no image."""
    for first in range(0, len(files), batch):
        images = []
        for file in files[first : first + batch]:
            try:
                with Image.open(file) as image:
                    fitted = ImageOps.fit(image.convert("RGB"), size[::-1], Image.Resampling.LANCZOS)
            except (OSError, UnidentifiedImageError) as error:
                raise StorageError(f"{file}: expected an image: {error}") from error
            images.append(torch.from_numpy(np.asarray(fitted).copy()))
        yield torch.stack(images).permute(0, 3, 1, 2).float() / 255
