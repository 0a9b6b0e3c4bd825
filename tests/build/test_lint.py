# SPDX-License-Identifier: Apache-2.0
"""What costs time in a compiled kernel, and that no figure is worse than the committed one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks.kernels import lint, report
from benchmarks.kernels.sass import Instruction, loops, main_loop, parse
from benchmarks.kernels.timing import Multiprocessor

OLDEST = Path(__file__).parents[2] / "build" / "triton-3.6.0"  # make kernels-report
WIDE = set(
    "_adamw_ema_square_sum _adamw_ema_update _cross_attention_forward _cross_attention_backward_rows _feature_match "
    "_geglu_forward _geglu_backward _geglu_backward_summed _group_norm_moments _group_norm_output _group_norm_sums "
    "_group_norm_gradient _layer_norm_forward _layer_norm_backward _noise_gather gather match scale square_sum "
    "update _add_bias _bias_gradient _quantize_rows".split()
)
NARROW = {"layer_norm_modulate_backward affine", "layer_norm_modulate_backward affine residual"}  # 320 for 128 threads
DUMP = """
		Function : _Z4copyPf
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000ff00000000800 */
        /*0010*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64] ;           /* 0x0000000402048981 */
                                                                              /* 0x000ea2000c1e1d00 */
        /*0020*/                   FADD R4, R4, 1 ;                           /* 0x3f80000004047421 */
                                                                              /* 0x004fca0000000000 */
        /*0030*/                   STG.E.128 desc[UR4][R2.64], R4 ;           /* 0x0000000402007986 */
                                                                              /* 0x0011e8000c101d04 */
        /*0040*/               @P0 BRA 0x10 ;                                 /* 0xfffffff000000947 */
                                                                              /* 0x000fea000383ffff */
        /*0050*/                   EXIT ;                                     /* 0x000000000000794d */
                                                                              /* 0x000fea0003800000 */
        /*0060*/                   BRA 0x60;                                  /* 0xfffffffc00fc7947 */
                                                                              /* 0x000fc0000383ffff */
"""


def body(*lines: str, stall: int = 1) -> list[Instruction]:
    return [Instruction(16 * i, line, "", stall, 7, 7, 0) for i, line in enumerate(lines)]


def test_sass_is_read_with_what_the_scheduler_is_told() -> None:
    (code,) = parse(DUMP).values()
    load, add = code[1], code[2]
    assert (load.operation, load.name, load.predicate, load.bytes) == ("LDG.E.128", "LDG", "@!P1", 16)
    assert (load.sets, load.frees, add.waits) == (2, 7, 1 << 2)  # the sum waits for the scoreboard of the load
    assert loops(code) == [(1, 4)]
    assert [i.name for i in main_loop(code)] == ["LDG", "FADD", "STG", "BRA"]
    figures = lint.figures("copy", "copy", "cuda 13.0", code, 128, 1.0)
    assert (figures.wide_loads, figures.narrow_loads, figures.wide_stores, figures.narrow_stores) == (1, 0, 1, 0)
    assert figures.byte_clocks == round(2 * 16 * 128 / lint.BYTES_A_CLOCK)


def test_the_loop_that_loads_most_is_the_main_one() -> None:
    lines = [
        "LDG.E R1, [R2]",
        "NOP",
        "BRA 0x0",
        "LDG.E.128 R4, [R2]",
        "BRA 0x30",
        "IADD3 R2, R2, 1, RZ",
        "BRA 0x50",
        "EXIT",
    ]
    assert [i.operation for i in main_loop(body(*lines))] == ["LDG.E.128", "BRA"]
    assert len(main_loop(body("LDG.E R1, [R2]", "EXIT", "BRA 0x20"))) == 2  # without a loop, the whole kernel
    unrolled = body("LDG.E.128 R4, [R2]", "LDG.E R1, [R2]", "BRA 0x10", "EXIT", "BRA 0x40")
    assert len(main_loop(unrolled)) == 4  # the loop only handles the remainder


@pytest.mark.parametrize(
    ("operation", "count", "warps", "blocks", "expected"),
    [
        ("FFMA R1, R1, R1, R1", 64, 4, 1, 64),  # one warp per partition issues one instruction per clock
        ("FFMA R1, R1, R1, R1", 64, 16, 2, 256),  # four warps of a block share a partition
        ("MUFU.EX2 R1, R1", 32, 8, 4, 32 * 2 * 8),  # 16 lanes per multiprocessor, 4 per partition
        ("SHFL.BFLY PT, R1, R1, 1, 31", 64, 8, 2, 64 * 8),  # one per clock for all partitions
        ("HGMMA.64x128x16.F32.BF16 R8, gdesc[UR4], R8, gsb0", 16, 4, 2, 16 * 64),
    ],
)  # fmt: skip
def test_clocks_of_the_pipe_that_limits(operation: str, count: int, warps: int, blocks: int, expected: int) -> None:
    loop = body(*[operation] * count, "WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert Multiprocessor(loop, warps, blocks).clocks() == pytest.approx(expected, rel=0.1)


def test_clocks_of_a_wait() -> None:
    load = Instruction(0, "LDG.E.128 R4, [R2]", "", 2, 0, 7, 0)
    use = Instruction(16, "FADD R4, R4, R4", "", 4, 7, 7, 1)
    alone, together = (Multiprocessor([load, use], 4, blocks).clocks() for blocks in (1, 8))
    assert alone > 500 and together == pytest.approx(alone / 8, rel=0.1)
    barrier = body("BAR.SYNC.DEFER_BLOCKING 0x0", "NOP")
    assert 20 < Multiprocessor(barrier, 4, 1).clocks() < 40


def test_warps_that_wait_for_each_other_are_an_error() -> None:
    wait = body("HGMMA.64x8x16.F32.BF16 R8, gdesc[UR4], R8, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0")
    with pytest.raises(RuntimeError, match="wait for each other"):
        Multiprocessor(wait, 2, 1).clocks()  # half of a warpgroup


def test_what_became_worse_is_said_with_both_figures() -> None:
    before = lint.Figures("op", "kernel", "triton 3.9.0", 8, 0, 4, 0, 0, 10, 2, 1000, 900)
    assert not lint.worse([before], [before])
    assert not lint.worse([before], [dataclasses.replace(before, clocks=1015, shuffles=8, wide_loads=4)])
    now = dataclasses.replace(before, clocks=1030, narrow_loads=2, barriers=3, local=1)
    assert lint.worse([before], [now]) == [
        "op, kernel (triton 3.9.0): barriers 2 -> 3",
        "op, kernel (triton 3.9.0): clocks 1000 -> 1030 (its bytes take 900)",
        "op, kernel (triton 3.9.0): local 0 -> 1",
        "op, kernel (triton 3.9.0): narrow loads 0 -> 2",
    ]
    assert lint.worse([before], [before, before]) == ["op, kernel, 1 (triton 3.9.0): not yet there"]
    assert lint.worse([before, before], [before]) == ["op, kernel, 1 (triton 3.9.0): no longer there"]
    assert not lint.worse(
        [before], [dataclasses.replace(now, compiler="triton 4.0.0")]
    )  # other compilers have other figures


def test_the_committed_figures() -> None:
    """Nothing is in local memory, and the kernels that move the most bytes use 16-byte accesses."""
    rows = lint.read()
    assert {row.compiler for row in rows} >= {"triton 3.6.0", "triton 3.9.0", "cuda 13.0"}
    assert not [row for row in rows if row.local]
    wide = [row for row in rows if re.split("<", row.kernel)[0] in WIDE and row.op not in NARROW]
    assert {re.split("<", row.kernel)[0] for row in wide} == WIDE
    assert not [row for row in wide if not row.wide_loads]


@pytest.mark.slow
def test_no_figure_is_worse_than_committed() -> None:
    """If it is intended: ``make kernels-report``, and commit the figures."""
    made = report.linted([OLDEST] if OLDEST.is_dir() else [])
    committed = lint.read()
    assert {row.compiler for row in made} & {row.compiler for row in committed}
    assert not lint.worse(committed, made)
