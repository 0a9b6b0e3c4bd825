# SPDX-License-Identifier: Apache-2.0
"""Runs the commands of a page on small models, in this process (which has imported everything): ``Shell``."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.run

from fastdistill import commands
from fastdistill.cli import main
from tests.pages.blocks import ROOT
from tests.processes import as_ranks

#: Commands of a run; their first argument is its file.
OF_A_RUN = ("plan", "cache", "distill", "evaluate", "sample", "export")
#: Fields that make the run of any page short.
SHORT_RUN = (
    "--device cpu --seed 1 --cache.steps 2 --cache.batch 4 --train.steps 2 --train.batch 4 --train.micro-batch null "
    "--evaluate.prompts 2 --preview.every null"
).split()
_HEREDOC = re.compile(r"cat > (\S+) <<'(\w+)'$")


class Shell:
    """A directory in which commands run.

    small: options that make a command short. A command of ``long`` without such options is checked, not run.
    """

    def __init__(self, place: Path, small: Mapping[str, str], long: Sequence[str] = ()) -> None:
        self.place, self.small, self.long = place, small, long

    def run(self, text: str, *, check_only: bool = False) -> None:
        """Run the lines of a block, or only check their options."""
        for words, target in self._lines(text):
            command = words[0]
            if command == "fastdistill":
                self._fastdistill(words[1:], target, check_only)
            elif command == "make":
                done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
            elif command == "pip":
                check_pip(words)
            elif command == "torchrun":
                self._torchrun(words[1:])
            elif command in ("python", "python3") and words[1] == "-m":
                check_module(words[2], words[3:])
            elif command in ("python", "python3") and not check_only:
                runpy.run_path(words[1], run_name="__main__")
            else:
                assert check_only, f"{command}: nothing that the tests run; begin the block with '# needs ...'"
                self._within(words)

    def _lines(self, text: str) -> Iterator[tuple[list[str], str | None]]:
        """The words of each command, and the file for its output; files in heredocs are written."""
        lines = iter(text.replace("\\\n", " ").splitlines())
        for line in lines:
            if found := _HEREDOC.match(line):
                taken = []
                for inner in lines:
                    if inner == found[2]:
                        break
                    taken.append(inner + "\n")
                (self.place / found[1]).write_text("".join(taken), encoding="utf-8")
                continue
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):  # variables of the environment
                words = words[1:]
            if ">" in words:
                yield words[: words.index(">")], words[words.index(">") + 1]
            elif words:
                yield words, None

    def _fastdistill(self, words: list[str], target: str | None, check_only: bool) -> None:
        found = commands.find(words)
        assert found is not None, f"fastdistill {shlex.join(words)}: no such command"
        name, rest = found
        if check_only or (name in self.long and name not in self.small):
            self._check(name, rest)
            return
        small = shlex.split(self.small.get(name, ""))
        more = [*SHORT_RUN, *small] if name in OF_A_RUN else small
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main([*words, *more]) == 0, f"fastdistill {shlex.join(words)}"
        if target is not None:
            (self.place / target).write_text(out.getvalue(), encoding="utf-8")
        if name == "init" and target is not None:
            self._shorten(self.place / target)

    def _shorten(self, file: Path) -> None:
        """Change a run file to a short run, for code that reads it without commands."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(["plan", str(file), *SHORT_RUN, "--dry-run"]) == 0
        file.write_text(out.getvalue(), encoding="utf-8")

    def _check(self, name: str, rest: list[str]) -> None:
        """Check the options of a command without running it."""
        options = {word.partition("=")[0] for word in rest if word.startswith("--")}
        unknown = options - known_options(name)
        assert not unknown, f"fastdistill {name}: no options {', '.join(sorted(unknown))}"
        if name in OF_A_RUN:
            file = self.place / rest[0]
            kept = file.read_text(encoding="utf-8") if file.exists() else None
            if kept is None:
                file.write_text("{}\n")
            with contextlib.redirect_stdout(io.StringIO()):
                assert main([name, *rest, "--dry-run"]) == 0, f"fastdistill {name} {shlex.join(rest)}"
            if kept is None:
                file.unlink()
        elif "--dry-run" in known_options(name):
            with contextlib.redirect_stdout(io.StringIO()):
                assert main([*name.split(), *rest, "--dry-run"]) == 0, f"fastdistill {name} {shlex.join(rest)}"

    def _torchrun(self, words: list[str]) -> None:
        words = [re.sub(r"\$\w+", "1", word) for word in words]
        parsed = torch.distributed.run.get_args_parser().parse_args(words)
        if parsed.module:
            assert parsed.training_script == "fastdistill"
            self._fastdistill(parsed.training_script_args, None, True)
        else:
            self._on_ranks(self.place / parsed.training_script)

    def _on_ranks(self, script: Path) -> None:
        """Run a script in two processes, like torchrun."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        as_ranks(as_torchrun_does, str(script), str(port))

    def _within(self, words: list[str]) -> None:
        """If a command starts one of our commands, check that one."""
        for place, word in enumerate(words):
            if word == "fastdistill":
                self._fastdistill([part for part in words[place + 1 :] if part != "&"], None, True)
            elif word == "torchrun":
                self._torchrun([part for part in words[place + 1 :] if part != "&"])
            elif word in ("python", "python3"):
                check_module(words[place + 2], words[place + 3 :])
            else:
                continue
            return


def as_torchrun_does(rank: int, script: str, port: str) -> None:
    torch.set_num_threads(1)
    os.chdir(Path(script).parent)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    runpy.run_path(script, run_name="__main__")


@functools.cache
def known_options(name: str) -> frozenset[str]:
    """The options of a command, from its help."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        main([*name.split(), "--help"])
    found = set(re.findall(r"--[\w.-]+", out.getvalue()))
    common = {"--json", "--allow-code", "--dry-run"} if name in OF_A_RUN else set()
    if name not in ("init", "doctor", "report", "profile replay"):
        common |= {"--config", "--dry-run"}
    return frozenset(found | common)


class _Parsed(Exception):
    pass


def check_module(name: str, words: list[str]) -> None:
    """Check that ``python -m name`` has these options."""
    if name == "fastdistill":
        Shell(Path(), {})._fastdistill(words, None, True)
        return
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> None:
        parse(parser, arguments)
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(_Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        patch.setattr(sys, "argv", [name, *words])
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as stopped:
            raise AssertionError(f"python -m {name} {shlex.join(words)}: refused") from stopped
        raise AssertionError(f"python -m {name}: parsed no options")


def check_pip(words: Sequence[str]) -> None:
    """Check that ``pip install`` names extras of this package."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert words[1] == "install"
    for word in words[2:]:
        found = re.fullmatch(r"(?:\.|fastdistill)(?:\[([\w,]+)\])?", word)
        assert found, f"pip install {word}: not this package"
        assert not found[1] or set(found[1].split(",")) <= extras.keys(), word
