# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.report``: the README's table and the plots, from benchmarks/results alone.

Another folder of results (``--results``) is plotted into itself, and the README stays as it is.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.files import RESULTS, latest, latest_parts, read
from benchmarks.measure import Row
from benchmarks.registry import cases

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"


def table(results: Path = RESULTS) -> str:
    """Per device the last measurement of every case, a GPU that nobody measured on with the cases that wait for it."""
    files = sorted(results.glob("*.csv"))
    lines = []
    for path in files:
        measured = latest(read(path))
        gpu = path.stem.startswith("gpu")
        lines += [f"**{path.stem}** ({_versions(measured)}): times faster than each rival, both sides in one run.", ""]
        if results == RESULTS:
            image = (IMAGES / f"benchmarks-{path.stem}.png").relative_to(ROOT)
            lines += [f"![Times faster than each rival, {path.stem}]({image})", ""]
        lines += ["<details><summary>The same in figures</summary>", ""]
        columns = ["op", "shape", "dtype", "mode" if gpu else "threads", "times faster than"]
        columns += ["% of ceiling"] if gpu else []  # a shared CPU's is not the same from one minute to the next
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(_cells(rows, columns))} |" for rows in measured]
        lines += [*_where(path, gpu), "", "</details>", ""]
    if not any(path.stem.startswith("gpu") for path in files):
        lines += [
            "**GPU** (`make gpu PART=1/3` on a machine that has one)",
            "",
            "| op | shape | dtype | times faster than |",
        ]
        lines += ["|---|---|---|---|"]
        waiting = [case for case in cases("cuda") if case.headline]
        lines += [f"| {c.op} | {c.shape} | {c.dtype} | {' · '.join(c.rivals)}: unmeasured |" for c in waiting]
    return "\n".join(lines).strip()


def _where(path: Path, gpu: bool) -> list[str]:
    """Where the milliseconds of training steps went; of a shared CPU the shares."""
    found = latest_parts(path)
    if not found:
        return []
    lines = ["", f"Where a training step's time goes, {'ms' if gpu else '%'} (torch.profiler):", ""]
    columns = ["shape", "contestant", *found[0]["ms"]]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in found:
        scale = 1.0 if gpu else 100 / sum(row["ms"].values())
        cells = [row["shape"], row["contestant"], *(f"{scale * ms:.1f}" for ms in row["ms"].values())]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _versions(measured: list[list[Row]]) -> str:
    last = max((row for rows in measured for row in rows), key=lambda row: row["date"])
    driver = f", driver {last['driver']}" if last["driver"] else ""
    return f"torch {last['torch']}{driver}"


def _cells(rows: list[Row], columns: list[str]) -> list[str]:
    told = [f"{row['rival']} **{float(row['ratio']):.2f}**{_memory(row)}" for row in rows if row["ratio"]]
    told += [f"{row['rival']} ({row['note'] or 'not measured'})" for row in rows if not row["ratio"]]
    percent = rows[0]["percent"]
    made = {"times faster than": " · ".join(told), "% of ceiling": f"{float(percent):.0f}" if percent else ""}
    return [made.get(column) or rows[0].get(column, "") for column in columns]


def _memory(row: Row) -> str:
    """Of a training step: the peak beside the rival's."""
    return f" ({row['ours_peak_gb']} of {row['rival_peak_gb']} GB)" if row["rival_peak_gb"] else ""


def plots(results: Path, into: Path) -> Iterator[Path]:
    """One picture a device: ``benchmarks-<device>.png``.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.figure import Figure

    for path in sorted(results.glob("*.csv")):
        measured = [[row for row in rows if row["ratio"]] for rows in latest(read(path))]
        measured = [rows for rows in measured if rows][::-1]
        if not measured:
            continue
        names = list(dict.fromkeys(row["rival"] for rows in measured[::-1] for row in rows))
        figure = Figure(figsize=(9, 1.3 + 0.2 * len(measured)), layout="constrained")
        axes = figure.add_subplot()
        for i, name in enumerate(names):
            found = [(float(r["ratio"]), y) for y, rows in enumerate(measured) for r in rows if r["rival"] == name]
            axes.plot(*zip(*found, strict=True), "oDs^v"[i // 10 % 5], color=f"C{i % 10}", label=name, markersize=5)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.axvspan(1e-3, 1, color="0.95", zorder=0)
        ratios = [float(row["ratio"]) for rows in measured for row in rows]
        powers = range(math.floor(math.log2(min(0.8, *ratios))), math.ceil(math.log2(max(1.2, *ratios))) + 1)
        axes.set_xscale("log", base=2)
        axes.set_xlim(2.0 ** powers[0], 2.0 ** powers[-1])
        axes.set_xticks([2.0**p for p in powers], [f"{2.0**p:g}" for p in powers])
        axes.set_yticks(range(len(measured)), [_label(rows[0], path.stem) for rows in measured], fontsize=7)
        axes.set_ylim(-0.7, len(measured) - 0.3)
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("times faster than the rival")
        axes.set_title(path.stem, fontsize=9)
        figure.legend(fontsize=7, loc="outside upper center", ncols=5)
        into.mkdir(parents=True, exist_ok=True)
        target = into / f"benchmarks-{path.stem}.png"
        figure.savefig(target, dpi=130, metadata={"Software": None})
        yield target


def _label(first: Row, device: str) -> str:
    how = first["mode"] if device.startswith("gpu") else f"{first['threads']} thread{'s' * (first['threads'] != '1')}"
    return f"{first['op']}, {first['shape']}, {first['dtype']}, {how}"


def filled(readme: str, name: str, text: str) -> str:
    """The README with a text between the marks of that name."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", readme, flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs (benchmarks/results)")
    results = parser.parse_args(arguments).results
    if not results.is_dir():
        parser.error(f"--results: expected a folder of CSV files, got {results}")
    own = results.resolve() == RESULTS.resolve()
    try:
        for path in plots(results, IMAGES if own else results):
            print(path)
    except ImportError:
        print("no plots: matplotlib is not installed", file=sys.stderr)
    if own:
        readme = ROOT / "README.md"
        readme.write_text(filled(readme.read_text(encoding="utf-8"), "benchmarks", table()), encoding="utf-8")
    else:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
