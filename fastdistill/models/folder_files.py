# SPDX-License-Identifier: Apache-2.0
"""The files of a component in a pipeline folder of diffusers: which are weights, and which affect the results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastdistill import files
from fastdistill.errors import StorageError, described, quoted

WEIGHTS = (".safetensors", ".bin")


def deciding(folder: Path) -> list[Path]:
    """The files that affect what a component computes: configurations, vocabularies, and those of the weight files that
    are loaded."""
    found = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    weights = [file for file in found if file.suffix in WEIGHTS]
    suffix = ".safetensors" if any(file.suffix == ".safetensors" for file in weights) else ".bin"
    used = [file for file in weights if file.suffix == suffix and variant_of(file) == (variant_in(folder) or "")]
    others = [file for file in found if file.suffix not in (*WEIGHTS, ".md")]
    return used + [file for file in others if not file.name.endswith(".index.json")]


def variant_in(folder: Path) -> str | None:
    """The variant of the weights in a folder (``model.fp16.safetensors``), if there are no weights without a
    variant."""
    variants = sorted({found for file in folder.iterdir() if (found := variant_of(file)) is not None})
    return variants[0] if variants and variants[0] else None


def variant_of(file: Path) -> str | None:
    """The variant of a weights file, ``""`` if it has none; None for other files."""
    found = re.fullmatch(r"\w+(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)", file.name)
    return None if found is None else found[1] or ""


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = files.json_value(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(f"{path}: expected a file of a pipeline folder, got none") from None
    except OSError as error:
        raise StorageError(f"{path}: could not be read: {files.reason(error)}") from error
    except ValueError as error:
        raise StorageError(f"{path}: expected JSON, got other text ({quoted(error)})") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path}: expected a JSON object, got {described(value)}")
    return value
