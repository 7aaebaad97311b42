"""oneDNN's AMX code, on any processor with AVX-512: the emulator against torch, and the faults that we route around."""

import re

import pytest
import torch

from fused_resnet.machine import onednn
from tests.support import amx

REASON = amx.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
needs_emulation = pytest.mark.skipif("amx_bf16" in amx.flags(), reason="this processor has AMX of its own")

# c += a @ b by one instruction, in tiles of `rows` and `columns` of c; `depth` counts groups of four bytes
PRODUCTS = """
import ctypes, os, sys, tempfile, torch
from tests.support import amx
try:
    with tempfile.TemporaryDirectory() as folder:
        check = amx.build(amx.HERE / "amx_instructions.c", folder, "-mamx-tile", "-mamx-bf16", "-mamx-int8")
except amx.CannotTell as reason:  # an older gcc
    print(reason, file=sys.stderr)
    sys.exit(77)

def config(rows, columns, depth):
    made = bytearray(64)
    made[0] = 1
    for tile, (height, width) in enumerate([(rows, 4 * columns), (rows, 4 * depth), (depth, 4 * columns)]):
        made[16 + 2 * tile], made[48 + tile] = width, height
    return bytes(made)

def dot(name, shape, c, a, b):
    packed = b.reshape(shape[2], 4 // b.element_size(), shape[1]).transpose(1, 2).reshape(shape[2], -1)
    operands, buffers = [], []
    for matrix in (c, a, packed):  # in wider buffers: the strides matter, and what lies beside must stay
        wide = torch.full((matrix.shape[0], matrix.shape[1] + 24), 77, dtype=matrix.dtype)
        wide[:, : matrix.shape[1]] = matrix
        buffers.append(wide)
        operands += [ctypes.c_void_p(wide.data_ptr()), ctypes.c_long(wide.stride(0) * wide.element_size())]
    getattr(check, name)(config(*shape), *operands)
    assert (buffers[0][:, c.shape[1] :] == 77).all()
    return buffers[0][:, : c.shape[1]]

torch.manual_seed(0)
"""

INSTRUCTIONS = """
integers = {"s": (torch.int8, -128, 128), "u": (torch.uint8, 0, 256)}
for shape in [(16, 16, 16), (1, 1, 1), (5, 7, 3), (16, 3, 16), (2, 16, 9)]:
    rows, columns, depth = shape
    for kind_a, kind_b in ["ss", "su", "us", "uu"]:  # exact, and sums wrap
        (type_a, *range_a), (type_b, *range_b) = integers[kind_a], integers[kind_b]
        a = torch.randint(*range_a, (rows, 4 * depth)).to(type_a)
        b = torch.randint(*range_b, (4 * depth, columns)).to(type_b)
        c = torch.randint(-(2**31), 2**31, (rows, columns)).to(torch.int32)
        expected = (c.long() + a.long() @ b.long()).to(torch.int32)
        assert torch.equal(dot(f"dpb{kind_a}{kind_b}d", shape, c, a, b), expected), (kind_a, kind_b, shape)
    a, b = torch.randn(rows, 2 * depth).bfloat16(), torch.randn(2 * depth, columns).bfloat16()
    c = torch.randn(rows, columns)
    expected, size = c + a.double() @ b.double(), c.abs() + a.double().abs() @ b.double().abs()
    assert ((dot("dpbf16ps", shape, c, a, b) - expected).abs() <= (depth + 2) * 2**-24 * size).all(), shape

# the manual's order: even products 2**24 + 1 = 2**24, odd ones -2**24 + 1 exactly; in turn they would give 2
a = torch.tensor([[2.0**24, -(2.0**24), 1.0, 1.0]]).bfloat16()
assert dot("dpbf16ps", (1, 1, 2), torch.zeros(1, 1), a, torch.ones(4, 1).bfloat16()).item() == 1
# denormals are zero
a = torch.tensor([[2.0**-130, 0.0]]).bfloat16()
assert dot("dpbf16ps", (1, 1, 1), torch.zeros(1, 1), a, torch.full((2, 1), 2.0**100).bfloat16()).item() == 0

c, kept, released = torch.ones(5, 7), (ctypes.c_uint8 * 64)(), (ctypes.c_uint8 * 64)()
check.configurations(config(5, 7, 3), ctypes.c_void_p(c.data_ptr()), ctypes.c_long(28), kept, released)
assert (c == 0).all() and bytes(kept) == config(5, 7, 3) and bytes(released) == bytes(64)
"""

REFUSED = """
operands = [ctypes.create_string_buffer(4096), ctypes.c_long(64)] * 3
good = config(5, 7, 3)
for bad in (bytes(64), bytes([2]) + good[1:], good[:1] + bytes([0, 1]) + good[3:], good[:49] + bytes([4]) + good[50:]):
    child = os.fork()
    if child == 0:
        check.dpbf16ps(bad, *operands)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), bad
"""


@needs_emulation
def test_the_instructions_do_what_the_manual_says():
    done = amx.run(PRODUCTS + INSTRUCTIONS)
    assert done.returncode == 0, done.stderr


@needs_emulation
def test_what_the_manual_refuses_ends_the_process():
    done = amx.run(PRODUCTS + REFUSED)
    assert done.returncode == 0, done.stderr
    refusals = re.findall(r"^amx: (.*);", done.stderr, re.MULTILINE)
    assert [reason.split("#")[1][:2] for reason in refusals] == ["UD", "GP", "GP", "UD"], done.stderr


# problems: the arguments of F.conv2d, in bf16; prints how many elements miss the bound
CONVOLUTIONS = """
import torch, torch.nn.functional as F
torch.manual_seed(0)
for x, weight, stride, padding in {problems}:
    x, weight = torch.randn(x).bfloat16(), torch.randn(weight).bfloat16()
    how = dict(stride=stride, padding=padding)
    y, expected = F.conv2d(x, weight, **how), F.conv2d(x.double(), weight.double(), **how)
    bound = 2**-8 * expected.abs() + 2**-16 * F.conv2d(x.double().abs(), weight.double().abs(), **how)
    print("wrong:", int((~((y - expected).abs() <= bound)).sum()), flush=True)
"""


def convolve(*problems):
    """The process, how many elements of each convolution are wrong, and oneDNN's names for who computed them."""
    done = amx.run(CONVOLUTIONS.format(problems=problems), ONEDNN_VERBOSE="1")
    who = re.findall(r"exec,cpu,convolution,([^,]*),.*src:bf16", done.stdout)
    return done, [int(count) for count in re.findall(r"wrong: (\d+)", done.stdout)], who


def test_onednn_computes_ordinary_convolutions_right_with_amx():
    done, wrong, who = convolve(
        ((1, 64, 14, 14), (64, 64, 3, 3), (1, 1), (1, 1)),
        ((2, 64, 12, 12), (64, 64, 1, 1), (1, 1), (0, 0)),
        ((1, 3, 32, 32), (64, 3, 7, 7), (2, 2), (3, 3)),
    )
    assert done.returncode == 0, done.stderr
    assert wrong == [0, 0, 0]
    assert len(who) == 3 and all("avx10_1_512_amx" in one for one in who), who


@pytest.mark.parametrize(
    "problem",
    [
        ((2, 64, 18, 2), (24, 64, 3, 3), (1, 2), (1, 1)),  # pytorch 169688
        ((1, 16, 25, 20), (8, 16, 4, 4), (4, 4), (0, 0)),
        ((3, 8, 12, 25), (16, 8, 3, 8), (2, 8), (0, 0)),
        ((1, 16, 24, 300), (16, 16, 1, 3), (4, 1), (0, 1)),  # oneDNN 5494: writes beyond its buffer, and may crash
    ],
    ids=["one column", "patches", "an even filter of few channels", "a stride beyond the filter"],
)
def test_the_faults_of_onednn_are_still_there(problem):
    """Where this fails, this oneDNN computes the problem right, and the detour around that fault can go."""
    done, wrong, who = convolve(problem)
    is_right = done.returncode == 0 and wrong == [0]
    if is_right and onednn.version() != "oneDNN v3.12.0":
        pytest.skip(f"{onednn.version()} is right")
    assert not is_right, f"torch {torch.__version__} is right: {who}"


# pytest's arguments; the process with AMX is its own, as the tests' one is not
TESTS = """
import sys, pytest
sys.exit(pytest.main(["-q", "-p", "no:faulthandler", "-p", "no:cacheprovider", *{arguments}]))
"""


_ROOMS = [
    *(
        f"tests/freezing/test_{name}.py"
        for name in "values plan memory refusals state copies frozen lowering forwards parts biases respelling".split()
    ),
    "tests/freezing/test_dtypes.py::test_norms_without_statistics_in_bf16",
    *("tests/fusing", "tests/nn", "tests/explaining", "tests/cli/test_explain.py"),
    *(f"tests/interop/test_{name}.py" for name in "compile copies export training".split()),
    *("tests/backends/test_winograd.py", "tests/backends/test_grouped.py", "tests/backends/test_direct.py"),
    "tests/operators/test_functional.py",
]
# AVX-512's instructions for fp16 are not emulated, and forks are of a process that emulates nothing
_EMULATED = "not fp16 and not float16 and not half and not mixed_dtypes and not fork"


@needs_emulation
@pytest.mark.parametrize(
    "arguments",
    [
        ["tests/operators/test_detours.py"],
        pytest.param([*_ROOMS, "-m", "not full", "-k", _EMULATED], marks=pytest.mark.full),
    ],
    ids=["faults", "all that computes"],
)
def test_our_tests_pass_with_amx(arguments):
    """Those of what is chosen and computed by the processor's instructions; elsewhere they ran without AMX."""
    done = amx.run(TESTS.format(arguments=arguments))
    assert done.returncode == 0 and re.search(r"\d+ passed", done.stdout), done.stdout[-3000:] + done.stderr[-1000:]


STRIDED = """
from fused_resnet import testing
from fused_resnet.machine import onednn
assert onednn.has_amx()
report = testing.verify(range({problems}), seed=9, backends=["eager", "onednn"], kind="strided")
assert report.passed and all(entry.ok > {problems} / 3 for entry in report.backends.values()), report
"""


@pytest.mark.full
def test_strided_problems_are_right_with_amx():
    done = amx.run(STRIDED.format(problems=300))
    assert done.returncode == 0, done.stdout + done.stderr
