# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: links to files outside of docs/, which the site does not have, become their paths."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

#: A link whose target leads out of docs/.
OUTSIDE = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with ``[text](../path)`` as ``text (path)``, or as the path alone where the text is the path."""
    depth = len(PurePosixPath(page.file.src_uri).parts) - 1

    def path_of(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        if target.count("../") <= depth:
            return match[0]
        path = target.replace("../", "")
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return OUTSIDE.sub(path_of, markdown)
