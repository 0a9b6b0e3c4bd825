# SPDX-License-Identifier: Apache-2.0
"""User text in a figure: fonts that have its characters, escapes for characters in no font, and line breaks."""

from __future__ import annotations

import bisect
import re
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

from fastdistill.evaluate._optional import require

#: Maximum length of a line of a figure; this limits the cost of measuring a long text.
_LONGEST = 200


class Lettering:
    """Fonts for the texts of one figure, chosen together.

    Args:
        texts: everything that will be drawn. Characters missing in matplotlib's configured fonts are looked up in all
            installed fonts; those found in none are drawn as Python escapes, with one warning for all of them.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        families, self._missing = _families(frozenset("".join(map(printable, texts))))
        if drawn := sorted(c for c in self._missing if not _ignorable(c)):
            shown = " ".join(drawn[:10]) + (" ..." if len(drawn) > 10 else "")
            warnings.warn(
                f"no installed font has {len(drawn)} of the characters of this figure ({shown}); they are drawn as "
                "escapes. A font such as Noto Sans CJK or Symbola has them",
                stacklevel=3,
            )
        #: Arguments for every ``Text`` of the figure; ``$``, ``%`` and ``_`` have no special meaning.
        self.style: dict[str, Any] = {"fontfamily": families, "parse_math": False, "usetex": False}
        self._figure = require("matplotlib.figure").Figure()

    def fit(self, text: str, width: float, lines: int = 1, **style: Any) -> tuple[str, float, float]:
        """``text`` broken into at most ``lines`` lines of at most ``width`` inches; its width and height in inches.

        ``style``: the other arguments of the ``Text`` that will draw it, such as ``fontsize``.
        """
        scratch = require("matplotlib.text").Text(figure=self._figure, **(self.style | style))

        def size(shown: str) -> tuple[float, float]:
            scratch.set_text(shown)
            box = scratch.get_window_extent()
            return box.width / self._figure.dpi, box.height / self._figure.dpi

        wrapped = "\n".join(fitted(printable(text, self._missing), lambda line: size(line)[0] <= width, lines))
        return wrapped, *size(wrapped)


def printable(text: str, missing: Collection[str] = ()) -> str:
    """``text`` on one line: whitespace as single spaces; control characters and characters in ``missing`` as escapes.

    Characters without a shape of their own (joiners, variation selectors) are left out if they are missing or follow an
    escape.
    """
    shown: list[str] = []
    for c in " ".join(text.split()):
        if _ignorable(c) and (c in missing or (shown and len(shown[-1]) > 1)):
            continue
        escape = c in missing or unicodedata.category(c) in ("Cc", "Cs")  # control characters, lone surrogates
        shown.append(c.encode("unicode_escape").decode() if escape else c)
    return "".join(shown)


def fitted(text: str, fits: Callable[[str], bool], lines: int) -> list[str]:
    """``text`` in at most ``lines`` lines for which ``fits`` is true; an ellipsis replaces text that does not fit.

    Lines are broken at spaces, beside wide characters (Chinese, Japanese, Korean, emoji) and before escapes, else
    inside a word, but never inside a character that consists of several code points (accents, joined emoji).
    """
    found: list[str] = []
    while text and len(found) < lines:
        longest = min(len(text), _LONGEST)
        room = max(bisect.bisect_left(range(1, longest + 1), True, key=lambda n: not fits(text[:n].rstrip())), 1)
        cut = len(text) if room == len(text) else _cut(text, room)
        found.append(text[:cut].rstrip())
        text = text[cut:].lstrip()
    if text:
        last = found[-1]
        while last and not fits(last + "…"):
            last = last[: _cut(last, len(last) - 1, anywhere=True)].rstrip()
        found[-1] = last + "…"
    return found


def _cut(text: str, most: int, anywhere: bool = False) -> int:
    """Where to break ``text``: after at most ``most`` characters, if there is such a place above 0."""

    def whole(n: int) -> bool:
        return not (_continues(text[n]) or text[n - 1] == "\u200d")

    def good(n: int) -> bool:
        before, after = text[n - 1], text[n]
        return anywhere or " " in (before, after) or _wide(before) or _wide(after) or after == "\\"

    places = [n for n in range(most, 0, -1) if whole(n)]
    if not places:  # one character of many code points, longer than the line
        return next((n for n in range(most + 1, len(text)) if whole(n)), 0 if anywhere else len(text))
    return next(filter(good, places), places[0])


def _wide(c: str) -> bool:
    return unicodedata.east_asian_width(c) in ("W", "F")


def _continues(c: str) -> bool:
    """Whether ``c`` belongs to the character before it: accents, joiners, variation selectors, skin tones."""
    return unicodedata.category(c) in ("Mn", "Me", "Mc") or c == "\u200d" or "\U0001f3fb" <= c <= "\U0001f3ff"


def _ignorable(c: str) -> bool:
    """Whether ``c`` has no shape of its own: formatting characters and variation selectors."""
    return unicodedata.category(c) == "Cf" or re.match("[\ufe00-\ufe0f\U000e0100-\U000e01ef]", c) is not None


def _families(characters: Collection[str]) -> tuple[list[str], set[str]]:
    """matplotlib's families and those added for ``characters``, and the characters that no installed font has."""
    families = [family for family in require("matplotlib").rcParams["font.family"] if _font(family) is not None]
    families = families or ["DejaVu Sans"]  # matplotlib contains this font
    missing = set(characters).difference(*(_drawn(family, characters) for family in families))
    installed: list[str] = _installed() if any(not _ignorable(c) for c in missing) else []
    while missing and installed:
        best = max(installed, key=lambda family: len(_drawn(family, missing)))  # the first one, if several are equal
        if not (drawn := _drawn(best, missing)):
            break
        families.append(best)
        missing -= drawn
    return families, missing


def _installed() -> list[str]:
    """Installed families, sans-serif first, without matplotlib's own special fonts (formulas, placeholder boxes)."""
    own = require("matplotlib").get_data_path()
    names = {
        font.name
        for font in require("matplotlib.font_manager").fontManager.ttflist
        if font.style == "normal" and font.weight in (400, "normal", "regular") and not font.fname.startswith(own)
    }
    names = {name for name in names if "lastresort" not in name.lower().replace(" ", "")}
    return sorted(names, key=lambda name: ("sans" not in name.lower(), "mono" in name.lower(), name))


def _drawn(family: str, characters: Iterable[str]) -> set[str]:
    """Those of ``characters`` for which the family has an outline; colored emoji are bitmaps and have none."""
    font = _font(family)
    return {
        c
        for c in characters
        if font is not None and (index := font.get_char_index(ord(c))) and _outline(font, c, index)
    }


def _outline(font: Any, c: str, index: int) -> bool:
    if c.isspace() or _ignorable(c):
        return True
    font.load_glyph(index)
    return len(font.get_path()[0]) > 0


def _font(family: str) -> Any:
    """The font that matplotlib uses for the family; None if there is none or it cannot be read."""
    manager = require("matplotlib.font_manager")
    try:
        return manager.get_font(manager.findfont(manager.FontProperties(family=[family]), fallback_to_default=False))
    except (ValueError, OSError, RuntimeError):
        return None
