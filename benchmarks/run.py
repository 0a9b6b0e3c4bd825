# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.run``: check each op, time it against its rivals in one interleaved run, print the rows and
append them to results/<device>.csv."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import NoReturn

import torch

from benchmarks import base, files, machine
from benchmarks.measure import FAILED, WRONG, Row, Settings, measure, once, unmeasured
from benchmarks.registry import DTYPES, Case, cases, ops
from fastdistill.files import located

NO_GPU = "no CUDA device"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m benchmarks.run", description=__doc__, allow_abbrev=False)
    p.add_argument("--op", nargs="+", choices=ops(), default=ops(), metavar="OP", help=f"of {', '.join(ops())}")
    p.add_argument("--rival", nargs="+", help="these rivals alone, by the names in the table")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), help="default: fp32 on a CPU, bf16 on a GPU where an op has it"
    )
    p.add_argument("--shape", default="", help="shapes that contain this")
    p.add_argument(
        "--headline", action=argparse.BooleanOptionalAction, help="the shapes of the first part on a GPU, or the others"
    )
    p.add_argument("--threads", type=int, default=1, help="CPU threads, the rivals' too (%(default)s)")
    p.add_argument("--rounds", type=int, help="counted at least, 41 on a CPU, 100 on a GPU; short ones fill --seconds")
    p.add_argument("--seconds", type=float, default=2.0, help="of counted rounds at least (%(default)s)")
    p.add_argument("--minutes", type=float, default=float("inf"), help="after these no further case is begun")
    p.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="torch.compile at every shape, or at none (default: on a CPU at an op's smallest)",
    )
    p.add_argument("--base", metavar="COMMIT", help="time this tree against a commit instead of against rivals")
    p.add_argument(
        "--once", action="store_true", help="check, then run ours once between cudaProfilerStart and Stop: for ncu"
    )
    p.add_argument("--csv", help='file to append to (default: benchmarks/results/<device>.csv; "none" for no file)')
    p.add_argument("--out", type=located, metavar="FOLDER", help="append to <device>.csv in this folder, too")
    p.add_argument("--json", metavar="FILE", help='write the rows as JSON ("-": print them instead of the table)')
    return p


def main(arguments: list[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(arguments)
    if options.threads < 1 or (options.rounds or 4) < 4 or not 0 <= options.seconds <= 3600:
        p.error("--threads takes 1 or more, --rounds 4 or more, --seconds 0 to 3600")
    base_commit = machine.commit(options.base) if options.base else ""
    if options.base and not base_commit:
        p.error(f"--base: git knows no commit {options.base!r}")
    if base_commit and options.rival:
        p.error(f"--base: expected no --rival, as it times a commit alone, got {', '.join(options.rival)}")
    gpu = options.device == "cuda"
    torch.set_num_threads(options.threads)
    settings = Settings(
        torch.device(options.device),
        threads=options.threads,
        rounds=options.rounds or (100 if gpu else 41),
        warm_up=25 if gpu else 5,
        seconds=options.seconds,
        rivals=options.rival,
        compiled=options.compiled,
    )
    chosen = _chosen(p, options)
    there = not gpu or torch.cuda.is_available()
    torch.backends.cudnn.benchmark |= gpu and there  # for ours and for the rivals
    if options.once and there:
        for case in chosen:
            once(case, settings)
        return 0
    folders = [files.RESULTS] if options.csv is None else []
    folders += [options.out] if options.out else []
    csvs = [folder / f"{machine.slug(settings.device)}.csv" for folder in folders if there]
    csvs += [located(options.csv)] if options.csv not in (None, "none") and there else []
    rows = []
    for some in _measured(chosen, settings, base_commit, options.minutes):
        rows += some
        for row in some:
            its = row["note"] or f"{row['ratio']} ({row['ours_ms']} ms, {row['rival_ms']} ms)"
            print(f"  {row['mode'] or 'eager'}, {row['rival']}: {its}", file=sys.stderr, flush=True)
        for csv in csvs:
            files.append(csv, some)
            files.append_parts(csv, some)
        if options.json not in (None, "-"):
            located(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if options.json == "-":
        print(json.dumps(rows, indent=2))
    else:
        name = machine.device_name(settings.device) if there else NO_GPU
        print(_table(rows, f"{name}: times faster than the rival"))
    return 1 if any(str(row["note"]).startswith((WRONG, FAILED)) for row in rows) else 0


def _chosen(p: argparse.ArgumentParser, options: argparse.Namespace) -> list[Case]:
    """The requested cases; an error if an argument leaves none."""

    def wrong(argument: str, rule: str, known: Iterable[str], got: Iterable[str]) -> NoReturn:
        p.error(f"--{argument}: expected {rule} {', '.join(map(repr, known))}, got {', '.join(map(repr, got))}")

    dtypes = options.dtype or (["bf16"] if options.device == "cuda" else ["fp32"])
    of_ops = list(cases(options.device, options.op))
    others = set() if options.dtype else {c.op for c in of_ops} - {c.op for c in of_ops if c.dtype in dtypes}
    chosen = [c for c in of_ops if c.dtype in dtypes or c.op in others]
    if not chosen:
        wrong("dtype", "one of", dict.fromkeys(c.dtype for c in of_ops), dtypes)
    shapes = dict.fromkeys(c.shape for c in chosen)
    chosen = [c for c in chosen if options.shape in c.shape]
    if not chosen:
        wrong("shape", "a part of one of", shapes, [options.shape])
    if options.headline is not None:
        chosen = [c for c in chosen if c.headline == options.headline]
        if not chosen:
            p.error(f"--{'no-' * (not options.headline)}headline: none of what is chosen is among these")
    known = dict.fromkeys(name for case in chosen for name in case.rivals)
    if unknown := [name for name in options.rival or () if name not in known]:
        wrong("rival", "one of", known, unknown)
    return chosen


def _measured(chosen: list[Case], settings: Settings, base_commit: str, minutes: float) -> Iterator[list[Row]]:
    """Yields the rows as they are measured, so that they are saved whatever happens later."""
    start = time.perf_counter()
    if settings.device.type == "cuda" and not torch.cuda.is_available():
        yield from (unmeasured(case, settings, NO_GPU) for case in chosen)
        return
    against = base.Base(base_commit, settings) if base_commit else None
    with against or contextlib.nullcontext():
        for i, case in enumerate(chosen, 1):
            if time.perf_counter() - start > 60 * minutes:
                yield unmeasured(case, settings, f"not begun within {minutes:g} minutes")
                continue
            print(f"[{i}/{len(chosen)}] {case}", file=sys.stderr, flush=True)
            if against:
                yield against.measure(case)
            else:
                yield from ([row] for row in measure(case, settings))


def _table(rows: list[Row], title: str) -> str:
    columns = {"op": "op", "shape": "shape", "dtype": "dtype", "mode": "mode", "rival": "rival", "ratio": "ratio"}
    columns |= {"ours_img_s": "img/s", "rival_img_s": "rival's", "ours_peak_gb": "GB", "rival_peak_gb": "rival's GB"}
    columns |= {"ours_gb_s": "GB/s", "ours_tflop_s": "TFLOP/s", "percent": "% of ceiling", "note": "note"}
    used = {key: heading for key, heading in columns.items() if any(row[key] != "" for row in rows)}
    cells = [list(used.values()), *([str(row[key]) for key in used] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; what was measured is kept")
