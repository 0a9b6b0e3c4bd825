# SPDX-License-Identifier: Apache-2.0
"""The schemas of the files that the package writes, each with its version (docs/compatibility.md has a table of them).

A file states the version of its schema. An older version is converted when it is read, or refused with the version of
fastdistill that reads it; a newer version is refused. A file from before 0.1.0 that states no version has version 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastdistill.errors import StorageError, described


@dataclass(frozen=True)
class Schema:
    """The schema of one kind of file: ``version`` is written, ``oldest`` to ``version`` can be read; for older files
    use the ``former`` version of fastdistill."""

    name: str
    version: int = 1
    oldest: int = 1
    former: str = ""

    def check(self, stated: object, place: str | Path) -> None:
        """Refuse a version that cannot be read.

        Raises:
            StorageError: a newer fastdistill wrote the file ``place``, or only an older one can read it.
            ValueError: the file states an invalid version.
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
CHECKPOINT = Schema("checkpoint", 5, oldest=5, former="0.1.0.dev0 (from before the release of 0.1.0)")
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
