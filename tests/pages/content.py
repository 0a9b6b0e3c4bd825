# SPDX-License-Identifier: Apache-2.0
"""What each page needs to run on small models, and what is checked afterwards: ``PAGES``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel

import fastdistill
from fastdistill import runs
from fastdistill.train.config import to_yaml
from fastdistill.train.metrics import read_metrics
from tests import tiny
from tests.models import tiny_pipelines
from tests.processes import once
from tests.runs.conftest import cached, run_config
from tests.tasks.test_context_demo import SMALL as CONTEXT
from tests.tasks.test_digits_demo import SMALL as DIGITS
from tests.tasks.test_guidance_demo import SMALL as GUIDANCE

Names = dict[str, Any]

#: Commands that take long even on small models: quick tests check their options, slow tests run them.
LONG = (
    "demo digits",
    "demo guidance",
    "demo context",
    "canonical sweep",
    "canonical show",
    "canonical extract",
    "cadistill",
    "guidance lab",
    "guidance diagnose",
    "profile digits",
    "profile replay",
)
#: Options that make them short in the slow tests.
SMALL = {
    "demo digits": "--config small-digits.yaml --workers 1",
    "demo guidance": "--config small-guidance.yaml --workers 1",
    "demo context": "--config small-context.yaml --workers 1",
    "canonical sweep": "--t-e 650 --k 0 2 --tap down_blocks.1 --per-class 3 --steps 2",
    "canonical show": "--k 2 --tap down_blocks.1 --steps 2",
    "canonical extract": "--k 1 --tap down_blocks.1 --steps 2 --per-class 1",
    "cadistill": "--kinds plain --seeds 0 --student.train.steps 2 --student.train.batch 8",
    "guidance lab": "--world gaussian --samples 64",
    "guidance diagnose": "--schedules 0 1 --images-per-prompt 1 --seeds 1 --grid trailing:4",
    "profile digits": "--steps 1 --warm-up 0 --batch 4 --device cpu",
    "profile replay": "--repeats 1 --device cpu",
}


@dataclass(frozen=True)
class Page:
    """prepare: creates the files that the page assumes, in the directory, and returns names for its Python code.
    smaller: replacements in its Python code. small: options by command, in addition to those of all pages. check:
    called at the end. slow: whether the page takes long on any model.
    """

    prepare: Callable[[Path, pytest.TempPathFactory], Names | None] = lambda place, factory: None
    smaller: tuple[tuple[str, str], ...] = ()
    small: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Names, Path], object] = lambda names, place: None
    slow: bool = False


def _saved(kind: str, folder: Path) -> None:
    tiny_pipelines.save(kind, folder)


def _of_three_stages(_: str, folder: Path) -> None:
    """Stable Diffusion XL with the stages that KOALA's students need."""
    stages = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 6),
    }
    kind, model, changes, encoders, scheduler = tiny_pipelines.PIPELINES["sdxl"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_pipelines.PIPELINES, "sdxl", (kind, model, changes | stages, encoders, scheduler))
        tiny_pipelines.save("sdxl", folder)


def _of_no_family(_: str, folder: Path) -> None:
    tiny_pipelines.save_other(folder)


#: Functions for folders that ``tiny_pipelines.save`` does not create.
SAVE: dict[str, Callable[[str, Path], None]] = {
    "aura": _of_no_family,
    "sdxl of three stages": _of_three_stages,
}


def files_of_demos(place: Path) -> None:
    for name, values in (("digits", DIGITS), ("guidance", GUIDANCE), ("context", CONTEXT)):
        (place / f"small-{name}.yaml").write_text(yaml.safe_dump(values))


def folders(**kinds: str) -> Callable[[Path, pytest.TempPathFactory], None]:
    """Tiny pipelines in ``models/``, by the name of the folder, and a few prompts."""

    def prepare(place: Path, factory: pytest.TempPathFactory) -> None:
        pytest.importorskip("transformers")
        (place / "models").mkdir()
        for name, kind in kinds.items():
            saved = once(factory, f"pipelines/{kind}", functools.partial(SAVE.get(kind, _saved), kind))
            shutil.copytree(saved, place / "models" / name)
        (place / "prompts.txt").write_text("a cat\na dog\ntwo cats\na red bird\nthe sea\n")

    return prepare


def a_cache(place: Path, factory: pytest.TempPathFactory) -> None:
    """A run file and its complete cache."""
    _copied("cache", place, factory)


def a_run(place: Path, factory: pytest.TempPathFactory) -> None:
    """A run file with a trained student of a few steps."""
    _copied("run", place, factory)


def _copied(what: str, place: Path, factory: pytest.TempPathFactory) -> None:
    def make(made: Path) -> None:
        made.mkdir()
        folders(sd15="sd")(made, factory)
        config = run_config(Path("models/sd15"), Path(), cache={"directory": "caches/sd15"})
        config = dataclasses.replace(config, directory="runs/sd15", student=runs.StudentSettings(width=0.5))
        with contextlib.chdir(made):
            Path("run.yaml").write_text(to_yaml(cached(config)))
            if what == "run":
                runs.distill(config)

    shutil.copytree(once(factory, f"pages/{what}", make), place, dirs_exist_ok=True)


def a_run_file(place: Path, factory: pytest.TempPathFactory) -> None:
    """A run file for a teacher without text encoders, without a cache."""
    folders(dit="dit")(place, factory)
    (place / "run.yaml").write_text(to_yaml(run_config(place / "models" / "dit", place)))


def a_trainer(place: Path, factory: pytest.TempPathFactory) -> Names:
    return {"trainer": tiny.trainer(steps=20)}


def parts_of_a_trainer(place: Path, factory: pytest.TempPathFactory) -> Names:
    """A tiny model, and a decoder that returns its latents."""
    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0), decode=lambda x: SimpleNamespace(sample=x[:, :3]))
    return {
        "DistillTrainer": fastdistill.DistillTrainer, "teacher": tiny.Net(), "student": tiny.Net(seed=1), "vae": vae,
        "schedule": tiny.SCHEDULE, "latents": tiny.cache(), "objective": tiny.features(),
        "prompts": fastdistill.PromptBank(tiny.bank().banks, ["a cat", "a dog"]),
        "my_metric": lambda model: float(model.training),
    }  # fmt: skip


def same_weights(folder: Path, trainer: Any) -> None:
    found = UNet2DConditionModel.from_pretrained(folder).state_dict()
    wanted = trainer.ema_student().state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(value, wanted[name]) for name, value in found.items())


def _quickstart(names: Names, place: Path) -> None:
    assert names["result"].steps == 4
    same_weights(place / "runs/mine/student", names["trainer"])


def _exported(*targets: str) -> Callable[[Names, Path], None]:
    def check(names: Names, place: Path) -> None:
        for target in targets:
            assert (place / target / "model_index.json").exists()

    return check


def _canonical(names: Names, place: Path) -> None:
    made, plain, found = (names[name] for name in ("made", "plain", "found"))
    assert made.samples.shape == (2, 4, 8, 8) and (made.energy > 0).all() and not plain.energy.any()
    assert made.subspace.settled.all() and names["error"].shape == (2,)
    assert len(found) == 8 and names["feature"] is None and names["logits"].shape == (2, 2)
    assert read_metrics(place / "run" / "metrics.jsonl")[-1]["distance"] > 0
    assert len(names["rows"]) == 4 and names["best"]["k"] == 2
    assert "selectivity" in names["best"]["reason"] and len(names["best"]["neighbours"]) == 1


def _guidance(names: Names, place: Path) -> None:
    assert names["images"].isfinite().all() and names["images"].shape == (2, 4, 8, 8)
    assert names["guided"].isfinite().all() and names["guider"].config.schedule == "4@3,-1@0.5,0"
    without, constant, windowed = (names[name] for name in ("without", "constant", "windowed"))
    assert constant.variance < without.variance / 2 and without.mean < windowed.mean
    assert float(windowed.variance) == pytest.approx(float(without.variance), rel=1e-6)
    assert names["neutral"].reachable and names["on_grid"].reachable
    assert round(float(names["limit"].mean), 2) == 1.82 and round(float(names["limit"].variance), 3) == 0.016
    assert round(names["neutral"].w, 2) == -0.63


def _lora(names: Names, place: Path) -> None:
    loaded, wanted = (names[name].state_dict() for name in ("model", "average"))
    assert loaded.keys() == {key.replace(".default.", ".default_0.") for key in wanted}
    assert all(torch.equal(value, loaded[key.replace(".default.", ".default_0.")]) for key, value in wanted.items())


def _pipelines(names: Names, place: Path) -> None:
    assert names["images"].shape == (2, 3, 16, 16) and names["images"].isfinite().all()
    wanted = names["trainer"].ema_student().state_dict()
    found = fastdistill.open_pipeline(place / "runs/student").model().state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(value, wanted[key]) for key, value in found.items())


def _monitoring(names: Names, place: Path) -> None:
    assert len(list(place.glob("runs/mine/previews/*.png"))) == 2 and names["validate"](1, None) == {"validation": 0}


def _loop(names: Names, place: Path) -> None:
    assert names["counter"].tolist() == [0, 4] and names["loss"].isfinite()
    for trained, average in zip(names["model"].parameters(), names["average"].parameters(), strict=True):
        assert average.isfinite().all() and not torch.equal(trained, average)


def _runs(names: Names, place: Path) -> None:
    assert names["result"].steps == 2 and len(names["files"]) == 2
    assert (place / "out" / "model_index.json").exists()


def _evaluate(names: Names, place: Path) -> None:
    attacked = names["attacked"]
    assert attacked["n"] == 30 and attacked["square_n"] == 10 and len(attacked["apgd"]) == 2
    assert attacked["apgd"][0] <= attacked["clean"] and attacked["masking"]["beyond"] == 0
    assert (place / "runs/sd15/evaluation/report.html").exists()


def _ranks(names: Names, place: Path) -> None:
    assert [line["step"] for line in read_metrics(place / "runs/mine/metrics.jsonl")] == [4]
    UNet2DConditionModel.from_pretrained(place / "runs/mine/student")


def _families(names: Names, place: Path) -> None:
    assert names["images"].isfinite().all() and names["images"].shape == (2, 4, 8, 8)


PAGES: dict[str, Page] = {
    "README.md": Page(
        folders(sd15="sd"), check=_exported("student"), slow=True
    ),  # stable-diffusion.md contains its commands
    "docs/quickstart.md": Page(check=_quickstart),
    "docs/stable-diffusion.md": Page(folders(sd15="sd"), check=_exported("student")),
    "docs/sdxl-pixart-sd3.md": Page(
        folders(sdxl="sdxl of three stages", pixart="pixart_sigma", sd3="sd3"),
        check=_exported("student-sdxl", "student-pixart", "student-sd3"),
        slow=True,
    ),
    "docs/own-model.md": Page(folders(mine="aura"), check=_exported("student-own")),
    "docs/formats.md": Page(a_run),
    "docs/loop.md": Page(check=_loop),
    "docs/families.md": Page(check=_families),
    "docs/canonical.md": Page(a_cache, check=_canonical),
    "docs/guidance.md": Page(check=_guidance),
    "docs/lora.md": Page(check=_lora),
    "docs/pipelines.md": Page(folders(teacher="sd"), check=_pipelines),
    "docs/plan.md": Page(a_run_file),
    "docs/evaluate.md": Page(a_run, check=_evaluate),
    "docs/ranks.md": Page(check=_ranks),
    "docs/profiling.md": Page(a_trainer),
    "docs/runs.md": Page(folders(sd15="sd"), check=_runs),
    "docs/monitoring.md": Page(
        parts_of_a_trainer,
        smaller=(("2000", "2"), ("1000", "1"), ("500", "2"), ("7]", "0]"), ("20,", "1,"), ("7.5", "1.5"), ("8,", "4,")),
        check=_monitoring,
    ),
}
