# SPDX-License-Identifier: Apache-2.0
"""The command line: finds the command (``fastdistill.commands``), and turns errors into one line and an exit status."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from difflib import get_close_matches

import fastdistill
from fastdistill import commands
from fastdistill.errors import FastdistillError, Stopped

_WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}

# Heavy modules are imported where they are used, so that help is fast and Ctrl-C during an import is handled.

_USAGE = """\
fastdistill {version}: distillation of conditional diffusion models

usage: fastdistill COMMAND [options]        (options of a command: fastdistill COMMAND --help)

{commands}

options of commands:
  --config FILE    read options from a YAML file; options on the command line take precedence
                   (the commands of a run take their run file as the first argument)
  --dry-run        check the configuration, print it as YAML and exit
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for an error of the user or the machine, 130 for Ctrl-C (143 for
    SIGTERM during a training)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _wait_briefly()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends as cleanly as Ctrl-C
    try:
        with warnings.catch_warnings():
            told: set[str] = set()
            warnings.showwarning = lambda message, *_, **__: _warn(message, told)
            _run(arguments)
            sys.stdout.flush()
            return 0
    except FastdistillError as error:
        print(f"fastdistill: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Stopped as stopped:  # the command has reported it
        return stopped.code
    except KeyboardInterrupt:
        print("\nfastdistill: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_briefly() -> None:
    """Let OpenMP's threads wait actively for some 0.1 ms, then asleep, unless the environment says otherwise. Its own
    limit is of the order of 10 ms: two runs on the same cores would spend most of their time waiting for threads that
    the other run keeps from a core. OpenMP reads this when torch is imported."""
    if not _WAITING & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "5000"  # GNU's: iterations
        os.environ["KMP_BLOCKTIME"] = "1"  # LLVM's and Intel's: milliseconds


def _warn(message: Warning | str, told: set[str]) -> None:
    """Print a warning without its source line, once."""
    if str(message) not in told:
        told.add(str(message))
        print(f"fastdistill: {message}", file=sys.stderr)


def _run(arguments: list[str]) -> None:
    if (found := commands.find(arguments)) is not None:
        name, rest = found
        commands.module(name).run(rest)
        return
    first = arguments[0] if arguments else "--help"
    if first == "--version":
        print(fastdistill.__version__)
        return
    listed = commands.listed()
    groups: dict[str, list[str]] = {}
    for name in listed:
        group, _, task = name.partition(" ")
        groups.setdefault(group, []).append(task)
    if first in ("-h", "--help", "help") or (first in groups and {"-h", "--help"} & set(arguments[1:2])):
        lines = "\n".join(f"  {name:18} {text}" for name, text in listed.items())
        print(_USAGE.format(version=fastdistill.__version__, commands=lines), end="")
        return
    if first in groups:
        got = arguments[1] if len(arguments) > 1 else "none"
        *others, last = groups[first]
        known = f"{', '.join(others)} or {last}" if others else last
        raise FastdistillError(f"{first}: expected {known}, got {got}")
    near = get_close_matches(first, groups, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise FastdistillError(f"command: expected {', '.join(groups)}, got {first!r} ({hint}fastdistill --help)")
