# SPDX-License-Identifier: Apache-2.0
"""The command line. Options are the fields of the configuration dataclasses; ``--config FILE`` reads them from YAML."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings
from dataclasses import dataclass
from typing import TypeVar

import fastdistill
from fastdistill.documented import documented
from fastdistill.errors import FastdistillError, Stopped

# Heavy modules are imported where they are used, so that help is fast and Ctrl-C during an import is handled.

Config = TypeVar("Config")
_USAGE = """\
fastdistill {version}: distillation of conditional diffusion models

usage: fastdistill COMMAND [options]        (options of a command: fastdistill COMMAND --help)

  demo digits      compare random conditioning with paired prompts on handwritten digits
  teacher digits   train the teacher of the digits task (its weights are part of the package)
  profile digits   profile a few training steps: a Chrome trace, or ranges for Nsight
  profile replay   run one saved call of an op repeatedly
  doctor           print versions, devices and kernels, with the reason for each that cannot run

options of demo, teacher and profile:
  --config FILE    read options from a YAML file; options on the command line take precedence
  --dry-run        check the configuration, print it as YAML and exit
"""


@documented
@dataclass(frozen=True)
class DoctorConfig:
    """Print versions, devices and the kernels of every op."""

    json: bool = False
    """Print the result as JSON."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for an error of the user's or the machine's, 130 for Ctrl-C (143 for
    SIGTERM while a model trains)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` is as clean as Ctrl-C
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            status = _run(arguments)
            sys.stdout.flush()
            return status
    except FastdistillError as error:
        print(f"fastdistill: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Stopped as stopped:  # it has said so itself
        return stopped.code
    except KeyboardInterrupt:
        print("\nfastdistill: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning without its source line."""
    print(f"fastdistill: {message}", file=sys.stderr)


def _run(arguments: list[str]) -> int:
    match arguments:
        case [] | ["-h" | "--help" | "help", *_] | ["demo" | "teacher" | "profile", "-h" | "--help", *_]:
            print(_USAGE.format(version=fastdistill.__version__), end="")
        case ["--version", *_]:
            print(fastdistill.__version__)
        case ["doctor", *rest]:
            import tyro
            from rich.console import Console

            from fastdistill.doctor import doctor

            options = tyro.cli(DoctorConfig, args=rest, prog="fastdistill doctor")
            doctor(Console(), as_json=options.json)
        case ["demo", "digits", *rest]:
            _demo_digits(rest)
        case ["teacher", "digits", *rest]:
            _teacher_digits(rest)
        case ["profile", "digits", *rest]:
            _profile_digits(rest)
        case ["profile", "replay", call, *rest] if not call.startswith("-"):
            _profile_replay(call, rest)
        case ["profile", "replay", *rest]:
            if not {"-h", "--help"} & set(rest):
                raise FastdistillError("profile replay: expected a file that a profile left, got nothing")
            _profile_replay("FILE", rest)
        case ["profile", *rest]:
            raise FastdistillError(f"profile: expected digits or replay, got {rest[0] if rest else 'none'}")
        case ["demo" | "teacher" as command, *rest]:
            known = "digits"
            raise FastdistillError(f"{command}: expected a task ({known}), got {rest[0] if rest else 'none'}")
        case [command, *_]:
            known = "demo, teacher, profile or doctor"
            raise FastdistillError(f"command: expected {known}, got {command!r} (fastdistill --help)")
    return 0


def _import_pydantic() -> None:
    """While signals wait: its compiled core panics where one interrupts its import."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        importlib.import_module("pydantic")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _configured(kind: type[Config], arguments: list[str], program: str) -> Config | None:
    """The validated configuration of a command; None after a dry run."""
    import tyro

    from fastdistill.train.config import from_yaml, to_yaml, validated

    dry = "--dry-run" in arguments
    arguments = [a for a in arguments if a != "--dry-run"]
    file, rest = _config_file(arguments)
    default = from_yaml(kind, file) if file is not None else kind()
    config = validated(tyro.cli(kind, args=rest, default=default, prog=f"fastdistill {program}"), program)
    if dry:
        print(to_yaml(config), end="")
        return None
    return config


def _config_file(arguments: list[str]) -> tuple[str | None, list[str]]:
    for i, argument in enumerate(arguments):
        if argument == "--config":
            if i + 1 == len(arguments):
                raise FastdistillError("--config: expected a YAML file, got nothing")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), arguments[:i] + arguments[i + 1 :]
    return None, arguments


def _demo_digits(arguments: list[str]) -> None:
    _import_pydantic()
    from fastdistill.tasks.digits.config import DigitsConfig

    config = _configured(DigitsConfig, arguments, "demo digits")
    if config is not None:
        from fastdistill.tasks.digits.demo import run

        run(config)


def _teacher_digits(arguments: list[str]) -> None:
    _import_pydantic()
    from fastdistill.data.fingerprint import listed
    from fastdistill.tasks.digits.teacher import TeacherConfig, other_recipe, provenance, train_teacher

    config = _configured(TeacherConfig, arguments, "teacher digits")
    if config is None:
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    with Progress(console=console, refresh_per_second=2) as progress:
        task = progress.add_task("digits teacher", total=config.train.steps)

        def show(done: int, metrics: dict[str, float] | None) -> None:
            progress.update(task, completed=done)
            if metrics is not None:
                progress.update(task, description=f"digits teacher: loss {metrics['loss']:.3f}")

        made = train_teacher(config, show)
    shipped = provenance()
    changed = other_recipe(made, shipped)
    recipe = (
        f"another recipe than the shipped weights' ({listed(changed)})" if changed else "the shipped weights' recipe"
    )
    console.print(f"{config.output}/teacher.safetensors: trained by {recipe}", soft_wrap=True)
    for name, value in made["metrics"].items():
        console.print(f"  {name:24} {value:.4g}   (shipped: {shipped['metrics'][name]:.4g})")


def _profile_digits(arguments: list[str]) -> None:
    _import_pydantic()
    from rich.console import Console

    from fastdistill.profile import ProfileConfig, profile_digits

    config = _configured(ProfileConfig, arguments, "profile digits")
    if config is not None:
        profile_digits(config, Console())


def _profile_replay(call: str, arguments: list[str]) -> None:
    _import_pydantic()
    from rich.console import Console

    from fastdistill.profile import ReplayConfig, replay_call

    config = _configured(ReplayConfig, arguments, "profile replay FILE")
    if config is not None:
        replay_call(call, config, Console())
