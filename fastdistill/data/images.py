# SPDX-License-Identifier: Apache-2.0
"""Folders of images with captions, and loading of images cropped to one size."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastdistill import files
from fastdistill.data.tables import read_rows, spelled
from fastdistill.errors import InputError, StorageError, quoted

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_ORIENTATION = 0x0112  # EXIF
_TABLES = [f"{name}.{kind}" for name in ("metadata", "captions") for kind in ("jsonl", "csv", "parquet")]
_FILES, _TEXTS = ("file_name", "file", "image"), ("text", "caption", "prompt")


def image_files(folder: Path) -> list[Path]:
    """The images of a folder and its subfolders, sorted by path; StorageError if there are none."""
    if not folder.is_dir():
        raise StorageError(f"{folder}: expected a folder of images, got none")
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not images:
        raise StorageError(f"{folder}: expected images ({', '.join(_SUFFIXES)}), got none")
    return images


def captioned_images(folder: Path) -> list[tuple[Path, str]]:
    """The images of a folder and its subfolders, each with its caption: from a table in the folder, such as
    ``metadata.jsonl`` or ``captions.csv`` with ``file_name`` and ``text``, or else from a text file with the image's
    name.

    Raises:
        StorageError: no folder, no images, an image without caption or a caption without image; the file is named.
    """
    images = image_files(folder)
    tables = [folder / name for name in _TABLES if (folder / name).exists()]
    if len(tables) > 1:
        raise StorageError(f"{folder}: expected one table of captions, got {', '.join(table.name for table in tables)}")
    if not tables:
        return [(image, _beside(image)) for image in images]
    known, found = set(images), {}
    for where, (name, text) in read_rows(tables[0], lambda names: _columns(tables[0], names)):
        image = folder / name
        if image not in known or image in found:
            rule = "an image of the folder that has no caption yet"
            raise StorageError(f"{tables[0]}, {where}: expected {rule}, got {name!r}")
        found[image] = text
    if bare := next((image for image in images if image not in found), None):
        raise StorageError(f"{bare}: expected a caption in {tables[0].name}, got none")
    return list(found.items())


def check_images(images: Iterable[Path], size: tuple[int, int]) -> None:
    """StorageError with the file name if an image cannot be opened or is smaller than ``size`` (height, width)."""
    for path in images:
        with _opened(path) as image:
            if image.mode.startswith(("I", "F")):
                raise StorageError(f"{path}: expected 8 bits a channel, got {image.mode!r}")
            exif = Image.Exif()
            exif.load(image.info.get("exif") or b"")  # image.getexif() would read the pixels of some formats
            width, height = image.size
            _check_size(path, (width, height) if exif.get(_ORIENTATION, 1) >= 5 else (height, width), size)


def load_image(path: Path, size: tuple[int, int], *, enlarge: bool = False) -> Tensor:
    """An image as [3, height, width] float32 in [0, 1]: resized until one side fits, then center-cropped.

    EXIF orientation is applied; transparent areas become white. ``enlarge``: smaller images are enlarged.

    Raises:
        StorageError: the image cannot be read, or is too small.
    """
    height, width = size
    with _opened(path) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            if not enlarge:
                _check_size(path, (upright.height, upright.width), size)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            fitted = ImageOps.fit(upright.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
        except (OSError, ValueError, SyntaxError) as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{path}: the image could not be read: {quoted(error)}") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255


def _check_size(path: Path, found: tuple[int, int], least: tuple[int, int]) -> None:
    if found[0] < least[0] or found[1] < least[1]:
        rule = f"at least {least[0]} x {least[1]} pixels (height x width)"
        raise StorageError(f"{path}: expected {rule}, got {found[0]} x {found[1]}")


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise StorageError(f"{path}: the image could not be read: {quoted(error)}") from error


def _beside(image: Path) -> str:
    """The caption in the text file with the image's name."""
    file = image.with_suffix(".txt")
    try:
        return file.read_text(encoding="utf-8-sig").strip("\r\n")
    except FileNotFoundError:
        rule = f"{file.name} with its caption, or {_TABLES[0]} or {_TABLES[4]} in the folder"
        raise StorageError(f"{image}: expected {rule}, got none") from None
    except UnicodeDecodeError as error:
        raise StorageError(f"{file}: expected UTF-8, got other bytes ({error.reason})") from None
    except OSError as error:
        raise StorageError(f"{file}: could not be read: {files.reason(error)}") from error


def _columns(table: Path, names: list[str]) -> list[str]:
    """The columns with the file names and the captions."""
    found = [next((name for name in known if name in names), None) for known in (_FILES, _TEXTS)]
    picked = [name for name in found if name is not None]
    if len(picked) < 2:
        raise InputError.of(str(table), "columns file_name and text", spelled(names) or "none")
    return picked
