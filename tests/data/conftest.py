# SPDX-License-Identifier: Apache-2.0
"""A complete cache: its files, and a copy that a test may damage."""

import pytest

from tests.data.caches import content, make


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "whole"
    make(path)
    return content(path)


@pytest.fixture
def cache(tmp_path, whole):
    path = tmp_path / "cache"
    path.mkdir()
    for name, data in whole.items():
        (path / name).write_bytes(data)
    return path
