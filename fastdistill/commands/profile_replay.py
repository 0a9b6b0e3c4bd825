# SPDX-License-Identifier: Apache-2.0
"""run one saved call of an op repeatedly"""

from __future__ import annotations

from fastdistill.commands._options import configured, import_pydantic
from fastdistill.errors import FastdistillError


def run(arguments: list[str]) -> None:
    helped = bool({"-h", "--help"} & set(arguments))
    if not helped and (not arguments or arguments[0].startswith("-")):
        raise FastdistillError("profile replay: expected a file that a profile left, got nothing")
    import_pydantic()
    from rich.console import Console

    from fastdistill.profile import ReplayConfig, replay_call

    rest = ["--help"] if helped else arguments[1:]
    config = configured(ReplayConfig, rest, "profile replay FILE")
    if config is not None:
        replay_call(arguments[0], config, Console())
