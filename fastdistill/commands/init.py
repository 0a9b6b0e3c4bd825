# SPDX-License-Identifier: Apache-2.0
"""print a run file for a pipeline folder: fastdistill init FOLDER > run.yaml"""

from __future__ import annotations

from dataclasses import dataclass

from fastdistill.commands._arguments import parsed
from fastdistill.commands._options import import_pydantic, quiet
from fastdistill.documented import documented
from fastdistill.errors import FastdistillError


@documented
@dataclass(frozen=True)
class InitOptions:
    """Print a run file for the teacher in FOLDER, a folder of a diffusers pipeline; edit it as you like."""

    recipe: str | None = None
    """Use the settings of a paper; --recipes lists them."""
    recipes: bool = False
    """List the recipes."""
    call: str | None = None
    """module:function that calls a model whose family is unknown; needs --allow-code."""
    allow_code: bool = False
    """Allow the import of the module of --call."""


def run(arguments: list[str]) -> None:
    import_pydantic()
    folder = arguments[0] if arguments and not arguments[0].startswith("-") else None
    rest = arguments if folder is None else arguments[1:]
    options = parsed([InitOptions], rest, "fastdistill init FOLDER")
    quiet()
    from fastdistill import runs

    if options.recipes:
        for name, text in runs.recipes().items():
            print(f"{name:22} {text}")
        return
    if folder is None:
        raise FastdistillError("init: expected a pipeline folder of diffusers, got nothing")
    print(runs.init(folder, recipe=options.recipe, call=options.call, allow_code=options.allow_code), end="")
