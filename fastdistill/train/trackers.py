# SPDX-License-Identifier: Apache-2.0
"""Experiment trackers in addition to ``metrics.jsonl``: TensorBoard, and Weights & Biases (online or offline).

They get the scalars of every log interval, the settings, the previews, and the values that callbacks return. A tracker
cannot end a run: if it fails, a warning is given and it is not called again.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from fastdistill.errors import FastdistillError, quoted
from fastdistill.files import atomic_write, make_directory
from fastdistill.schemas import TRACKED

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


class Tracker(Protocol):
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, png: Path) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in ``<run>/tensorboard``. If a run continues from step ``done``, later entries are discarded."""

    def __init__(self, directory: Path, settings: Mapping[str, Any], done: int) -> None:
        module = importlib.import_module(_MODULES["tensorboard"])
        self._writer: Any = module.SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1 if done else None)
        if not done:
            self._writer.add_text("settings", f"```\n{yaml.safe_dump(dict(settings), sort_keys=False)}```", 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, png: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(png) as image:
            self._writer.add_image("preview", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """The active run of wandb, else a run that belongs to this directory. ``wandb/fastdistill.json`` contains its id
    and the last logged step; a resumed run logs only later steps. The ``WANDB_*`` variables apply."""

    def __init__(self, directory: Path, settings: Mapping[str, Any], done: int) -> None:
        self._wandb: Any = importlib.import_module(_MODULES["wandb"])
        self._file = directory / "wandb" / "fastdistill.json"
        known = json.loads(self._file.read_text(encoding="utf-8")) if done and self._file.exists() else {}
        TRACKED.check(known.get("schema", 1), self._file)
        self._id, self._last = known.get("id") or uuid.uuid4().hex[:12], int(known.get("step", -1))
        self._own = self._wandb.run is None
        self._run: Any = self._wandb.run
        if self._own:
            self._run = self._wandb.init(
                dir=str(directory),
                id=self._id,
                resume="allow",
                project=os.environ.get("WANDB_PROJECT", "fastdistill"),
                name=os.environ.get("WANDB_NAME", directory.name),
                config=dict(settings),
                settings=self._wandb.Settings(console="off"),
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, dict(values))

    def image(self, step: int, png: Path) -> None:
        self._log(step, {"preview": self._wandb.Image(str(png))})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step <= self._last:
            return
        self._run.log(values, step=step)
        make_directory(self._file.parent)
        atomic_write(self._file, json.dumps({"schema": TRACKED.version, "id": self._id, "step": step}).encode())

    def close(self) -> None:
        if self._own:
            self._run.finish()


_KINDS: dict[str, type[TensorBoard] | type[Wandb]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def check_installed(names: Iterable[str]) -> None:
    """Raises ``FastdistillError`` if the package of a tracker is missing; it contains the command that installs it."""
    for name in names:
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            how = "run: pip install 'fastdistill[trackers]'"
            raise FastdistillError(
                f"{name}: expected to be installed for config.trackers; {how} ({quoted(error)})"
            ) from error


class Trackers:
    """All trackers of a run; ``done``: the step from which the run continues."""

    def __init__(self, names: Iterable[str], directory: Path, settings: Mapping[str, Any], done: int) -> None:
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._try(name, functools.partial(self._start, name, directory, settings, done))

    def _start(self, name: str, *given: Any) -> None:
        self._open[name] = _KINDS[name](*given)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.scalars(step, values))

    def image(self, step: int, png: Path) -> None:
        self._each(lambda tracker: tracker.image(step, png))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, functools.partial(act, tracker))

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._open.pop(name, None)
            warnings.warn(f"{name}: {quoted(error)}; the run goes on without it", stacklevel=4)
