# SPDX-License-Identifier: Apache-2.0
"""The teacher of a run file: a folder, a model on the Hub or an embedded task, optionally with a function to call
it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from fastdistill import files
from fastdistill.errors import InputError, StorageError, described, quoted
from fastdistill.models.calling import Call
from fastdistill.models.pipelines import PipelineFolder, open_pipeline
from fastdistill.own_code import imported
from fastdistill.tasks import PREFIX, open_task

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def open_teacher(teacher: str, call: str | None = None, allow_code: bool = False) -> tuple[PipelineFolder, Call | None]:
    """The pipeline of ``teacher``: a folder, a model on the Hub, or an embedded task (``task:NAME``); and the function
    that ``call`` names, which is needed for a model of an unknown family.

    Raises:
        InputError, StorageError: those of ``open_pipeline``, ``teacher_folder`` and ``open_task``.
    """
    function = None if call is None else _call(call, allow_code)
    if teacher.startswith(PREFIX):
        return open_task(teacher), function
    return open_pipeline(teacher_folder(teacher), any_model=function is not None), function


def teacher_folder(teacher: str) -> Path:
    """The folder of a teacher: itself, or the local copy of a model on the Hub (``owner/name``), downloaded if
    necessary.

    Raises:
        StorageError: neither exists; without a connection, or with ``HF_HUB_OFFLINE=1``, nothing is downloaded.
    """
    folder = files.located(teacher, "teacher")
    if folder.exists() or not _HUB_ID.fullmatch(teacher):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "LICENSE*", "README.md"]
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(snapshot_download(teacher, allow_patterns=wanted, local_files_only=True))
        return Path(snapshot_download(teacher, allow_patterns=wanted))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        got = f"neither (the Hub: {quoted(error)})"
        raise StorageError(f"{teacher}: expected a pipeline folder, or a model of the Hub, got {got}") from error


def _call(name: str, allow_code: bool) -> Call:
    """The function that ``module:function`` names."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError.of("call", "module:function", repr(name))
    if not allow_code:
        rule = "no code of your own unless the command line has --allow-code (allow_code=True)"
        raise InputError.of("call", rule, f"{function} of {module}")
    found = imported(module, function, "call")
    if not callable(found):
        raise InputError.of("call", f"a function {function} of {module}", described(found))
    return found  # type: ignore[no-any-return]
