"""Sums of tensor cores as GPUs round them: by hand, and bit for bit as the package mmasim 2.1.1 has them.

mmasim: Xie, Wang, Yang, Yang, MMA-Sim: Bit-Accurate Reference Model of Tensor Cores and Matrix Cores, arXiv 2511.10909;
its authors compared it with the hardware. tensor_core_sums.txt has its results for inputs that are drawn here.
"""

from pathlib import Path

import numpy
import pytest
import torch

from tests.emulation.test_mma import DTYPES, run
from tests.emulation.test_wgmma import multiply
from tests.emulation.wgmma_programs import layout_for

TABLE = Path(__file__).with_name("tensor_core_sums.txt")
ROWS = 4  # of D that the table has
GPUS = {80: "Ampere", 89: "Ada Lovelace", 90: "Hopper"}
# bits of the exponent and of the fraction
FORMATS = {"f16": (5, 10), "bf16": (8, 7), "tf32": (8, 23), "f32": (8, 23), "e4m3": (4, 3), "e5m2": (5, 2)}
KINDS = ("near", "wide", "tiny", "huge")  # exponents


def draw(name, shape, kind, source):
    """Numbers of one kind; every eighth is zero. Raw words of PCG64 are the same in every version of numpy."""
    exponent_bits, fraction_bits = FORMATS[name]
    top = 2**exponent_bits - 2  # 2^e - 1 is infinity, but not in e4m3
    middle = top // 2
    span, first = {
        "near": (3, middle - 1),
        "wide": (min(30, top), middle - min(30, top) // 2),
        "tiny": (3, 0),
        "huge": (4, top - 3 if exponent_bits < 8 else middle + 61),
    }[kind]
    words = source.random_raw(int(numpy.prod(shape))).reshape(shape)
    fraction = words % 2**fraction_bits
    exponent = first + (words >> 32) % span
    code = (words >> 63 << (exponent_bits + fraction_bits)) | exponent << fraction_bits | fraction
    code = numpy.where((words >> 50) % 8 == 0, 0, code)
    size = (1 + exponent_bits + fraction_bits) // 8
    values = torch.from_numpy(code.astype(f"u{size}").view(f"i{size}" if size > 1 else "u1"))
    return values.view(DTYPES[name])


def inputs(form, kind):
    shape, d_type, a_type, b_type = form.split(".")[:4]
    k = int(shape.split("k")[1])
    source = numpy.random.PCG64(sum(map(ord, form + kind)))
    return (
        draw(a_type, (16, k), kind, source),
        draw(b_type, (k, 8), kind, source),
        draw(d_type, (16, 8), kind, source),
    )


def table():
    """Rows of (GPU, form, kind) and the first rows of D."""
    rows = (line.split() for line in TABLE.read_text().splitlines())
    return [pytest.param(int(gpu), *rest, id="-".join((gpu, *rest[:2]))) for gpu, *rest in rows]


def codes_of(d):
    """The bits of D's first rows; NaN of fp16 is one NaN."""
    rows = torch.where(d.isnan(), torch.full_like(d, torch.nan), d)[:ROWS] if d.dtype == torch.float16 else d[:ROWS]
    return rows.contiguous().view(torch.uint8).numpy().tobytes().hex()


def emulated(gpu, form, a, b, c):
    if not form.startswith("m64"):
        return run(form, a, b, c, rounding=gpu)[0]
    types, size = form.split(".", 1)[1], a.element_size()
    layouts = layout_for("128B", False, size, 64), layout_for("none", False, size, 8)
    four = (a.view(torch.uint8).repeat(4, 1).view(a.dtype), b.T.contiguous(), c.repeat(4, 1))
    d = multiply(types, *four, *layouts, rounding=gpu)[0]
    assert codes_of(d[48:]) == codes_of(d)
    return d


@pytest.mark.parametrize("gpu, form, kind, codes", table())
def test_sums_are_mmasims(gpu, form, kind, codes):
    assert codes_of(emulated(gpu, form, *inputs(form, kind))) == codes


def test_the_table_is_mmasims():
    reason = "mmasim is not installed (pip install mmasim==2.1.1): its stored results are used alone"
    mmasim = pytest.importorskip("mmasim.nv_ptx", reason=reason)
    for row in table():
        gpu, form, kind, codes = row.values
        model = (mmasim.WGMMA if form.startswith("m64") else mmasim.MMA)(GPUS[gpu], form)
        assert codes_of(model(*inputs(form, kind))) == codes, row.id


def ones(k, products, dtype=torch.float16):
    """A and B whose every dot product has these products; A has a power of two as close to 1 as it can."""
    a, b = torch.zeros(16, k), torch.ones(k, 8)
    for i, product in enumerate(products):
        a[:, i] = 2.0 ** (torch.tensor(product).log2() // 2)
        b[i] = product / a[0, i]
    return a.to(dtype), b.to(dtype)


K8, K16 = "m16n8k8.f32.f16.f16.f32", "m16n8k16.f32.f16.f16.f32"


@pytest.mark.parametrize(
    "form, products, start, sums",
    [
        # sm_80 and sm_89 keep 24 bits behind the largest addend's point, sm_90 keeps 25: eight times 2^-25 is 2^-22
        (K8, [2.0**-25] * 8, 1.0, {80: 1, 89: 1, 90: 1 + 2.0**-22, "fp64": 1 + 2.0**-22}),
        # the sum is cut to 23 bits, not rounded to nearest
        (K8, [2.0**-24, 2.0**-25], 1.0, {80: 1, 89: 1, 90: 1, "fp64": 1 + 2.0**-23}),
        (K8, [2.0**-24] * 2, 1.0, {80: 1 + 2.0**-23, 89: 1 + 2.0**-23, 90: 1 + 2.0**-23, "fp64": 1 + 2.0**-23}),
        # sm_80 sums eight products, cuts, and then eight more: the two halves of an ulp never meet
        (K16, [2.0**-24] + [0] * 7 + [2.0**-24], 1.0, {80: 1, 89: 1, 90: 1 + 2.0**-23, "fp64": 1 + 2.0**-23}),
    ],
)
def test_by_hand(form, products, start, sums):
    a, b = ones(int(form.split("k")[1][:2].strip(".")), [product or 2.0**-60 for product in products])
    for rounding, sum_ in sums.items():
        d, outcome = run(form, a, b, torch.full((16, 8), start), rounding=rounding)
        assert outcome.reports == []
        assert (d == sum_).all(), (rounding, d[0, 0].item())


def test_mma_of_fp8_on_hopper_is_two_of_fp16():
    """sm_90 has no mma of fp8; the machine code (ptxas 13.0, nvdisasm) widens, multiplies k % 4 < 2 and then the rest.

    It adds the accumulator last, to nearest.
    """
    form = "m16n8k32.f32.e4m3.e4m3.f32"
    tiny = 2.0**-9
    for places, sums in (
        ((1, 2), {90: 64, 89: 64, "fp64": 64 + 2.0**-17}),  # each is cut off by itself: the halves do not meet
        ((1, 4), {90: 64 + 2.0**-17, 89: 64, "fp64": 64 + 2.0**-17}),
    ):
        a, b = torch.zeros(16, 32), torch.zeros(32, 8)
        a[:, 0], b[0] = 8, 8
        a[:, places], b[places, :] = tiny, tiny
        for rounding, sum_ in sums.items():
            d, _ = run(form, *(x.to(torch.float8_e4m3fn) for x in (a, b)), torch.zeros(16, 8), rounding=rounding)
            assert (d == sum_).all(), (places, rounding)
    a, b = torch.zeros(16, 32), torch.zeros(32, 8)
    a[:, 0], b[0] = 1.5 * 2.0**-8, 2.0**-8
    a, b = (x.to(torch.float8_e4m3fn) for x in (a, b))
    for rounding, sum_ in {90: 256 + 2.0**-15, 89: 256}.items():  # three quarters of an ulp
        assert (run(form, a, b, torch.full((16, 8), 256.0), rounding=rounding)[0] == sum_).all()


def test_fp8_sums_of_hopper_keep_13_bits():
    """A product of 2^-14 is lost beside 1, and so are the last ten bits of the accumulator."""
    layouts = layout_for("128B", False, 1, 64), layout_for("128B", False, 1, 8)
    start = torch.full((64, 8), 1 + 2.0**-13 + 2.0**-20)
    for exponent, sum_ in ((-7, 1 + 2.0**-13), (-6, 1 + 2.0**-12 + 2.0**-13)):
        a, b = torch.zeros(64, 32), torch.zeros(8, 32)
        a[:, 0], b[:, 0] = 2.0**exponent, 2.0**exponent
        d, _ = multiply("f32.e4m3.e4m3", a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), start, *layouts,
                        rounding=90)  # fmt: skip
        assert (d == sum_).all()
