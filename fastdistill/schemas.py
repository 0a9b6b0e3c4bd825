# SPDX-License-Identifier: Apache-2.0
"""The schemas of the files that the package writes, each with its version (docs/compatibility.md has their table).

A file states the version it was written in. One of an older version is converted where it is read, or refused with the
version of fastdistill that reads it; one of a newer version is refused. A file of before 0.1.0 that states none is of
version 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastdistill.errors import StorageError, described


@dataclass(frozen=True)
class Schema:
    """Of one kind of file: ``version`` is written, ``oldest`` to ``version`` are read, and what is older by the
    ``former`` version of fastdistill."""

    name: str
    version: int = 1
    oldest: int = 1
    former: str = ""

    def check(self, stated: object, place: str | Path) -> None:
        """Refuse a version that is not read here.

        Raises:
            StorageError: a newer fastdistill wrote the file ``place``, or an older one reads it.
            ValueError: what the file states is no version.
        """
        if type(stated) is not int or stated < 1:
            raise ValueError(f"schema {described(stated)} is not a whole number from 1 on")
        if stated > self.version:
            rule = f"schema version {self.version} or older"
            raise StorageError(f"{place}: expected {rule}, got {stated}; a newer fastdistill wrote it")
        if stated < self.oldest:
            rule = f"schema version {self.oldest} or newer"
            raise StorageError(f"{place}: expected {rule}, got {stated}; fastdistill {self.former} wrote and reads it")


ROWS = Schema("rows")
CHECKPOINT = Schema("checkpoint", 5, oldest=5, former="0.1.0.dev0 (of before the release of 0.1.0)")
RUN = Schema("run file")
LINES = Schema("metrics")
ABOUT = Schema("about")
BEST = Schema("scores")
REPORT = Schema("report")
SPECTRUM = Schema("spectrum")
CALL = Schema("call")
TABLE = Schema("attention")
SAMPLES = Schema("measured samples")
HASHES = Schema("file hashes")
TRACKED = Schema("tracked run")
TEACHER = Schema("teacher")
RESULT = Schema("result of a part")
WORLD = Schema("rows of a world")
SWEEP = Schema("sweep")
CLASSIFIERS = Schema("classifiers")
