# SPDX-License-Identifier: Apache-2.0
"""Every block of code on a page of the documentation runs on small models, and every command in its text exists.

A block whose first line is ``# needs ...`` is only checked: its syntax, its imports, the options of its commands.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

import fastdistill
from fastdistill import commands, runs
from tests.pages.blocks import LANGUAGES, ROOT, blocks, inline, pages, prose, read
from tests.pages.content import LONG, PAGES, SMALL, Names, Page, files_of_demos
from tests.pages.shell import Shell, known_options


def page_of(name: str) -> Page:
    return PAGES.get(name, Page())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(
    name: str, place: Path, factory: pytest.TempPathFactory, *, long: bool = False, check_only: bool = False
) -> None:
    """Run all blocks of a page in order; Python blocks see the names of earlier ones."""
    page = page_of(name)
    names: Names = {} if check_only else page.prepare(place, factory) or {}
    names["__name__"] = "__main__"
    shell = Shell(place, {**(SMALL if long else {}), **page.small}, LONG)
    if long:
        files_of_demos(place)
    for block in blocks(name):
        where = f"{name}:{block.line}"
        if block.language == "bash":
            shell.run(block.text, check_only=check_only or bool(block.needs))
        elif block.language == "yaml":
            (place / "shown.yaml").write_text(block.text)
            runs.load(place / "shown.yaml")
        elif block.file:
            (place / block.file).write_text(block.text)
        elif block.language == "python":
            code = block.text
            for old, new in page.smaller:
                code = code.replace(old, new)
            compiled = compile(code, where, "exec")
            if check_only or block.needs:
                check_imports(code)
            else:
                exec(compiled, names)
    if not check_only:
        page.check(names, place)


def check_imports(code: str) -> None:
    """Check that its imports exist."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
        elif isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)


@pytest.mark.parametrize("name", pages())
def test_the_blocks_of_a_page_run(name: str, place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The blocks of a page that takes long are only checked here."""
    run(name, place, tmp_path_factory, check_only=page_of(name).slow)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in pages() if page_of(name).slow])
def test_the_blocks_of_a_long_page_run(name: str, place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run(name, place, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in pages() if any(command in read(name) for command in LONG)])
def test_the_long_commands_of_a_page_run(name: str, place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run(name, place, tmp_path_factory, long=True)


@pytest.mark.parametrize("name", pages())
def test_blocks_say_what_they_are(name: str) -> None:
    for block in blocks(name):
        assert block.language in LANGUAGES, f"{name}:{block.line}: {block.language!r} is none of {LANGUAGES}"
    loose = re.findall(r"^    (?:fastdistill|python|pip|make|torchrun) .*", prose(name), re.MULTILINE)
    assert not loose, f"{name}: commands outside of a fenced block, which nothing runs: {loose}"
    assert prose(name).count("```") == 0, f"{name}: a block that does not begin and end at the left"


@pytest.mark.parametrize("name", pages())
def test_commands_in_the_text_are_there(name: str) -> None:
    for text in inline(name):
        words = shlex.split(text, comments=True) if re.match(r"(fastdistill|make|torchrun) ", text) else []
        if "fastdistill" in words:
            rest = words[words.index("fastdistill") + 1 :]
            if not rest or rest[0] in ("--help", "--version") or not re.fullmatch(r"[a-z]+", rest[0]):
                continue
            found = commands.find(rest)
            group = any(command.startswith(f"{rest[0]} ") for command in commands.listed())
            assert found is not None or (group and rest[1:] in ([], ["..."])), f"{name}: {text}"
            options = {word.partition("=")[0] for word in rest if word.startswith("--")}
            if found is not None:
                assert options <= known_options(found[0]) | {"--help"}, f"{name}: {text}"
        elif words[:1] == ["make"]:
            done = subprocess.run(["make", "-n", words[1]], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{name}: {text}: {done.stderr}"
        elif re.match(r"--[a-z]+\.[\w.-]+", text):
            fields = known_options("distill") | known_options("demo digits")
            assert text.split()[0] in fields, f"{name}: {text}"


def test_every_page_is_in_the_navigation_and_every_public_name_in_the_reference() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for file in (ROOT / "docs").rglob("*.md"):
        assert f" {file.relative_to(ROOT / 'docs').as_posix()}\n" in site, file
    reference = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "docs" / "api").glob("*.md"))
    listed = re.findall(r"^::: (fastdistill\.[\w.]+)$", reference, re.MULTILINE)
    for path in listed:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
    modules: tuple[Any, ...] = (fastdistill, fastdistill.ops, fastdistill.evaluate, fastdistill.runs)
    public = {name for module in modules for name in module.__all__} - {"__version__", "OPS"}
    assert public <= {path.rpartition(".")[2] for path in listed}
