# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.report``: the README's table, docs/benchmarks.md and its plots, only from benchmarks/results.

Another folder of results (``--results``) gets its own plots, and the README is not changed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.files import RESULTS, latest, latest_parts, read
from benchmarks.measure import Row
from benchmarks.plots import plot
from benchmarks.registry import Case, cases
from fastdistill.errors import InputError
from fastdistill.files import located

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
FULL = ROOT / "docs" / "benchmarks.md"
NEEDED = "date op shape dtype threads rival ratio".split()


def current(path: Path) -> list[list[Row]]:
    """The last measurements of a file, without cases and rivals that the registry no longer has."""
    known = {(c.op, c.shape, c.dtype): c.rivals for kind in ("cpu", "cuda") for c in cases(kind)}
    rows = read(path, needed=NEEDED)
    rivals = [known.get((row["op"], row["shape"], row["dtype"]), ()) for row in rows]
    return latest(r for r, names in zip(rows, rivals, strict=True) if r["rival"] in names or _kernel(r, names))


def _kernel(row: Row, names: Sequence[str]) -> bool:
    """Whether the row is about another kernel of ours, for a known case."""
    return bool(names) and row["rival"].startswith("ours, ")


def summary(results: Path = RESULTS) -> str:
    """For each op, the smallest and largest speedup over all shapes and thread counts."""
    lines = []
    for path, measured in _measured(results):
        gpu = path.stem.startswith("gpu")
        lines += [f"**{path.stem}** ({_versions(measured)}): times faster than each rival, both sides in one run,", ""]
        lines[-2] += f" lowest to highest over all shapes{'' if gpu else ' and thread counts'}."
        lines += [f"| op | dtype |{' mode |' * gpu} times faster than |", f"|---|---|{'---|' * gpu}---|"]
        found: dict[tuple[str, ...], dict[str, list[float]]] = {}
        for row in (row for rows in measured for row in rows if row["ratio"]):
            key = row["op"], row["dtype"], *((row["mode"],) if gpu else ())
            found.setdefault(key, {}).setdefault(row["rival"], []).append(float(row["ratio"]))
        for key, ratios in found.items():
            told = " · ".join(f"{rival} **{_range(some)}**" for rival, some in ratios.items())
            lines.append(f"| {' | '.join(key)} | {told} |")
        lines.append("")
    if waiting := list(dict.fromkeys(case.op for case in _waiting(results))):
        lines += [f"**GPU**: unmeasured ({', '.join(waiting)}); `make gpu` measures on a machine that has one.", ""]
    return "\n".join(lines).strip()


def gpu_state(results: Path = RESULTS) -> str:
    """For the README: each op at its worst shape on a GPU against the fastest rival there, and what is not measured."""
    lines = []
    for path, measured in _measured(results):
        if not path.stem.startswith("gpu"):
            continue
        found: dict[str, dict[str, float]] = {}
        for rows in (rows for rows in measured if rows[0]["op"] != "step"):  # training steps have other modes
            if ratios := [float(r["ratio"]) for r in rows if r["ratio"] and not r["rival"].startswith("ours, ")]:
                modes = found.setdefault(rows[0]["op"], {})
                mode = rows[0]["mode"]
                modes[mode] = min([*ratios, modes.get(mode, math.inf)])
        card = path.stem.removeprefix("gpu-").replace("-", " ").upper()
        lines += [f"| times as fast as the fastest rival, {card} | in a CUDA graph | in eager calls |", "|---|---|---|"]
        for op, modes in found.items():
            cells = [f"{modes[mode]:.2f}" if mode in modes else "" for mode in ("graph", "eager")]
            lines.append(f"| `{op}` | {' | '.join(cells)} |")
        lines.append("")
        lines += [*_steps(path, card), ""]
    if waiting := list(dict.fromkeys(case.op for case in _waiting(results))):
        lines.append(f"Not measured on a GPU: {', '.join(f'`{op}`' for op in waiting)}.")
    return "\n".join(lines).strip()


def _steps(path: Path, card: str) -> list[str]:
    """Whole training steps: the last measurement of each rival, next to ours of the same run."""
    found = {(row["shape"], row["rival"]): row for row in read(path, needed=NEEDED) if row["op"] == "step"}
    rows = [row for row in found.values() if row["ratio"]]
    if not rows:
        return []
    lines = [f"| a whole training step, {card} | rival, ms | ours, ms | times as fast |", "|---|---|---|---|"]
    for row in rows:
        figures = f"{float(row['rival_ms']):.0f} | {float(row['ours_ms']):.0f} | {float(row['ratio']):.2f}"
        lines.append(f"| {row['shape']}, against {row['rival']} | {figures} |")
    return lines


def _range(ratios: list[float]) -> str:
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low}–{high}"


def _waiting(results: Path) -> list[Case]:
    """The headline cases that were not measured on a GPU."""
    rows = itertools.chain.from_iterable(r for path in results.glob("gpu*.csv") for r in current(path))
    measured = {(row["op"], row["shape"], row["dtype"]) for row in rows if row["ratio"]}
    return [c for c in cases("cuda") if c.headline and (c.op, c.shape, c.dtype) not in measured]


def _measured(results: Path) -> Iterator[tuple[Path, list[list[Row]]]]:
    for path in sorted(results.glob("*.csv")):
        if measured := current(path):
            yield path, measured


def table(results: Path = RESULTS) -> str:
    """For each device the last measurement of every case, and the headline cases that were not measured on a GPU."""
    lines = []
    for path, measured in _measured(results):
        gpu = path.stem.startswith("gpu")
        lines += [f"## {path.stem}", ""]
        lines += [f"{_versions(measured)}: times faster than each rival, both sides in one run.", ""]
        if results == RESULTS:
            lines += [f"![Times faster than each rival, {path.stem}](images/benchmarks-{path.stem}.png)", ""]
        columns = ["op", "shape", "dtype", "mode" if gpu else "threads", "times faster than"]
        columns += ["% of ceiling"] if gpu else []  # on a shared CPU the peaks change from minute to minute
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(_cells(rows, columns))} |" for rows in measured]
        lines += [*_where(path, gpu), ""]
    if waiting := _waiting(results):
        lines += ["## GPU: unmeasured", "", "`make gpu` on a machine that has one.", ""]
        lines += ["| op | shape | dtype | times faster than |", "|---|---|---|---|"]
        lines += [f"| {c.op} | {c.shape} | {c.dtype} | {' · '.join(c.rivals)}: unmeasured |" for c in waiting]
    return "\n".join(lines).strip()


def page() -> str:
    """docs/benchmarks.md."""
    head = "# Benchmarks\n\nWritten by `python -m benchmarks.report` from the files in"
    short = f"## In short\n\n{summary()}"
    return f"{head} [benchmarks/results](../benchmarks/results).\n\n{short}\n\n{table()}\n"


def _where(path: Path, gpu: bool) -> list[str]:
    """Where the milliseconds of training steps go; for a shared CPU in percent."""
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
    """Our peak memory next to the rival's, if measured."""
    if not row["rival_peak_gb"]:
        return ""
    ours, rival = (f"{float(row[f'{side}_peak_gb']):.3g}" for side in ("ours", "rival"))
    return f" ({ours} of {rival} GB)"


def plots(results: Path, into: Path) -> Iterator[Path]:
    """One plot per device: ``benchmarks-<device>.png``.

    Raises:
        ImportError: matplotlib is missing.
    """
    for path in sorted(results.glob("*.csv")):
        if measured := [rows for rows in current(path) if any(row["ratio"] for row in rows)]:
            target = into / f"benchmarks-{path.stem}.png"
            plot(path.stem, measured, target)
            yield target


def filled(readme: str, name: str, text: str) -> str:
    """The README with ``text`` between the marks with this name."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", readme, flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("--results", type=located, default=RESULTS, help="folder of the CSVs (benchmarks/results)")
    results = parser.parse_args(arguments).results
    if not results.is_dir():
        parser.error(f"--results: expected a folder of CSV files, got {results}")
    try:
        _write(results)
    except InputError as error:
        parser.error(str(error))
    return 0


def _write(results: Path) -> None:
    own = results.resolve() == RESULTS.resolve()
    try:
        for path in plots(results, IMAGES if own else results):
            print(path)
    except ImportError:
        print("no plots: matplotlib is not installed", file=sys.stderr)
    if own:
        readme = ROOT / "README.md"
        readme.write_text(filled(readme.read_text(encoding="utf-8"), "benchmarks", gpu_state()), encoding="utf-8")
        FULL.write_text(page(), encoding="utf-8")
    else:
        print(table(results))


if __name__ == "__main__":
    sys.exit(main())
