# SPDX-License-Identifier: Apache-2.0
"""Features of images, and scores computed from them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.errors import FastdistillError, InputError, StorageError
from fastdistill.evaluate.features import INCEPTION, FolderFeatures, inception_features, pixel_features
from fastdistill.evaluate.metrics import frechet_distance
from fastdistill.evaluate.scores import _Given, clip_scores, kid
from tests.harness import EPS, EPS64, generator
from tests.models import tiny_pipelines as tiny

_MEAN, _STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


def images(seed: int, *shape: int) -> Tensor:
    """Images in [0, 1] with 8-bit values."""
    return torch.randint(0, 256, shape, generator=generator(seed)) / 255


def _clip(transformers: Any) -> tuple[Any, Any]:
    text, tokenizer = tiny.text("CLIPTextModel", 8, 6)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text.config.to_dict(), projection_dim=6, vision_config=vision)
    return tiny.noisy(transformers.CLIPModel(config)), tokenizer


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, tokenizer = _clip(transformers)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"do_resize": True, "size": {"shortest_edge": 16}, "resample": 3, "do_center_crop": True,
                "crop_size": {"height": 16, "width": 16}, "do_normalize": True, "image_mean": _MEAN, "image_std": _STD,
                "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True,
                "image_processor_type": "CLIPImageProcessor"}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_pixels() -> None:
    found = pixel_features(torch.full((2, 1, 24, 32), 0.75))
    assert found.shape == (2, 193) and (found[:, :-1] == 0.5).all() and (found[:, -1] == 1).all()
    x = torch.zeros(1, 3, 16, 16)
    x[0, 1, :2, 2:4] = 1  # one area of green
    assert pixel_features(x)[0].reshape(-1)[:-1].tolist().index(1) == 64 + 1
    with pytest.raises(InputError, match=r"^images: expected \[b, 1 or 3, H, W\], got \(1, 2, 4, 4\)"):
        pixel_features(torch.zeros(1, 2, 4, 4))


def test_images_of_a_folders_model_are_prepared_as_transformers_does(clip: Path) -> None:
    """Exact for images of the model's size; for others except for rounding to 8 bits before and after the scaling."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessor.from_pretrained(clip)
    encoder = FolderFeatures(clip)
    for shape, steps in (((2, 3, 16, 16), 0), ((2, 3, 16, 26), 0), ((2, 3, 40, 64), 3)):
        x = images(0, *shape)
        given = [(image.permute(1, 2, 0) * 255).round().byte().numpy() for image in x]
        wanted = processor(given, return_tensors="pt")["pixel_values"]
        found = encoder.preprocessed(x)
        bound = (steps / 255 + 8 * EPS) / min(_STD)
        assert found.shape == wanted.shape and (found - wanted).abs().max() <= bound


def test_embeddings_of_a_clip_folder(clip: Path) -> None:
    transformers = pytest.importorskip("transformers")
    encoder = FolderFeatures(str(clip))
    x = images(1, 3, 1, 16, 16)
    texts = ["a cat", "a dog that is longer than twelve tokens", "red"]
    found, words = encoder(x), encoder.texts(texts)
    assert found.shape == words.shape == (3, 6) and found.dtype == torch.float32 and not found.requires_grad
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        pixels = (x.expand(-1, 3, -1, -1) - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]
        projected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    assert (found - projected).abs().max() <= 64 * EPS * projected.abs().max()
    assert torch.equal(encoder.texts(texts[:1]), encoder.texts(["a cat"]))
    one = encoder.texts(texts[2:])
    assert (one - words[2:]).abs().max() <= 64 * EPS * words.abs().max()  # independent of padding


def test_clip_scores_are_those_of_torchmetrics(clip: Path) -> None:
    module = pytest.importorskip("torchmetrics.functional.multimodal")
    encoder = FolderFeatures(clip)
    x, texts = images(2, 4, 3, 16, 16), ["a cat", "dogs", "red", "the sea"]

    def processor(text: Any = None, images: Any = None, **_: Any) -> Any:
        if images is not None:
            return {"pixel_values": encoder.preprocessed(torch.stack(images).float() / 255)}
        return encoder._tokenizer(text, padding=True, return_tensors="pt")

    class Adapted(torch.nn.Module):  # versions of transformers return different types here
        config = encoder.model.config

        def get_image_features(self, pixels: Tensor) -> Tensor:
            return getattr(found := encoder.model.get_image_features(pixels), "pooler_output", found)

        def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
            return getattr(found := encoder.model.get_text_features(ids, mask), "pooler_output", found)

    found = clip_scores(encoder(x), encoder.texts(texts))
    with torch.no_grad():
        given = zip((x * 255).round().byte(), texts, strict=True)
        wanted = torch.stack([module.clip_score(image, text, lambda: (Adapted(), processor)) for image, text in given])
    assert found.shape == (4,) and found.any() and (found - wanted).abs().max() <= 100 * 64 * EPS


def test_features_of_a_model_of_images_alone(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    model = tiny.noisy(transformers.Dinov2Model(transformers.Dinov2Config(**sizes)))
    model.save_pretrained(tmp_path)
    settings = tmp_path / "preprocessor_config.json"
    with pytest.raises(StorageError, match=r"preprocessor_config.json: expected how the model takes images"):
        FolderFeatures(tmp_path)
    settings.write_text('{"size": {"height": 16, "width": 16}}')
    with pytest.raises(StorageError, match=r"expected an entry image_mean"):
        FolderFeatures(tmp_path)
    settings.write_text(json.dumps({"size": {"height": 16, "width": 16}, "image_mean": _MEAN, "image_std": _STD}))
    encoder = FolderFeatures(tmp_path)
    x = images(3, 2, 3, 12, 20)
    with torch.no_grad():
        wanted = model(encoder.preprocessed(x)).last_hidden_state[:, 0]
    assert torch.equal(encoder(x), wanted) and wanted.shape == (2, 8)
    with pytest.raises(InputError, match=r"^clip: expected a model of images and texts"):
        encoder.texts(["a cat"])
    state = model.state_dict()
    state.pop("layernorm.weight")
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(StorageError, match=r"expected all weights of its config.json, got none for layernorm\.weight"):
        FolderFeatures(tmp_path)


def test_folders_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"expected the folder of a model of transformers, got no config.json"):
        FolderFeatures(tmp_path / "clip")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": _MEAN, "image_std": _STD}))
    with pytest.raises(StorageError, match=r"could not be loaded"):
        FolderFeatures(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FastdistillError, match=re.escape("pip install 'fastdistill[pipelines]'")):
        FolderFeatures(tmp_path)


def test_inception_says_which_file_it_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(StorageError, match=rf"checkpoints/{re.escape(INCEPTION)}: expected .* evaluate\.inception"):
        inception_features()
    file = tmp_path / "weights.pth"
    file.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(FastdistillError, match=re.escape("pip install 'fastdistill[metrics]'")):
        inception_features(file)


def test_inception_gets_the_images_of_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.pth").write_bytes(b"")
    asked: list[Any] = []

    class Model(torch.nn.Module):
        def __init__(self, *arguments: Any) -> None:
            super().__init__()
            asked.extend(arguments)
            if "damaged" in arguments[-1]:
                torch.load(arguments[-1])

        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.uint8
            return x.float().mean((2, 3))

    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", SimpleNamespace(NoTrainInceptionV3=Model))  # type: ignore[arg-type]
    found = inception_features(tmp_path / "weights.pth")(torch.full((2, 1, 4, 4), 127.4 / 255))
    assert found.tolist() == [[127.0] * 3] * 2
    assert asked == ["inception-v3-compat", ["2048"], str(tmp_path / "weights.pth")]
    for content in (b"", b"not weights"):
        (tmp_path / "damaged.pth").write_bytes(content)
        with pytest.raises(StorageError, match=r"damaged\.pth: could not be loaded"):
            inception_features(tmp_path / "damaged.pth")


def test_fid_is_the_frechet_distance() -> None:
    """As in torchmetrics, also with fewer samples than features."""
    made: Any = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance
    for number, width in ((60, 5), (8, 12)):
        real = torch.randn(number, width, generator=generator(4), dtype=torch.float64)
        fake = 1.3 * torch.randn(number - 2, width, generator=generator(5), dtype=torch.float64) + 0.2
        metric = made(feature=_Given(width)).set_dtype(torch.float64)
        metric.update(real, real=True)
        metric.update(fake, real=False)
        found = frechet_distance(real, fake)
        # moments are sums of 60 terms; the root of a product of covariances loses half of the digits at most
        assert abs(found - float(metric.compute())) <= 60 * EPS64**0.5
        assert abs(found - frechet_distance(real.float(), fake.float())) <= 60 * EPS


def test_kid_is_its_sum_over_pairs() -> None:
    pytest.importorskip("torchmetrics")
    real, fake = (torch.randn(12, 4, generator=generator(seed), dtype=torch.float64) for seed in (6, 7))
    kernel = [[(float(a @ b) / 4 + 1) ** 3 for b in (*real, *fake)] for a in (*real, *fake)]
    within = sum(kernel[i][j] for i in range(24) for j in range(24) if i != j and (i < 12) == (j < 12)) / (12 * 11)
    across = sum(kernel[i][j] for i in range(12) for j in range(12, 24)) / (12 * 12)
    found = kid(real, fake)
    assert abs(found - (within - 2 * across)) <= 24**2 * EPS64 * max(map(max, kernel))
    before = torch.get_rng_state()
    assert kid(real, fake, seed=3) == pytest.approx(found, rel=1e-9) and torch.equal(torch.get_rng_state(), before)
    parts = [kid(real, fake, subsets=3, size=5, seed=s) for s in (1, 1, 2)]
    assert parts[0] == parts[1] != parts[2]


def test_scores_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    some = torch.ones(4, 3)
    with pytest.raises(InputError, match=r"^real: expected features \[N, D\] of at least 2 images, got \(1, 3\)"):
        kid(some[:1], some)
    with pytest.raises(InputError, match=r"^fake: expected 3 values per feature, as real has, got 2"):
        kid(some, some[:, :2])
    with pytest.raises(InputError, match=r"^texts: expected embeddings like those of the images"):
        clip_scores(some, some[:3])
    monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
    with pytest.raises(FastdistillError, match=re.escape("pip install 'fastdistill[metrics]'")):
        kid(some, some)
