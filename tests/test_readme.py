# SPDX-License-Identifier: Apache-2.0
"""What the README shows is executed, and what it names is there."""

from __future__ import annotations

import ast
import math
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import fastdistill
from fastdistill.cli import main
from fastdistill.train.metrics import read_metrics
from tests import tiny
from tests.models import tiny_pipelines
from tests.processes import as_ranks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, call = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(call, {})
    assert len(code.strip().splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["result"].steps == 4  # type: ignore[attr-defined]
    student = UNet2DConditionModel.from_pretrained("runs/mine/student")
    wanted = names["trainer"].ema_student().state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(value, wanted[name]) for name, value in student.state_dict().items())


def test_the_code_of_the_families_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/families.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["images"].isfinite().all() and names["images"].shape == (2, 4, 8, 8)  # type: ignore[attr-defined]


def test_the_code_of_canonical_latents_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/canonical.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, names)
    made, plain, found = (names[name] for name in ("made", "plain", "found"))
    assert made.samples.shape == (2, 4, 8, 8) and (made.energy > 0).all() and not plain.energy.any()
    assert made.subspace.settled.all() and names["error"].shape == (2,)
    assert len(found) == 8 and names["feature"] is None and names["logits"].shape == (2, 2)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["distance"] > 0
    assert len(names["rows"]) == 4 and names["best"]["k"] == 2
    assert "selectivity" in names["best"]["reason"] and len(names["best"]["neighbours"]) == 1


def test_the_commands_of_canonical_latents_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are written, but that they only check their options."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/canonical.md").read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^    fastdistill (.*)$", text, re.MULTILINE)]
    assert {command[1] for command in commands if command[0] == "canonical"} == {"sweep", "show", "extract"}
    assert "cadistill" in {command[0] for command in commands}
    for command in commands:
        assert main([*command, "--dry-run"]) == 0, command
    assert not list(tmp_path.iterdir())


def test_the_code_of_guidance_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guidance.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    for code in blocks:
        exec(code, names)
    assert names["images"].isfinite().all() and names["images"].shape == (2, 4, 8, 8)
    assert names["guided"].isfinite().all() and names["guider"].config.schedule == "4@3,-1@0.5,0"
    without, constant, windowed = (names[name] for name in ("without", "constant", "windowed"))
    assert constant.variance < without.variance / 2 and without.mean < windowed.mean
    assert float(windowed.variance) == pytest.approx(float(without.variance), rel=1e-6)
    assert names["neutral"].reachable and names["on_grid"].reachable
    assert round(float(names["limit"].mean), 2) == 1.82 and round(float(names["limit"].variance), 3) == 0.016
    assert round(names["neutral"].w, 2) == -0.63


def test_the_commands_of_guidance_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/guidance.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    fastdistill (guidance (?:lab|solve|show) .*)$", text, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        assert main([*shlex.split(line, comments=True), "--dry-run"]) == 0
    assert main(shlex.split(next(line for line in lines if "--c " in line))) == 0


def test_the_commands_of_guidance_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are written, but that they only check their options."""
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^    (fastdistill .*)$", (ROOT / "docs/guidance.md").read_text(encoding="utf-8"), re.MULTILINE)
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    assert {tuple(command[:2]) for command in commands} >= {
        ("demo", "guidance"),
        ("guidance", "lab"),
        ("guidance", "show"),
    }
    for command in commands:
        assert main([*command, "--dry-run"]) == 0, command
    assert not list(tmp_path.iterdir())


def test_the_code_of_adapters_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/lora.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    loaded, wanted = (names[name].state_dict() for name in ("model", "average"))
    assert loaded.keys() == {key.replace(".default.", ".default_0.") for key in wanted}
    assert all(torch.equal(value, loaded[key.replace(".default.", ".default_0.")]) for key, value in wanted.items())


def test_the_code_of_pipelines_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/pipelines.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tiny_pipelines.save("sd", tmp_path / "models" / "teacher")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["images"].shape == (2, 3, 16, 16) and names["images"].isfinite().all()
    wanted = names["trainer"].ema_student().state_dict()
    found = fastdistill.open_pipeline("runs/student").model().state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(value, wanted[key]) for key, value in found.items())


def test_the_code_of_monitoring_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With smaller numbers, a tiny model and a decoder that returns its latents."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/monitoring.md").read_text(encoding="utf-8"), re.DOTALL)
    for old, new in (
        ("2000", "2"),
        ("1000", "1"),
        ("500", "2"),
        ("7]", "0]"),
        ("20,", "1,"),
        ("7.5", "1.5"),
        ("8,", "4,"),
    ):
        assert old in code
        code = code.replace(old, new)
    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0), decode=lambda x: SimpleNamespace(sample=x[:, :3]))
    bank = fastdistill.PromptBank(tiny.bank().banks, ["a cat", "a dog"])
    names: dict[str, Any] = {
        "DistillTrainer": fastdistill.DistillTrainer, "teacher": tiny.Net(), "student": tiny.Net(seed=1), "vae": vae,
        "schedule": tiny.SCHEDULE, "latents": tiny.cache(), "prompts": bank, "objective": tiny.features(),
        "my_metric": lambda model: float(model.training),
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    assert len(list(tmp_path.glob("runs/mine/previews/*.png"))) == 2 and names["validate"](1, None) == {"validation": 0}


def test_what_it_links_to_is_there() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(((?!https?:)[^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


@pytest.mark.parametrize("target", re.findall(r"`?make ([a-z-]+)", README))
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_its_figures_are_the_committed_measurements() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    assert tables.readme_filled(README) == README, "run python docs/tables.py"
    assert "| random conditioning |" in README
    assert tables.page() == tables.FULL.read_text(encoding="utf-8"), "run python docs/tables.py"


def test_the_table_of_canonical_latents_has_four_students() -> None:
    from tests.evaluate.test_context_report import made_up

    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    report = made_up()
    lines = tables.context(report).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == [f"| {name}" for name in tables.CONTEXT.values()]
    assert lines[5].startswith("| CaDistill | 98.0 ± 0.6 | 92.0 ± 0.6 | 82.0 ± 0.6 | 34.0 ± 0.6 |")
    assert (
        lines[7].startswith("5 seeds (mean ± standard deviation), 360 held-out images") and "at most 0.1 " in lines[7]
    )
    report["masking"]["plain"]["failed"] = ["seed 0: the loss falls"]
    assert "| gradients are masked |" in tables.context(report)


def test_the_public_names_are_there() -> None:
    assert all(getattr(fastdistill, name) is not None for name in fastdistill.__all__)
    differentiable = {"attention", "cross_attention", "feature_match", "geglu", "group_norm_silu", "output_match"}
    assert differentiable <= set(fastdistill.__all__)


def test_the_loop_of_ones_own_runs_on_public_names() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "loop.md").read_text(encoding="utf-8"), re.DOTALL)
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom | ast.Import)]
    ours = [node for node in imports if isinstance(node, ast.ImportFrom) and node.module == "fastdistill"]
    assert {name.name for node in ours for name in node.names} <= set(fastdistill.__all__)
    assert "fastdistill" not in "".join(ast.unparse(node) for node in imports if node not in ours)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["counter"].tolist() == [0, 4] and math.isfinite(names["loss"].item())
    for trained, average in zip(names["model"].parameters(), names["average"].parameters(), strict=True):
        assert average.isfinite().all() and not torch.equal(trained, average)


def as_torchrun_does(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.chdir(directory)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path("port").read_text(), "CUDA_VISIBLE_DEVICES": ""}
    runpy.run_path("train.py", run_name="__main__")


def test_the_script_for_several_ranks_runs(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "ranks.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    (tmp_path / "train.py").write_text(code, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    as_ranks(as_torchrun_does, str(tmp_path))
    assert [m["step"] for m in read_metrics(tmp_path / "runs/mine/metrics.jsonl")] == [4]
    UNet2DConditionModel.from_pretrained(tmp_path / "runs/mine/student")
