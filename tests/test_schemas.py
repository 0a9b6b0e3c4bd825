# SPDX-License-Identifier: Apache-2.0
"""Files state their schema: newer ones are refused, older ones converted or refused; docs/compatibility.md lists
all."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from fastdistill import schemas
from fastdistill.data.file_hashes import FileHashes
from fastdistill.data.fingerprint import sha256_of_tensors
from fastdistill.diffusion.spectrum import Spectrum
from fastdistill.errors import FastdistillError, InputError, StorageError
from fastdistill.evaluate.diagnosis import _Cell
from fastdistill.runs.about import ABOUT, About, read_about
from fastdistill.runs.config import RunConfig
from fastdistill.schemas import Schema
from fastdistill.tasks import workers
from fastdistill.tasks.context import selecting
from fastdistill.tasks.digits import teacher
from fastdistill.tasks.guidance import lab
from fastdistill.tasks.guidance.config import LabConfig
from fastdistill.train import kept, loop
from fastdistill.train.config import from_yaml, run_yaml
from fastdistill.train.metrics import line_of, read_metrics
from fastdistill.train.trackers import Wandb
from tests import tiny

ROOT = Path(__file__).parent.parent
ALL = {name: value for name, value in vars(schemas).items() if isinstance(value, Schema)}
METRICS: dict[str, float] = {"step": 1, "loss": 0.5, "seconds": 2.0, "skipped": 0}
# Code that writes files without a schema of fastdistill, and why.
APART = {
    "commands.canonical_show": "pictures",
    "commands.guidance_show": "pictures",
    "data.shards": "the manifest (data.manifest) and its shards",
    "models.export": "the format of diffusers",
    "models.peft": "the format of PEFT",
    "runs.distill": "a run file, of train.config",
    "runs.evaluate": "a run file, of train.config, a report, of evaluate.page, and pictures",
    "runs.export": "the format of diffusers or PEFT, and a model card",
    "runs.opened": "attachments of a manifest",
    "runs.sample": "pictures and the metadata.jsonl of Hugging Face's image folders",
    "tasks.context.report": "pictures",
    "tasks.digits.report": "pictures",
    "tasks.digits.worker": "samples beside a result (tasks.workers)",
    "tasks.guidance.report": "pictures",
    "tasks.guidance.worker": "samples beside a result (tasks.workers)",
    "train.distributed": "an empty file",
    "train.writing": "checkpoints, whose head is of train.checkpoint",
}
WRITES = {"atomic_write", "atomic_directory", "write_text", "write_bytes", "save_file", "save_model"}


def test_the_table_in_the_documentation_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    table = text.split("<!-- schemas -->")[1].split("<!-- /schemas -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert [(row[0], int(row[1])) for row in rows] == [(each.name, each.version) for each in ALL.values()]
    for row, each in zip(rows, ALL.values(), strict=True):
        assert each.oldest == 1 or each.former in row[3], f"{each.name}: what reads older files is not told"


def test_what_writes_a_file_states_a_schema() -> None:
    package = ROOT / "fastdistill"
    found = set()
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        if WRITES & {getattr(call, "attr", getattr(call, "id", "")) for call in calls}:
            found.add(".".join(path.relative_to(package).with_suffix("").parts))
    modules = {name: vars(importlib.import_module(f"fastdistill.{name}")).values() for name in found}
    own = {
        name
        for name, values in modules.items()
        if any(value is schemas or isinstance(value, Schema) for value in values)
    }
    assert found - own == set(APART), "either state a schema (fastdistill.schemas), or say here why there is none"


def test_every_schema_is_used() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "fastdistill").rglob("*.py"))
    for name in ALL:
        assert re.search(rf"\b{name}\.version", text), name


def test_versions() -> None:
    schema = Schema("thing", 3, oldest=2, former="0.1.0")
    for version in (2, 3):
        schema.check(version, "file")
    with pytest.raises(StorageError, match=r"^file: .*version 3 or older, got 4; a newer fastdistill wrote it$"):
        schema.check(4, "file")
    with pytest.raises(StorageError, match=r"^file: .*version 2 or newer, got 1; fastdistill 0\.1\.0 wrote and reads"):
        schema.check(1, "file")
    for wrong in (0, True, 2.0, "2", None):
        with pytest.raises(ValueError, match="is not a whole number from 1 on"):
            schema.check(wrong, "file")


@dataclasses.dataclass(frozen=True)
class Kind:
    """write: creates a file in a folder and returns it. read: reads it, for a comparison. bare: content -> the file
    from before it had a schema; None: it always had one."""

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    bare: Callable[[Any], Any] | None = lambda content: content
    key: str = "schema"
    error: type[FastdistillError] = StorageError


def spectrum(folder: Path) -> Path:
    Spectrum.of([1.0, 0.5], [2.0, 2.0]).save(folder / "spectrum.json")
    return folder / "spectrum.json"


def run(folder: Path) -> Path:
    (folder / "run.yaml").write_text(run_yaml(RunConfig(seed=7)))
    return folder / "run.yaml"


def about(folder: Path) -> Path:
    About(folder, torch.device("cpu"), None).add(["a line"])
    return folder / ABOUT


def metrics(folder: Path) -> Path:
    (folder / "metrics.jsonl").write_text(line_of(METRICS))
    return folder / "metrics.jsonl"


def scores(folder: Path) -> Path:
    settings = {"steps": 2, "checkpoint_every": 1, "keep_best": "fid"}
    tiny.trainer(**settings).fit(folder, callbacks=[(1, lambda done, _: {"fid": float(done)})])
    return folder / loop.SCORES


def result(folder: Path) -> Path:
    workers.keep_result(folder, {"fingerprint": "f", "right": 1})
    return folder / "result.json"


def world(folder: Path) -> Path:
    lab.measured(LabConfig(quick=True, world=("gaussian",), samples=64).resolved(), folder)
    return folder / "gaussian.json"


def sweep(folder: Path) -> Path:
    content = {"schema": schemas.SWEEP.version, "made_of": {"seed": 0}, "sweep": [{"k": 1}], "chosen": None}
    (folder / "sweep.json").write_text(json.dumps(content))
    return folder / "sweep.json"


def tracked(folder: Path) -> Path:
    told = _wandb(folder)
    told.scalars(3, {"loss": 1.0})
    return folder / "wandb" / "fastdistill.json"


def _wandb(folder: Path) -> Wandb:
    sys.modules["wandb"] = types.SimpleNamespace(run=types.SimpleNamespace(log=lambda *_, **__: None))  # type: ignore[assignment]
    try:
        return Wandb(folder, {}, done=1)
    finally:
        del sys.modules["wandb"]


KINDS = {
    "SPECTRUM": Kind(spectrum, lambda path: Spectrum.load(path).c.tolist(), None, key="version"),
    "ABOUT": Kind(about, lambda path: read_about(path.parent)),
    "LINES": Kind(metrics, read_metrics),
    "BEST": Kind(scores, lambda path: loop._read_scores(path, "fid"), lambda content: content["scores"]),
    "RESULT": Kind(result, lambda path: workers.result_in(path.parent, "f")),
    "WORLD": Kind(world, lambda path: lab._kept(path, json.loads(path.read_text())["made_from"])),
    "SWEEP": Kind(sweep, lambda path: selecting._known(path, {"seed": 0})),
    "TRACKED": Kind(tracked, lambda path: vars(_wandb(path.parents[1]))["_last"]),
}


@pytest.mark.parametrize("name", KINDS)
def test_of_files_of_json(name: str, tmp_path: Path) -> None:
    kind, schema = KINDS[name], ALL[name]
    path = kind.write(tmp_path)
    content = json.loads(path.read_text())
    assert content[kind.key] == schema.version
    read = kind.read(path)
    assert read and "schema" not in read if isinstance(read, dict) else read
    path.write_text(json.dumps(content | {kind.key: schema.version + 1}))
    with pytest.raises(StorageError, match=rf"{path.name}: .* a newer fastdistill wrote it$"):
        kind.read(path)
    if kind.bare is not None:
        path.write_text(json.dumps(kind.bare({name: value for name, value in content.items() if name != kind.key})))
        assert kind.read(path) == read


def test_of_run_files(tmp_path: Path) -> None:
    path = run(tmp_path)
    text = path.read_text()
    assert text.startswith("schema: 1\n") and from_yaml(RunConfig, path) == RunConfig(seed=7)
    path.write_text(text.removeprefix("schema: 1\n"))
    assert from_yaml(RunConfig, path) == RunConfig(seed=7)
    path.write_text(text.replace("schema: 1", "schema: 2"))
    with pytest.raises(InputError, match=r"run\.yaml: expected .*got 2; a newer fastdistill wrote it$"):
        from_yaml(RunConfig, path)
    for wrong in ("true", "0", "one"):
        path.write_text(text.replace("schema: 1", f"schema: {wrong}"))
        with pytest.raises(InputError, match=r"run\.yaml: schema .* is not a whole number"):
            from_yaml(RunConfig, path)


def test_of_kept_calls(tmp_path: Path) -> None:
    path = tmp_path / "geglu.safetensors"
    kept.save(path, "geglu", "cpp", [torch.ones(3, 8), False, torch.empty(3, 4)])
    changed(path, "fastdistill", schema=schemas.CALL.version + 1)
    with pytest.raises(StorageError, match="a newer fastdistill wrote it"):
        kept.load(path, "cpu")


def test_of_teachers(tmp_path: Path) -> None:
    """The shipped file is from before 0.1.0 and states no schema."""
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(teacher.WEIGHTS.read_bytes())
    assert "schema" not in teacher.provenance(path)
    changed(path, "provenance", schema=schemas.TEACHER.version)
    assert teacher.provenance(path) == teacher.provenance()
    changed(path, "provenance", schema=schemas.TEACHER.version + 1)
    with pytest.raises(StorageError, match="a newer fastdistill wrote it"):
        teacher.load_teacher(path)


def changed(path: Path, key: str, **values: Any) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()[key]) | values
    tensors = safetensors.torch.load_file(path)
    assert head.get("sha256") in (None, sha256_of_tensors(tensors))
    path.write_bytes(safetensors.torch.save(tensors, metadata={key: json.dumps(head)}))


def test_hashes_of_another_version_are_computed_again(tmp_path: Path) -> None:
    memo, file = tmp_path / ".hashes.json", tmp_path / "file"
    file.write_text("one")
    (right,) = FileHashes(memo).each([file])
    content = json.loads(memo.read_text())
    ((key, known),) = content["hashes"].items()
    assert content["schema"] == schemas.HASHES.version and known == right
    for written, found in (
        ({"schema": schemas.HASHES.version, "hashes": {key: "told"}}, "told"),
        ({key: "told"}, "told"),  # from before 0.1.0
        ({"schema": schemas.HASHES.version + 1, "hashes": {key: "told"}}, right),
    ):
        memo.write_text(json.dumps(written))
        assert FileHashes(memo).each([file]) == [found]


def test_samples_that_another_version_has_measured_are_measured_again(tmp_path: Path) -> None:
    cell, key = _Cell(torch.ones(2, 3, dtype=torch.float64), torch.ones(2, dtype=torch.bool), 1.5), {"seed": 0}
    cell.keep(tmp_path, key)
    path = _Cell.path(tmp_path, key)
    assert (found := _Cell.kept(tmp_path, key, 2)) is not None and found.features.equal(cell.features)
    tensors = safetensors.torch.load_file(path)
    for metadata, there in (({"schema": str(schemas.SAMPLES.version + 1)}, False), (None, True)):
        path.write_bytes(safetensors.torch.save(tensors, metadata))
        assert (_Cell.kept(tmp_path, key, 2) is not None) is there


def test_backends_that_another_version_has_measured_are_measured_again(tmp_path: Path) -> None:
    table = importlib.import_module("fastdistill.ops.attention.table")
    calls = {"a": {"backend": "math", "ms": {}}}
    for version, there in ((schemas.TABLE.version, calls), (schemas.TABLE.version + 1, {})):
        (tmp_path / "attention.json").write_text(json.dumps({"schema": version, "calls": calls}))
        assert table._load(tmp_path / "attention.json") == there


def test_checkpoints_name_what_reads_older_ones() -> None:
    newest = schemas.CHECKPOINT
    with pytest.raises(StorageError, match=re.escape(newest.former)):
        newest.check(newest.oldest - 1, "step-00000001.safetensors")
