# SPDX-License-Identifier: Apache-2.0
"""Images with captions: several usual forms of folders, cropped to one size; errors name the file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdistill.data.images import captioned_images, check_images, load_image
from fastdistill.errors import InputError, StorageError

NAMES = ("a.png", "b/c.JPG", "d.webp")


def folder(path: Path) -> Path:
    for number, name in enumerate(NAMES):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (40 * number, 0, 0)).save(path / name)
    return path


def test_captions_beside_the_images(tmp_path: Path) -> None:
    folder(tmp_path)
    for name in NAMES:
        (tmp_path / name).with_suffix(".txt").write_text(f"\ufeffein K\u00e4fer, {name[0]}\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("of nothing")
    assert captioned_images(tmp_path) == [(tmp_path / name, f"ein K\u00e4fer, {name[0]}") for name in NAMES]


@pytest.mark.parametrize("table", ["metadata.jsonl", "captions.csv", "metadata.csv"])
def test_captions_in_a_table(tmp_path: Path, table: str) -> None:
    rows = [{"file_name": name, "text": f'an "{name}",\nold', "id": "1"} for name in reversed(NAMES)]
    if table.endswith("jsonl"):
        text = "\n".join(map(json.dumps, rows))
    else:
        text = "id,text,file_name\n" + "\n".join(f'1,"an ""{name}"",\nold",{name}' for name in reversed(NAMES))
    (folder(tmp_path) / table).write_text(text)
    assert captioned_images(tmp_path) == [(tmp_path / name, f'an "{name}",\nold') for name in reversed(NAMES)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "d.webp: expected d.txt with its caption, or metadata.jsonl or captions.csv in the folder, got none"),
        ({"d.txt": b"\xff"}, "d.txt: expected UTF-8, got other bytes"),
        (
            {"metadata.csv": b"file_name,text\na.png,a\nd.webp,d\n"},
            "c.JPG: expected a caption in metadata.csv, got none",
        ),
        (
            {"metadata.csv": b"file_name,text\ne.png,a\n"},
            "metadata.csv, line 2: expected an image of the folder .*'e.png'",
        ),
        (
            {"metadata.csv": b"file_name,text\na.png,a\na.png,b\n"},
            "metadata.csv, line 3: expected an image .* no caption",
        ),
        ({"metadata.csv": b"name,words\na.png,a\n"}, "columns file_name and text, got 'name', 'words'"),
        (
            {"metadata.csv": b"", "metadata.jsonl": b""},
            "expected one table of captions, got metadata.jsonl, metadata.csv",
        ),
    ],
    ids=str,
)
def test_images_and_captions_belong_together(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name in NAMES[:2]:
        (folder(tmp_path) / name).with_suffix(".txt").write_text("a")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises((StorageError, InputError), match=message):
        captioned_images(tmp_path)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"expected images \(\.png, .*\), got none"):
        captioned_images(tmp_path)
    with pytest.raises(StorageError, match="expected a folder of images, got none"):
        captioned_images(tmp_path / "none")


def test_the_middle_is_cut_out(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    wanted = torch.from_numpy(pixels[:, 2:8]).permute(2, 0, 1) / 255
    assert torch.equal(load_image(tmp_path / "a.png", (6, 6)), wanted)
    Image.fromarray(np.repeat(np.repeat(pixels[:, :1], 20, 1), 2, 0)).save(tmp_path / "b.png")
    half = load_image(tmp_path / "b.png", (6, 6))  # 12 x 20 scaled to 6 x 10 and cropped to 6 x 6
    assert half.shape == (3, 6, 6) and (half == half[:, :, :1]).all() and half.std() > 0


def test_images_are_upright_on_white_and_in_colour(tmp_path: Path) -> None:
    turned = Image.new("RGB", (4, 2), "red")
    turned.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # must be rotated by 90 degrees clockwise
    turned.save(tmp_path / "a.png", exif=exif)
    image = load_image(tmp_path / "a.png", (4, 2))
    assert image[:, 0, 1].tolist() == [0, 0, 1] and image[:, 3, 0].tolist() == [1, 0, 0]
    check_images([tmp_path / "a.png"], (4, 2))
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "b.png")
    assert (load_image(tmp_path / "b.png", (4, 4)) == 1).all()
    Image.new("L", (4, 4), 51).save(tmp_path / "c.png")
    assert (load_image(tmp_path / "c.png", (4, 4)) == 0.2).all()


def test_images_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4)).save(tmp_path / "small.png")
    (tmp_path / "none.png").write_text("no image")
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    for name, message in (
        ("small", "expected at least 8 x 8 pixels (height x width), got 4 x 8"),
        ("none", "the image could not be read: UnidentifiedImageError"),
        ("deep", "expected 8 bits a channel, got 'I;16'"),
        ("gone", "the image could not be read: FileNotFoundError"),
    ):
        with pytest.raises(StorageError, match=re.escape(f"{name}.png: {message}")):
            check_images([tmp_path / f"{name}.png"], (8, 8))
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    check_images([tmp_path / "cut.png"], (8, 8))  # its header is complete
    with pytest.raises(StorageError, match=r"cut\.png: the image could not be read"):
        load_image(tmp_path / "cut.png", (8, 8))
