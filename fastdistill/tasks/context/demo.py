# SPDX-License-Identifier: Apache-2.0
"""The whole experiment (``fastdistill demo context``): choice of a setting, canonical images, classifiers, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from fastdistill.data.fingerprint import plain, sha256_of_json
from fastdistill.distill.canonical import Clarid
from fastdistill.distill.selection import chosen
from fastdistill.errors import InputError
from fastdistill.evaluate._optional import require
from fastdistill.tables import print_table
from fastdistill.tasks import workers
from fastdistill.tasks.context import data, worker
from fastdistill.tasks.context.demo_config import DemoConfig
from fastdistill.tasks.context.report import Results, write
from fastdistill.tasks.context.students import SET, check_training, needed
from fastdistill.tasks.context.teacher import SCHEDULE, provenance
from fastdistill.tasks.processes import Job, Processes
from fastdistill.train.config import APART, validated

_ATTACKS = ("epsilon", "steps", "queries", "square_images")


def run(config: DemoConfig, console: Console | None = None) -> Path:
    """Run the experiment, or continue an interrupted one. Returns the path of ``report.html``.

    Raises:
        InputError: settings that do not fit together; nothing is written.
        FastdistillError: something cannot be read, written or computed; finished parts are kept.
        KeyboardInterrupt: after Ctrl-C, when every process has written its checkpoint.
    """
    config = validated(config, "demo context").resolved()
    _check(config)
    console = console or Console()
    results: Results = {}
    free = [kind for kind in config.kinds if kind not in SET]  # these need no canonical images
    with workers.experiment(config) as (output, spent):
        with workers.bars(console) as progress, Processes(worker.MODULE, config.workers) as processes:

            def do(jobs: Sequence[Job]) -> None:
                for result in workers.results(jobs, processes, progress):
                    results.setdefault(result["part"], []).append(result)

            do([*_sweeps(config, output), *_classifiers(config, output, free, None)])
            choice = chosen([row for found in results["sweep"] for row in found["rows"]])
            setting = Clarid(choice["t_e"], choice["k"], choice["tap"])
            do(_images(config, output, setting))
            do(_classifiers(config, output, [kind for kind in config.kinds if kind in SET], setting))
        report, path = write(config, output, results, choice, spent)
    _summarize(console, report)
    console.print(report["finding"], soft_wrap=True)
    console.print(f"\nReport: [bold]{path}[/bold]", soft_wrap=True)
    return path


def _check(config: DemoConfig) -> None:
    require("art.attacks.evasion", "robustness")
    if "plain" not in config.kinds:
        raise InputError.of("kinds", "some with plain among them, which the others are compared with", config.kinds)
    for name in ("kinds", "t_e", "k", "taps", "shares", "epsilon"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise InputError.of(name, "each once", values)
    if (least := worker.per_class(config.share)) is not None and least < 2:
        raise InputError.of("share", "one that gives two images of each digit or more", config.share)
    if list(config.epsilon) != sorted(config.epsilon):
        raise InputError.of("epsilon", "ascending radii", config.epsilon)
    for setting in worker.settings(config):
        setting.grid(SCHEDULE)
    check_training(dataclasses.replace(config.student, device=config.device), "student.train")


def _sweeps(config: DemoConfig, output: Path) -> list[Job]:
    depends = {"k": config.k, "taps": config.taps, "images": config.images, **_teacher(config.teacher)}
    return [
        _job(config, output, f"settings at t = {t}", "sweep", f"sweep-{t}", depends | {"t_e": t}, t_e=t)
        for t in config.t_e
    ]


def _images(config: DemoConfig, output: Path, setting: Clarid) -> list[Job]:
    """The slowest sets, each in its own process."""
    given = {"setting": dataclasses.asdict(setting)}
    depends = given | _teacher(config.teacher)
    every = list(dict.fromkeys(["canonical", *needed(config.kinds)]))  # the report shows some canonical ones
    apart = {"generated": "generated images", "posterior": "the teacher as a classifier"}
    groups = {"canonical images": [name for name in every if name not in apart]}
    groups |= {title: [name] for name, title in apart.items() if name in every}
    shares = [(config.share, title, names) for title, names in groups.items()]
    if "cadistill" in config.kinds and (most := max(config.shares, default=0)) > config.share:
        shares.append((most, f"canonical images of {most:.0%}", ["canonical"]))
    jobs = []
    for share, title, names in shares:
        more = {"names": names, "share": share}
        name = f"sets-{names[0]}-{share:g}"
        jobs.append(_job(config, output, title, "sets", name, depends | more, **more, **given))
    other = {"images": config.images, **given} | _teacher("same" if config.teacher == "broad" else "broad")
    return [*jobs, _job(config, output, "the other teacher", "other", "other", other, **given)]


def _classifiers(config: DemoConfig, output: Path, kinds: Sequence[str], setting: Clarid | None) -> list[Job]:
    """All seeds of these kinds; for CaDistill also the curve over shares of the data."""
    student = plain(dataclasses.asdict(config.student))
    for own in ("kind", "seed", "device"):
        student.pop(own)
    student["train"] = {name: value for name, value in student["train"].items() if name not in APART}
    common = {"data": data.fingerprint(), "student": student}
    attacks = {name: getattr(config, name) for name in _ATTACKS}
    jobs = []
    for seed in range(config.seeds):
        for kind in kinds:
            shares = [share for share in config.shares if share != config.share] if kind == "cadistill" else []
            for share in (config.share, *shares):
                on_curve = share != config.share
                part = f"{worker.CURVE}{share:g}" if on_curve else kind
                title = (f"{kind} of {share:.0%}" if on_curve else kind).replace("_", " ")
                title += f", seed {seed}" if config.seeds > 1 else ""
                trained = common | {"kind": kind, "seed": seed}
                rival = f"plain-{seed}/{_training(common | {'kind': 'plain', 'seed': seed})}"
                given: dict[str, Any] = {"transfer": None if kind == "plain" else rival}
                if setting is not None:
                    made = {"setting": dataclasses.asdict(setting), "share": share}
                    trained |= made | _teacher(config.teacher)
                    given |= made
                name = f"{part.replace(' ', '-')}-{seed}"
                content = given | {"training": _training(trained), "part": part, "seed": seed}
                jobs.append(_job(config, output, title, kind, name, trained | attacks | given, **content))
    return jobs


def _training(depends: Mapping[str, Any]) -> str:
    """The folder of a training inside that of its part; different inputs have different folders."""
    return f"training-{sha256_of_json(plain(depends))[:12]}"


@cache
def _teacher(kind: str) -> dict[str, str]:
    return {"teacher": provenance(kind)["sha256"]}


def _job(
    config: DemoConfig, output: Path, title: str, work: str, name: str, depends: Mapping[str, Any], **content: Any
) -> Job:
    """A job with directory ``parts/<name>``; ``depends``: the inputs of its result."""
    directory, wanted = output / "parts" / name, sha256_of_json({"work": work, **plain(depends)})
    described = {"part": work, "seed": 0, **content, "work": work, "config": plain(dataclasses.asdict(config))}
    return Job(title, directory, described | {"fingerprint": wanted}, worker.finished(directory, wanted))


def _summarize(console: Console, report: Mapping[str, Any]) -> None:
    """Print the table at the end."""
    columns = ("classifier", "own", "any", "other", "clutter", "pgd", "apgd", "square")
    fields = ("clean", "independent", "swapped", "clutter", "pgd", "apgd", "square")
    rows = [
        [kind.replace("_", " "), *(f"{row[name]['mean']:.1%}" for name in fields)]
        for kind, row in report["students"].items()
    ]
    title = "Classifiers: right on held-out images, by the background's hue, and under attack"
    print_table(console, columns, rows, title=title)
