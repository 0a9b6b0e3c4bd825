# SPDX-License-Identifier: Apache-2.0
"""The plot of a device: one line per shape and dtype, one mark per rival, ops one below the other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.measure import Row

_MARKS = "oDs^v"
_TOP, _LINE = 1.0, 0.19  # inches


def plot(name: str, measured: list[list[Row]], target: Path) -> None:
    """``measured``: from ``files.latest``. Hollow marks are the second variant: two threads, or a CUDA graph.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    found = [row for rows in measured for row in rows if row["ratio"]]
    how = "mode" if name.startswith("gpu") else "threads"
    ways = sorted({row[how] for row in found})
    rivals = list(dict.fromkeys(row["rival"] for row in found))
    styles: dict[str, dict[str, Any]] = {
        r: {"marker": _MARKS[i // 10 % len(_MARKS)], "color": f"C{i % 10}"} for i, r in enumerate(rivals)
    }
    lines, heads = _lines(found)
    figure = Figure(figsize=(9, _TOP + _LINE * (len(lines) + len(heads))), layout="constrained")
    axes = figure.add_subplot()
    for row in found:
        fill: dict[str, Any] = {} if row[how] == ways[0] else {"markerfacecolor": "white"}
        place = lines[_key(row)]
        axes.plot(float(row["ratio"]), place, linestyle="", markersize=5, **styles[row["rival"]], **fill)
    axes.axvline(1, color="black", linewidth=1)
    axes.axvspan(1e-3, 1, color="0.94", zorder=0)
    _scale(axes, [float(row["ratio"]) for row in found])
    labels = [f"{shape}, {dtype}" for _, shape, dtype in lines]
    axes.set_yticks([*lines.values(), *heads.values()], [*labels, *heads], fontsize=7)
    for label in axes.get_yticklabels()[len(lines) :]:
        label.set_fontweight("bold")
    for y in heads.values():
        axes.axhline(y - 0.5, color="0.8", linewidth=0.6)
    axes.set_ylim(len(lines) + len(heads) - 0.3, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("times faster than the rival (1: equally fast; in the grey the rival is faster)", fontsize=8)
    axes.set_title(name, fontsize=9)
    handles = [Line2D([], [], linestyle="", markersize=5, label=r, **styles[r]) for r in rivals]
    words = {"1": "1 thread"} | {way: f"{way} threads" if how == "threads" else way for way in ways if way != "1"}
    fills = {way: "0.3" if way == ways[0] else "white" for way in ways}
    handles += [
        Line2D([], [], linestyle="", marker="o", color="0.3", markerfacecolor=fills[w], markersize=5, label=words[w])
        for w in ways
    ]
    figure.legend(handles=handles, fontsize=7, loc="outside upper center", ncols=5, frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130, metadata={"Software": None})


def _key(row: Row) -> tuple[str, str, str]:
    return row["op"], row["shape"], row["dtype"]


def _lines(found: list[Row]) -> tuple[dict[tuple[str, str, str], int], dict[str, int]]:
    """The vertical position of each shape and dtype, and of the name of each op, counted from the top."""
    lines: dict[tuple[str, str, str], int] = {}
    heads: dict[str, int] = {}
    order = list(dict.fromkeys(_key(row)[:2] for row in found))  # keeps the dtypes of a shape together
    for key in sorted(dict.fromkeys(map(_key, found)), key=lambda key: order.index(key[:2])):
        heads.setdefault(key[0], len(lines) + len(heads))
        lines[key] = len(lines) + len(heads)
    return lines, heads


def _scale(axes: Any, ratios: list[float]) -> None:
    powers = range(math.floor(math.log2(min(0.8, *ratios))), math.ceil(math.log2(max(1.2, *ratios))) + 1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(2.0 ** powers[0], 2.0 ** powers[-1])
    axes.set_xticks([2.0**p for p in powers], [f"{2.0**p:g}" for p in powers], fontsize=8)
