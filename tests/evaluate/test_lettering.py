# SPDX-License-Identifier: Apache-2.0
"""Arbitrary texts in figures: fonts, escapes, line breaks."""

from __future__ import annotations

import itertools
import re
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import font_manager

from fastdistill.evaluate import loss_curves, png, sample_grid
from fastdistill.evaluate.lettering import Lettering, fitted, printable

fonttools = pytest.importorskip("fontTools.fontBuilder")
pens = pytest.importorskip("fontTools.pens.ttGlyphPen")

LONG = "a photo of an astronaut riding a horse on mars, highly detailed, trending, 8k, by a well-known artist"
FAMILY = "Chinese without the rest"
HARD = [
    LONG,
    "一只红色的猫坐在窗台上看着外面的雨",
    "a \U0001f98a in the snow \U0001f469\u200d\U0001f469\u200d\U0001f467\ufe0f",
    "cost $5 and $6, 100% off",
    "قطة حمراء تجلس",
    "tab\there\x07 \x00line",
    "Donaudampfschifffahrtsgesellschaftskapitän",
    "\ud800 and x_1^2 {a} \\frac",
    "",
    "  ",
]


@pytest.fixture(autouse=True)
def only_the_fonts_of_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    fonts = [font for font in font_manager.fontManager.ttflist if font.fname.startswith(matplotlib.get_data_path())]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)


@pytest.fixture
def chinese(tmp_path: Path) -> None:
    """An installed font with squares for the Chinese of ``HARD``, and only blanks for its emoji."""
    characters = sorted({c for c in "".join(HARD) if "CJK" in unicodedata.name(c, "")})
    names = {ord(c): f"g{ord(c)}" for c in characters} | {0x1F98A: "blank", 0x1F469: "blank"}
    pen = pens.TTGlyphPen(None)
    for at in ((0, 0), (0, 700), (900, 700), (900, 0)):
        (pen.lineTo if at != (0, 0) else pen.moveTo)(at)
    pen.closePath()
    square, blank = pen.glyph(), pens.TTGlyphPen(None).glyph()
    order = [".notdef", *dict.fromkeys(names.values())]
    font = fonttools.FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(order)
    font.setupCharacterMap(names)
    font.setupGlyf({name: square if name.startswith("g") else blank for name in order})
    font.setupHorizontalMetrics(dict.fromkeys(order, (1000, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": FAMILY, "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    font.save(tmp_path / "chinese.ttf")
    font_manager.fontManager.addfont(tmp_path / "chinese.ttf")


def grid(prompts: list[str], names: tuple[str, ...] = ("teacher", "a_student_with_a_name_longer_than_its_room")) -> Any:
    count = len(prompts)
    return sample_grid(
        {name: torch.zeros(count, 4, 4) for name in names},
        prompts,
        correct={name: [True] * count for name in names},
        seen=[i % 2 == 0 for i in range(count)],
    )


def texts(figure: Any) -> list[Any]:
    return [text for text in figure.axes[0].texts if text.get_text()]


@pytest.mark.filterwarnings("ignore:no installed font")
@pytest.mark.parametrize("prompts", [HARD, [LONG]])
def test_no_text_is_clipped_or_overlaps_another_or_an_image(prompts: list[str]) -> None:
    figure = grid(prompts)
    figure.draw_without_rendering()
    page, boxes = figure.bbox, [text.get_window_extent() for text in texts(figure)]
    assert len(boxes) >= 6
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    images = [image.get_window_extent() for image in figure.axes[0].get_images()]
    assert not any(box.overlaps(image) for box in boxes for image in images)


def test_characters_without_a_font_are_escaped_with_one_warning() -> None:
    with pytest.warns(UserWarning, match=r"no installed font has 19 of the characters .*; they are drawn") as caught:
        figure = grid(["x\ufdd0", *HARD[1:2], "\U0001f98a\u200d\ufe0f \U0001f469"])
        png(figure, dpi=20)  # matplotlib warns about missing glyphs
    assert len(caught) == 1
    drawn = "".join(text.get_text() for text in texts(figure))
    assert "x\\ufdd0" in drawn and "\\u4e00\\u53ea" in drawn and "\\U0001f98a \\U0001f469" in drawn.replace("\n", " ")
    assert HARD[1] in figure.get_label()  # the label is unchanged


def test_an_installed_font_that_has_them_is_used(chinese: None) -> None:
    with pytest.warns(UserWarning, match="has 1 of the characters of this figure \\(\U0001f98a\\)") as caught:
        figure = grid([HARD[1], "\U0001f98a"], ("teacher",))  # the font has no outline for the emoji
        png(figure, dpi=20)
    assert len(caught) == 1
    (caption,) = (text for text in texts(figure) if text.get_text().startswith("一"))
    assert FAMILY in caption.get_fontfamily() and caption.get_text().replace("\n", "") == HARD[1]


def test_signs_of_formulas_mean_themselves() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = grid(["$x^2$", "50% $"], ("$a$",))
        curves = loss_curves({"$a$ $b$ 50%": ([1, 2], [1.0, 0.5]), "w" * 90: ([1, 2], [2.0, 0.7])})
        assert png(figure, dpi=20) and png(curves, dpi=20)
    found = {text.get_text(): text for text in texts(figure) + texts(curves)}
    assert {"$x^2$", "50% $", "$a$", "$a$ $b$ 50%"} <= set(found)
    assert not any(text.get_parse_math() or text.get_usetex() for text in found.values())
    assert any(name.startswith("Www") and name.endswith("…") for name in found)


def test_a_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected a text, got NoneType"):
        sample_grid({"teacher": torch.zeros(2, 4, 4)}, ["a", None])  # type: ignore[list-item]


#: Texts, the parts that must stay together in a line, and the width.
CLUSTERS = (" ", "a", "W", "红", "e\u0301", "\U0001f469\u200d\U0001f469", "\U0001f44b\U0001f3fd", "\u2764\ufe0f")


@given(st.lists(st.sampled_from(CLUSTERS), max_size=40), st.integers(1, 9), st.integers(1, 4))
def test_lines_fit_are_whole_and_lose_nothing(clusters: list[str], width: int, lines: int) -> None:
    def length(line: str) -> int:  # in clusters
        return len(re.findall("|".join((*CLUSTERS, "…")), line))

    found = fitted(printable("".join(clusters)), lambda line: length(line) <= width, lines)
    assert len(found) <= lines and all(length(line) <= width for line in found)
    rest = [cluster for cluster in clusters if cluster != " "]
    for line in found:
        here = [rest.pop(0) for _ in range(length(re.sub("[ …]", "", line)))]
        assert "".join(here) == re.sub("[ …]", "", line)
    assert bool(rest) == bool(found and found[-1].endswith("…"))


def test_lines_break_at_words_beside_wide_characters_and_before_escapes() -> None:
    def lines(text: str, width: int, most: int = 9) -> list[str]:
        return fitted(text, lambda line: len(line) <= width, most)

    assert lines("one two three", 7) == ["one two", "three"]
    assert lines("one two three", 7, 1) == ["one tw…"]
    assert lines("红色 cat红色", 5) == ["红色", "cat红色"]
    assert lines(r"ab\u4e00\u53ea", 9) == [r"ab\u4e00", r"\u53ea"]
    assert lines("abcdefgh", 3) == ["abc", "def", "gh"]
    assert lines("", 3) == [] and lines("a", 0) == ["a"]


def test_a_fit_has_its_width_and_height() -> None:
    lettering = Lettering([LONG])
    one, width, height = lettering.fit(LONG, 1.5, 1, fontsize=9)
    two, _, taller = lettering.fit(LONG, 1.5, 2, fontsize=9)
    assert one.endswith("…") and "\n" not in one and two.count("\n") == 1
    assert 0.5 < width <= 1.5 and 1.5 * height < taller < 3 * height
