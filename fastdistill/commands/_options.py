# SPDX-License-Identifier: Apache-2.0
"""How commands read their options: fields of a configuration dataclass, from a YAML file and the command line."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fastdistill.commands._arguments import parsed
from fastdistill.errors import FastdistillError

if TYPE_CHECKING:
    from fastdistill.runs import RunConfig

Config = TypeVar("Config")
Own = TypeVar("Own")


def configured(kind: type[Config], arguments: list[str], program: str) -> Config | None:
    """The validated configuration of a command; None after a dry run."""
    import_pydantic()
    from fastdistill.train.config import from_yaml, to_yaml, validated

    arguments, dry = taken(arguments, "--dry-run")
    file, rest = _config_file(arguments)
    default = from_yaml(kind, file) if file is not None else kind()
    config: Config = validated(parsed([kind], rest, f"fastdistill {program}", default=default), program)
    if dry:
        print(to_yaml(config), end="")
        return None
    return config


@dataclass(frozen=True)
class Invocation(Generic[Own]):
    """The arguments of a command for a run.

    config: the run file, overridden by options of the command line. own: the command's own options. allow_code:
    ``--allow-code``. json: ``--json``.
    """

    config: RunConfig
    own: Own
    allow_code: bool
    json: bool


def run_file(kind: type[Own], arguments: list[str], program: str, *, ranks: bool = False) -> Invocation[Own] | None:
    """A command's run file and options. None after a dry run; under ``torchrun`` also in all processes but the first,
    unless ``ranks``.

    Args:
        kind: the dataclass of the command's own options.
        ranks: whether all processes of ``torchrun`` share the work.
    """
    import_pydantic()
    import tyro

    from fastdistill.runs import RunConfig
    from fastdistill.train.config import from_yaml, to_yaml, validated

    name = f"fastdistill {program}"
    if {"-h", "--help"} & set(arguments):
        with contextlib.suppress(SystemExit):
            tyro.cli(kind, args=["--help"], prog=f"{name} RUN.yaml [--dry-run] [--json] [--allow-code]")
        print("\nFields of the run file, which the command line may set too:\n")
        tyro.cli(RunConfig, args=["--help"], prog=f"{name} RUN.yaml")
    if not arguments or arguments[0].startswith("-"):
        got = repr(arguments[0]) if arguments else "nothing"
        raise FastdistillError(f"{program}: expected a run file (fastdistill init FOLDER > run.yaml), got {got}")
    arguments, dry = taken(arguments, "--dry-run")
    arguments, as_json = taken(arguments, "--json")
    arguments, allow_code = taken(arguments, "--allow-code")
    default = from_yaml(RunConfig, arguments[0])
    own, rest = parsed([kind, RunConfig], arguments[1:], name, own=kind)
    config = validated(parsed([RunConfig], rest, name, default=default), program)
    first = os.environ.get("RANK", "0") == "0" or "TORCHELASTIC_RUN_ID" not in os.environ
    if dry and first:
        print(to_yaml(config), end="")
    if dry or not (first or ranks):
        return None
    return Invocation(config, validated(own, program), allow_code, as_json)


def taken(arguments: list[str], flag: str) -> tuple[list[str], bool]:
    """The arguments without ``flag``, and whether it was there."""
    return [argument for argument in arguments if argument != flag], flag in arguments


def import_pydantic() -> None:
    """Import it while signals are blocked: its compiled core panics if a signal interrupts the import."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        importlib.import_module("pydantic")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def quiet() -> None:
    """Hide the progress bars and notices of diffusers and transformers in the output of a command."""
    for library in ("diffusers", "transformers"):
        with contextlib.suppress(ImportError):
            logging: Any = importlib.import_module(f"{library}.utils.logging")
            logging.set_verbosity_error()
            logging.disable_progress_bar()


def _config_file(arguments: list[str]) -> tuple[str | None, list[str]]:
    for i, argument in enumerate(arguments):
        if argument == "--config":
            if i + 1 == len(arguments):
                raise FastdistillError("--config: expected a YAML file, got nothing")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), arguments[:i] + arguments[i + 1 :]
    return None, arguments
