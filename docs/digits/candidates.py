# SPDX-License-Identifier: Apache-2.0
"""Students of the digits under options that could bring samples of unseen prompts closer to the teacher's.

``python docs/digits/candidates.py --seeds 3`` trains each of ``CANDIDATES``, as ``fastdistill demo digits`` trains the
student with random conditioning, samples it as the demo does, and writes ``candidates.json`` beside this file and the
table of ``docs/unseen_prompts.md``. Finished students in the output folder are kept, and a student that was interrupted
goes on. A student takes three minutes on a CPU core. ``--only NAME`` trains only these candidates, ``--device cuda``
trains on a GPU, ``--table`` only writes the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))  # Python adds only the folder of a script

from fastdistill import runs  # noqa: E402
from fastdistill.data.fingerprint import plain, sha256_of_json  # noqa: E402
from fastdistill.evaluate.metrics import wilson_interval  # noqa: E402
from fastdistill.files import atomic_write  # noqa: E402
from fastdistill.runs import RunConfig  # noqa: E402
from fastdistill.tasks.digits import data, worker  # noqa: E402
from fastdistill.tasks.digits.config import DigitsConfig  # noqa: E402
from fastdistill.tasks.digits.judge import Judge  # noqa: E402
from fastdistill.tasks.digits.likeness import likeness  # noqa: E402
from fastdistill.train.config import TrainConfig, from_mapping  # noqa: E402

FIGURES = Path(__file__).with_suffix(".json")
IMAGES = 8  # of each prompt
PAGE = ROOT / "docs" / "unseen_prompts.md"
MARKS = "<!-- table: python docs/digits/candidates.py -->", "<!-- end of the table -->"


def _rolling(**options: Any) -> dict[str, Any]:
    return {"rolling": {"every": 2, "clip_sample": 1.2, **options}}


def _conditioned(**options: Any) -> dict[str, Any]:
    return {"objective": {"random_conditioning": options}}


#: By name what differs from the run file of the demo's student with random conditioning.
CANDIDATES: dict[str, dict[str, Any]] = {
    "random conditioning": {},
    "measured p(t)": _conditioned(probability="measured"),
    "regions": _conditioned(regions={"count": 80}),
    "min-SNR weighting": {"objective": {"loss_weighting": "min_snr"}},
    "EMA of a power of time": {"train": {"ema_schedule": "power", "ema_width": 0.05}},
    "rolling states": _conditioned(**_rolling()),
    "rolling states, moved by the student": _conditioned(**_rolling(by="student")),
    "rolling states, null 0.1": _conditioned(**_rolling(null=0.1)),
    "rolling states, null 0.1, moved by the student": _conditioned(**_rolling(null=0.1, by="student")),
    "rolling states, null 0.1, measured p(t)": _conditioned(probability="measured", **_rolling(null=0.1)),
    "rolling states, null 0.1, regions": _conditioned(regions={"count": 80}, **_rolling(null=0.1)),
    "rolling states, null 0.1, half the steps": _conditioned(**_rolling(null=0.1)) | {"train": {"steps": 750}},
}


def label(name: str, device: str) -> str:
    return name if device == "cpu" else f"{name}, on a GPU"


def run_file(name: str, seed: int, output: Path, device: str = "cpu") -> tuple[DigitsConfig, RunConfig]:
    config = DigitsConfig(output=str(output), device=device, images_per_prompt=IMAGES, rolling=None).resolved()
    own = plain(dataclasses.asdict(config.run_file("random_conditioning", seed)))
    changed = _onto(own, CANDIDATES[name])
    changed["train"]["execution"] = "graph" if device == "cuda" else "eager"  # nothing that is measured
    if changed["train"]["ema_schedule"] == "power":
        changed["train"]["ema_decay"] = TrainConfig.ema_decay  # the demo's own is for the other schedule
    changed["directory"] = str(output / "students" / f"{label(name, device)} {seed}" / "training")
    return config, from_mapping(RunConfig, changed)


def _onto(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return values | {k: _onto(values[k], v) if isinstance(v, dict) and values[k] else v for k, v in changes.items()}


def sampled(config: DigitsConfig, run: Any, model: Any) -> tuple[Tensor, Tensor]:
    """Samples of a model as the demo evaluates it, and the rows of their prompts."""
    prompt = torch.arange(len(data.PROMPTS)).repeat_interleave(config.images_per_prompt)
    parts = torch.split(torch.arange(len(prompt)), 64)
    return torch.cat([worker._sampled(config, run, model, prompt[part], part) for part in parts]), prompt


def student(name: str, seed: int, output: Path, device: str = "cpu") -> dict[str, Any]:
    """Result and samples of a student; it is trained first if it is not finished."""
    config, own = run_file(name, seed, output, device)
    folder = Path(own.directory).parent
    result, images = folder / "result.json", folder / "samples.safetensors"
    made = sha256_of_json({"options": CANDIDATES[name], "steps": own.train.steps, "images": IMAGES})
    if result.exists() and (found := json.loads(result.read_text()))["made"] == made:
        return found | {"images": safetensors.torch.load_file(images)["images"]}
    if result.exists():
        shutil.rmtree(folder)
    fitted = runs.distill(own)
    opened = runs.opened(own)
    found, _ = sampled(config, opened, runs.trained_student(opened))
    atomic_write(images, safetensors.torch.save({"images": found}))
    told = {
        "made": made,
        "device": device,
        "seconds": fitted.seconds,
        "steps": fitted.steps,
        "loss": fitted.history[-1]["loss"],
    }
    atomic_write(result, json.dumps(told).encode())
    return told | {"images": found}


def teacher(output: Path, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Samples of the teacher and the rows of their prompts. The cache that all students share is made as well."""
    config, own = run_file("random conditioning", 0, output, device)
    path, prompt = output / "teacher.safetensors", torch.arange(len(data.PROMPTS))
    if path.exists():
        return safetensors.torch.load_file(path)["images"], prompt.repeat_interleave(config.images_per_prompt)
    runs.cache(own)
    opened = runs.opened(own)
    images, prompt = sampled(config, opened, opened.pipeline.model(device=device, dtype=torch.float32))
    atomic_write(path, safetensors.torch.save({"images": images}))
    return images, prompt


def figures(name: str, made: list[dict[str, Any]], real: Tensor, prompt: Tensor, judge: Judge) -> dict[str, Any]:
    """Of the students of a candidate: shares of right samples, and distances from the teacher's."""
    found: dict[str, Any] = {"seeds": len(made), "steps": made[0]["steps"], "options": CANDIDATES[name]}
    found["seconds"] = [one["seconds"] for one in made]
    like = likeness(judge, real, [one["images"] for one in made])
    right = [judge.right(one["images"], prompt) for one in made]
    for kind, rows in data.KINDS.items():
        among = torch.isin(prompt, torch.tensor(rows))
        each, n = [int(one[among].sum()) for one in right], int(among.sum())
        share = {"value": sum(each) / (n * len(each)), "interval": wilson_interval(sum(each), n * len(each))}
        found[kind] = {"right": share | {"each": [count / n for count in each]}, **like[kind]}
    pairs = zip(*(found[kind]["distance"]["each"] for kind in ("unseen", "seen")), strict=True)
    found["ratio"] = [unseen / seen for unseen, seen in pairs]
    return found


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| | right, seen | right, unseen | distance, seen | distance, unseen | unseen / seen |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in report.items():
        cells = [_share(one["seen"]["right"]), _share(one["unseen"]["right"])]
        cells += [_number(one[kind]["distance"], ".3f") for kind in ("seen", "unseen")]
        cells.append(" / ".join(f"{ratio:.2f}" for ratio in one["ratio"]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(measure: dict[str, Any]) -> str:
    low, high = measure["interval"]
    return f"{100 * measure['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _number(measure: dict[str, Any], form: str) -> str:
    low, high = measure["interval"]
    return f"{measure['value']:{form}} [{low:{form}}, {high:{form}}]"


def write_table() -> None:
    if not PAGE.exists():
        return
    begin, end = MARKS
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    made = table(json.loads(FIGURES.read_text(encoding="utf-8")))
    atomic_write(PAGE, f"{before}{begin}\n\n{made}\n\n{end}{rest.split(end)[1]}".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--output", type=Path, default=Path("runs/digits-candidates"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if not given.table:
        torch.set_num_threads(1)
        real, prompt = teacher(given.output, given.device)
        judge = Judge()
        known = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
        for name in given.only:
            made = [student(name, seed, given.output, given.device) for seed in range(given.seeds)]
            row = label(name, given.device)
            known[row] = figures(name, made, real, prompt, judge)
            print(table({row: known[row]}).splitlines()[-1], flush=True)
            rows = [label(one, device) for one in CANDIDATES for device in ("cpu", "cuda")]
            known = {row: known[row] for row in rows if row in known}
            atomic_write(FIGURES, (json.dumps(known, indent=1) + "\n").encode())
    write_table()


if __name__ == "__main__":
    main()
