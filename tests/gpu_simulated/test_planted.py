# SPDX-License-Identifier: Apache-2.0
"""Bugs in small kernels: the interpreter reports each one, and nothing if it is removed."""

from __future__ import annotations

import pytest
import torch

from tests.gpu_simulated import block, memory
from tests.gpu_simulated.driver import missing
from tests.gpu_simulated.launch import run, storages
from tests.gpu_simulated.memory import Fault, Report
from tests.gpu_simulated.ptx import parse

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
THREADS = 128
#: Each thread writes its number times two to shared memory; the thread 32 (mod 128) further on stores it.
PASSED_ON = """
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    shl.b32 %r3, %r1, 1;
    st.shared.b32 [%r2], %r3;
    bar.sync 0;
    add.s32 %r4, %r1, 32;
    and.b32 %r4, %r4, 127;
    shl.b32 %r4, %r4, 2;
    ld.shared.b32 %r5, [%r4];
    ld.param.u64 %rd1, [out];
    mad.wide.u32 %rd2, %r1, 4, %rd1;
    st.global.b32 [%rd2], %r5;
"""
#: Thread 0 gets its word of global memory with cp.async.
COPIED = """
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    ld.param.u64 %rd1, [out];
    mad.wide.u32 %rd2, %r1, 4, %rd1;
    cp.async.ca.shared.global [%r2], [%rd2], 4, 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.b32 %r5, [%r2];
    add.s32 %r5, %r5, 1;
    st.global.b32 [%rd2], %r5;
"""
#: Ones times ones: A with 64 rows and B with 8 columns of 16 bf16 each, in shared memory without a swizzle.
MULTIPLIED = """
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 4;
    mov.u32 %r3, 0x3F803F80;
    st.shared.v4.b32 [%r2], {%r3, %r3, %r3, %r3};
    shl.b32 %r2, %r1, 1;
    st.shared.b16 [%r2+2048], %r3;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.u64 %rd3, 0x0000001000080000;
    mov.u64 %rd4, 0x0000001000080080;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %rd3, %rd4, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    ld.param.u64 %rd1, [out];
    mad.wide.u32 %rd2, %r1, 4, %rd1;
    st.global.f32 [%rd2], %f1;
    bar.sync 0;
    st.shared.b16 [%r2+2048], %r3;
"""
BODIES = {"passed on": PASSED_ON, "copied": COPIED, "multiplied": MULTIPLIED}
EXPECTED = {
    "passed on": 2 * torch.arange(32, 160).remainder(THREADS),
    "copied": torch.ones(THREADS),
    "multiplied": torch.full((THREADS,), 16.0),
}
#: Kernel, the removed text, its replacement, and what is then detected.
BUGS = {
    "a barrier before a read": ("passed on", "bar.sync 0;", "", memory.READ_AFTER_WRITE),
    "a barrier before a write": (
        "passed on", "ld.param.u64 %rd1, [out];", "ld.param.u64 %rd1, [out]; st.shared.b32 [%r2], %r5;",
        memory.WRITE_AFTER_READ,
    ),
    "two warps write a word": (
        "passed on", "bar.sync 0;", "xor.b32 %r6, %r2, 128; st.shared.b32 [%r6], %r3; bar.sync 0;",
        memory.WRITE_AFTER_WRITE,
    ),
    "unequal values in one word": ("passed on", "shl.b32 %r2, %r1, 2;", "mov.u32 %r2, 0;", memory.UNEQUAL),
    "shared memory that is not written": (
        "passed on", "ld.shared.b32 %r5, [%r4];", "ld.shared.b32 %r5, [%r4+1024];", memory.UNWRITTEN
    ),
    "a read past the end": ("copied", "[%rd2], 4, 4;", "[%rd2+4], 4, 4;", memory.OUTSIDE),
    "a write before the beginning": ("passed on", "[%rd2], %r5;", "[%rd2+-4], %r5;", memory.OUTSIDE),
    "a misaligned write": ("passed on", "[%rd2], %r5;", "[%rd2+2], %r5;", memory.MISALIGNED),
    "a misaligned read of shared memory": (
        "passed on", "ld.shared.b32 %r5, [%r4];", "ld.shared.b32 %r5, [%r4+2];", "misaligned access to 4 bytes of sh"
    ),
    "shared memory past its end": (
        "passed on", "ld.shared.b32 %r5, [%r4];", "ld.shared.b32 %r5, [%r4+8192];", "of shared memory at"
    ),
    "unequal values in a word of global memory": (
        "passed on", "mad.wide.u32 %rd2, %r1, 4, %rd1;", "mov.u64 %rd2, %rd1;", memory.UNEQUAL
    ),
    "a register that is not written": ("passed on", "shl.b32 %r3, %r1, 1;", "", "%r3 is read and was never written"),
    "a copy that is not awaited": ("copied", "cp.async.wait_group 0;", "", memory.COPY_UNDER_WAY),
    "a copy that the block leaves behind": ("copied", "cp.async.wait_group 0;", "", memory.NOT_AWAITED),
    "a copy that is waited for too late": (
        "copied", "cp.async.wait_group 0;", "cp.async.wait_group 1;", memory.COPY_UNDER_WAY
    ),
    "a fence of the proxy": ("multiplied", "fence.proxy.async.shared::cta;", "", memory.NO_FENCE),
    "a barrier before a wgmma": ("multiplied", "bar.sync 0;\n    mov.u64 %rd3", "mov.u64 %rd3", memory.NO_BARRIER),
    "a wgmma that is not awaited": (
        "multiplied", "wgmma.wait_group.sync.aligned 0;", "", block.ACCUMULATOR_READ
    ),
    "a wgmma that is waited for too late": (
        "multiplied", "wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;", block.ACCUMULATOR_READ
    ),
    "an accumulator that is written": (
        "multiplied", "wgmma.wait_group.sync", "mov.f32 %f2, 0f00000000; wgmma.wait_group.sync",
        block.ACCUMULATOR_WRITTEN,
    ),
    "a fence of registers": (
        "multiplied", "wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned; mov.f32 %f2, 0f00000000;",
        block.NOT_FENCED,
    ),
    "shared memory of a wgmma": (
        "multiplied", "wgmma.wait_group.sync", "st.shared.b16 [%r2+2048], %r3; wgmma.wait_group.sync",
        memory.READ_BY_WGMMA,
    ),
    "shared memory of another warp's wgmma": (
        "multiplied", "bar.sync 0;\n    st.shared", "st.shared", memory.WRITE_AFTER_READ
    ),
    "a register operand that is written": (
        "multiplied",
        "%rd3, %rd4, 0, 1, 1, 0, 0;",
        "{%r3, %r3, %r3, %r3}, %rd4, 0, 1, 1, 0; mov.b32 %r3, 0;",
        block.OPERAND_WRITTEN,
    ),
}  # fmt: skip


def launched(body: str, out: torch.Tensor, blocks: int = 1) -> Report:
    registers = ".reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<9>; .reg .pred %p<9>;"
    kernel = parse(f".visible .entry kernel(.param .u64 .ptr .global .align 16 out)\n{{\n{registers}\n{body}\nret;\n}}")
    report, places = Report(), [(out.data_ptr(), out.data_ptr() + out.nbytes)]
    address = out.data_ptr().to_bytes(8, "little")
    run(kernel, [address], places, report, (blocks, 1, 1), THREADS, 4096)
    return report


def output(name: str) -> torch.Tensor:
    return torch.zeros(THREADS, dtype=torch.float32 if name == "multiplied" else torch.int32)


@pytest.mark.parametrize("name", BODIES)
def test_what_is_right_is_computed_and_not_reported(name: str) -> None:
    out = output(name)
    assert not launched(BODIES[name], out)
    assert torch.equal(out, EXPECTED[name].to(out.dtype))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_reported(bug: str) -> None:
    name, right, wrong, found = BUGS[bug]
    assert BODIES[name].count(right) == 1
    try:
        report = launched(BODIES[name].replace(right, wrong), output(name))
    except Fault as fault:
        assert found in str(fault)
    else:
        assert found in {what for what, _ in report}, report


def test_blocks_that_touch_one_byte() -> None:
    with pytest.raises(Fault, match=memory.BETWEEN_BLOCKS):
        launched(PASSED_ON, output("passed on"), blocks=2)


def test_threads_that_part_and_meet_again() -> None:
    """Odd threads take another path; a barrier there is an error."""
    body = """
        mov.u32 %r1, %tid.x;
        and.b32 %r2, %r1, 1;
        setp.ne.b32 %p1, %r2, 0;
        mov.b32 %r3, 5;
        @%p1 bra $odd;
        mov.b32 %r3, 7;
    $odd:
        ld.param.u64 %rd1, [out];
        mad.wide.u32 %rd2, %r1, 4, %rd1;
        st.global.b32 [%rd2], %r3;
    """
    out = output("passed on")
    assert not launched(body, out)
    assert out.tolist() == [7, 5] * (THREADS // 2)
    with pytest.raises(Fault, match="threads have parted"):
        launched(body.replace("mov.b32 %r3, 7;", "bar.sync 0;"), out)


def test_an_instruction_that_is_not_covered_is_an_error() -> None:
    with pytest.raises(Fault, match="not covered: popc"):
        launched("mov.u32 %r1, %tid.x; popc.b32 %r2, %r1;", output("passed on"))


def test_tensors_of_other_layouts_are_passed_over() -> None:
    """Those of other tests in the same process: they have no storage that a launch could be given."""
    others = [torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr()]
    own = torch.ones(3)
    places = storages()
    assert (own.data_ptr(), own.data_ptr() + own.nbytes) in places and len(others) == 2
