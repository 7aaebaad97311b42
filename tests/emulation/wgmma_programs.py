"""PTX programs of one warpgroup around wgmma, and their operands in shared memory."""

import torch

from fused_resnet.emulation import Kernel
from tests.emulation import cute
from tests.support.ptx import kernel_text

PARAMETERS = ".param .u64 image, .param .u64 fragments, .param .u64 out"
PATTERN = 1024  # bytes: the largest swizzle pattern's size, to which the operands are aligned
MADE_READY = "fence.proxy.async.shared::cta; bar.sync 0;"


def names(prefix, first, count):
    return "{" + ", ".join(f"%{prefix}{first + j}" for j in range(count)) + "}"


def program(
    body, image_bytes, sums=4, *, made_ready=MADE_READY, after="wgmma.wait_group.sync.aligned 0;", a_registers=4
):
    """The body between shared memory filled and D stored.

    It finds the image at %d10 (>> 4, for descriptors), this thread's A in %r0-3, its thread in %r250, D (zero) in %f0-.
    """
    loads = "\n".join(f"ld.global.b32 %r{j}, [%d1+{4 * j}];" for j in range(a_registers))
    zeros = "\n".join(f"mov.b32 %f{j}, 0f00000000;" for j in range(sums))
    stores = "\n".join(f"st.global.b32 [%d2+{4 * j}], %f{j};" for j in range(sums))
    return kernel_text(
        f"""
        ld.param.u64 %d0, [image];
        ld.param.u64 %d1, [fragments];
        ld.param.u64 %d2, [out];
        mov.u32 %r250, %tid.x;
        mad.wide.u32 %d1, %r250, 16, %d1;
        mad.wide.u32 %d2, %r250, {4 * sums}, %d2;
        {loads}
        mov.u32 %r251, sm;
        cvt.u64.u32 %d10, %r251;
        shr.u64 %d10, %d10, 4;
        mul.lo.u32 %r252, %r250, 16;
        FILL:
        setp.ge.u32 %p0, %r252, {image_bytes};
        @%p0 bra FILLED;
        cvt.u64.u32 %d3, %r252;
        add.s64 %d3, %d3, %d0;
        ld.global.v4.b32 {names("r", 240, 4)}, [%d3];
        add.u32 %r253, %r252, %r251;
        st.shared.v4.b32 [%r253], {names("r", 240, 4)};
        add.u32 %r252, %r252, 2048;
        bra FILL;
        FILLED:
        {made_ready}
        {zeros}
        {body}
        {after}
        {stores}
        ret;""",
        parameters=PARAMETERS,
        shared=f".shared .align {PATTERN} .b8 sm[{image_bytes}];",
    )


def descriptor(register, bits, offset=0):
    return f"add.s64 {register}, %d10, {offset >> 4}; or.b64 {register}, {register}, {bits:#x};"


def run(text, image, fragments=None, sums=4, threads=128, **options):
    """D's registers (thread, register), and the outcome."""
    fragments = torch.zeros(128, 4, dtype=torch.int32) if fragments is None else fragments
    out = torch.zeros(128, sums, dtype=torch.int32)
    outcome = Kernel(text).run(1, threads, [image, fragments, out], writable=[out], **options)
    return out, outcome


def kinds(outcome):
    return {report[1 : report.index("]")] for report in outcome.reports}


def padded(size):
    return -(-size // PATTERN) * PATTERN


def place(layout, rows):
    """The bytes that a matrix of this layout takes, in whole patterns."""
    return padded(int(layout.addresses(rows).max()) + 16)


def layout_for(swizzle, is_mn_major, element_bytes, rows):
    """A canonical layout whose blocks lie apart by more than they must, so that the offsets matter."""
    span = cute.SPANS[swizzle]
    if is_mn_major and swizzle == "none":
        return cute.Canonical(swizzle, True, element_bytes, leading=128 * (rows // 8) + 256, stride=128)
    if is_mn_major:
        groups = -(-rows * element_bytes // span)
        return cute.Canonical(swizzle, True, element_bytes, leading=8 * span, stride=8 * span * (groups + 1))
    if swizzle == "none":
        return cute.Canonical(swizzle, False, element_bytes, leading=128, stride=384)
    return cute.Canonical(swizzle, False, element_bytes, leading=16, stride=16 * span)


class Operands:
    """A (64, k) and B (n, k) in shared memory, and the descriptors of both."""

    def __init__(self, a, b, a_layout, b_layout):
        self.b_at = place(a_layout, len(a))
        self.size = self.b_at + place(b_layout, len(b))
        self.image = torch.cat([a_layout.image(a, self.b_at), b_layout.image(b, self.size - self.b_at)])
        self.descriptors = descriptor("%d20", a_layout.descriptor()) + descriptor(
            "%d21", b_layout.descriptor(), self.b_at
        )
