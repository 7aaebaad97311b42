"""Runs of small PTX kernels under every order of warps that the emulator knows, and what they must report."""

from __future__ import annotations

import itertools

import numpy

from fused_resnet.emulation import Kernel
from fused_resnet.emulation.kernel import LANDINGS, SCHEDULES
from tests.support.ptx import kernel_text

# %r0 the thread, %r1 its bytes, %d1 where its word of `out` is, %r2 where its word of `data` is, %r3 where `data` is.
BEGIN = """
mov.u32 %r0, %tid.x;
shl.b32 %r1, %r0, 2;
ld.param.u64 %d0, [out];
cvt.u64.u32 %d1, %r1;
add.u64 %d1, %d0, %d1;
mov.u32 %r3, data;
add.u32 %r2, %r3, %r1;
"""
SHARED = ".shared .align 128 .b8 data[8192];\n.shared .align 8 .b64 full;"
ORDERS = [*itertools.product(SCHEDULES, LANDINGS)]


def run(body, threads=64, grid=1, words=None, shared=SHARED, **options):
    """(out, outcome); out has a word a thread of the grid, at first -1."""
    out = numpy.full(words or threads * grid, -1, numpy.int32)
    kernel = Kernel(kernel_text(BEGIN + body + "\nret;", shared=shared))
    return out, kernel.run(grid, threads, [out], writable=[out], **options)


def assert_clean(body, expected=None, threads=64, **options):
    """No report under any schedule and landing, and the words of out."""
    for number, (schedule, landing) in enumerate(ORDERS):
        out, outcome = run(body, threads, schedule=schedule, landing=landing, seed=number, **options)
        assert not outcome.reports, (schedule, landing, outcome.reports)
        assert not outcome.faulted
        if expected is not None:
            numpy.testing.assert_array_equal(out[: len(expected)], expected)


def assert_reported(body, kind, *words, threads=64, **options):
    """A report of this kind, with all the words in it, under every schedule and landing."""
    for number, (schedule, landing) in enumerate(ORDERS):
        _, outcome = run(body, threads, schedule=schedule, landing=landing, seed=number, **options)
        found = [report for report in outcome.reports if report.startswith(f"[{kind}]")]
        assert any(all(word in report for word in words) for report in found), (schedule, landing, outcome.reports)
