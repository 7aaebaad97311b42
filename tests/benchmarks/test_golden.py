"""Golden dumps: the kernels assemble, the driver's calls are right, and a GPU leaves what the emulator leaves.

Approximate instructions may differ by what the PTX ISA allows them; of everything else each bit counts.
"""

import ctypes
import hashlib
import importlib
import json
import shutil
import subprocess

import numpy
import pytest

from benchmarks.gpu_check.golden import dump, kernels
from benchmarks.gpu_check.golden.driver import Driver, DriverError
from benchmarks.gpu_check.golden.inputs import drawn
from fused_resnet.kernels import sources
from fused_resnet.measuring import Record

BY_NAME = {kernel.name: kernel for kernel in kernels.KERNELS}
DUMPS = sorted((sources.ROOT / "benchmarks" / "results").glob("*/golden.json"))
LANE, COPY = "fma_rn_f32", "tma_im2col_stride2_tap00"


def test_names_are_all_different():
    assert len(BY_NAME) == len(kernels.KERNELS) > 100


@pytest.mark.parametrize("gpu", kernels.TARGETS)
def test_every_kernel_assembles(gpu, tmp_path):
    ptxas = shutil.which("ptxas") or shutil.which("ptxas", path="/usr/local/cuda/bin")
    if ptxas is None:
        pytest.skip("ptxas is not installed")
    file = tmp_path / "golden.ptx"
    file.write_text(kernels.module([kernel for kernel in kernels.KERNELS if kernel.gpu == gpu]))
    command = [ptxas, "-arch", kernels.TARGETS[gpu], str(file), "-o", str(tmp_path / "golden.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    if "is not defined for option 'gpu-name'" in done.stderr or "Unsupported .version" in done.stderr:
        pytest.skip(f"this ptxas is too old: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


def test_inputs_are_the_same_everywhere():
    for kernel in kernels.KERNELS:
        assert len(drawn(kernel.name, kernel.inputs)) == kernel.in_bytes
    every = hashlib.sha256(b"".join(drawn(kind, ((kind, 300),)).tobytes() for kind in
                                    ("bits", "edges", "f16", "bf16", "tf32", "f32", "e4m3", "e5m2")))  # fmt: skip
    assert every.hexdigest()[:16] == "b2db0f18fa434f9f"


# ---------------------------------------------------------------------------------------------------- the driver


class FakeLibrary:
    """libcuda as far as it is asked: memory that exists, and a launch that copies the input's beginning."""

    def __init__(self, **codes):
        self.codes, self.calls, self.memory = codes, [], {}

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, arguments))
            if name not in self.codes and hasattr(type(self), f"do_{name}"):
                getattr(self, f"do_{name}")(*arguments)
            return self.codes.get(name, 0)

        return call

    def named(self, name):
        return [arguments for called, arguments in self.calls if called == name]

    def do_cuDeviceGetAttribute(self, value, which, device):
        value._obj.value = {75: 9, 76: 0}[which.value]

    def do_cuMemAlloc_v2(self, address, size):
        buffer = (ctypes.c_uint8 * size.value)()
        address._obj.value = ctypes.addressof(buffer)
        self.memory[address._obj.value] = buffer

    def do_cuMemcpyHtoD_v2(self, to, source, size):
        ctypes.memmove(to.value, source.value, size.value)

    def do_cuMemcpyDtoH_v2(self, to, source, size):
        ctypes.memmove(to.value, source.value, size.value)

    def do_cuMemFree_v2(self, address):
        del self.memory[address.value]

    def do_cuLaunchKernel(self, *arguments):
        self.parameters = arguments[9]
        given, out = (ctypes.cast(place, ctypes.POINTER(ctypes.c_uint64))[0] for place in arguments[9][:2])
        ctypes.memmove(out, given, min(16, len(self.memory[given])))

    def do_cuGetErrorName(self, code, text):
        text._obj.value = f"CUDA_ERROR_{code.value}".encode()


def test_a_kernel_is_loaded_launched_and_read():
    library, kernel = FakeLibrary(), BY_NAME[LANE]
    given = drawn(kernel.name, kernel.inputs)
    driver = Driver(library)
    assert driver.capability == 90
    out = driver.run(kernel, given)
    assert out == given.tobytes()[:16] + bytes([kernels.POISON]) * (kernel.out_bytes - 16)
    ((_, text),) = library.named("cuModuleLoadData")
    assert text.value.decode() == kernel.text
    assert library.named("cuModuleGetFunction")[0][2].value == LANE.encode()
    (launch,) = library.named("cuLaunchKernel")
    assert [one.value for one in launch[1:8]] == [1, 1, 1, kernel.threads, 1, 1, 0] and len(library.parameters) == 2
    assert not library.memory and library.named("cuModuleUnload")


@pytest.mark.parametrize("name", [COPY, "tma_tile_every_second_row"])
def test_a_tensor_map_is_encoded(name):
    library, kernel = FakeLibrary(), BY_NAME[name]
    wanted = kernel.tensor_map
    Driver(library).run(kernel, drawn(kernel.name, kernel.inputs))
    call = "cuTensorMapEncodeIm2col" if wanted.pixels else "cuTensorMapEncodeTiled"
    (encoded, dtype, rank, address, sizes, strides, *rest) = library.named(call)[0]
    assert ctypes.addressof(encoded._obj) % 64 == 0 and library.parameters[2] == ctypes.addressof(encoded._obj)
    assert (dtype.value, rank.value, tuple(sizes), tuple(strides)) == (6, len(sizes), wanted.sizes, wanted.strides)
    if wanted.pixels:
        lower, upper, channels, pixels, *rest = rest
        assert (tuple(lower), tuple(upper)) == (wanted.lower, wanted.upper)
        assert (channels.value, pixels.value) == (wanted.channels, wanted.pixels)
    else:
        assert tuple(rest.pop(0)) == wanted.box
    steps, interleave, swizzle, promotion, fill = rest
    assert tuple(steps) == wanted.steps
    assert [one.value for one in (interleave, swizzle, promotion, fill)] == [0, {32: 1, 64: 2}[wanted.swizzle], 0, 0]


@pytest.mark.parametrize("call, code, costs", [("cuCtxSynchronize", 700, True), ("cuModuleLoadData", 218, False)])
def test_a_call_that_fails_is_named(call, code, costs):
    driver, kernel = Driver(FakeLibrary(**{call: code})), BY_NAME[LANE]
    with pytest.raises(DriverError, match=f"{call}: CUDA_ERROR_{code}") as raised:
        driver.run(kernel, drawn(kernel.name, kernel.inputs))
    assert raised.value.costs_context is costs


class FakeDriver:
    """Answers by name: bytes, one after the other, or an error."""

    def __init__(self, answers, capability=90):
        self.answers, self.capability, self.asked = answers, capability, []

    def run(self, kernel, given):
        self.asked.append(kernel.name)
        answer = self.answers[kernel.name]
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_dump_goes_on_where_it_stopped(tmp_path):
    file, record = tmp_path / "golden.json", Record("golden", "a GPU", None, {})
    first, second, third, fourth = some = kernels.KERNELS[:4]
    lost = DriverError("cuCtxSynchronize", 700, "CUDA_ERROR_ILLEGAL_ADDRESS")
    answers = {first.name: b"one", second.name: lost, third.name: [b"this", b"that"], fourth.name: b"four"}
    driver = FakeDriver(answers)
    assert not dump.make(some, driver, file, record) and driver.asked == [first.name, first.name, second.name]
    driver = FakeDriver(answers)
    assert dump.make(some, driver, file, record)
    assert driver.asked == [third.name, third.name, fourth.name, fourth.name]
    read = json.loads(file.read_text())
    assert (read["kind"], read["device"], read["capability"]) == ("golden", "a GPU", 90)
    found = [dump.outputs_of(read["answers"], kernel) for kernel in some]
    assert [outputs for outputs, _ in found] == [b"one", None, None, b"four"]
    assert "ILLEGAL_ADDRESS" in found[1][1] and "differs from itself" in found[2][1]
    newer = first._replace(body=first.body + "\n")
    assert "newer than the dump" in dump.outputs_of(read["answers"], newer)[1]
    driver = FakeDriver({newer.name: b"new"})
    assert dump.make([newer], driver, file, record) and len(driver.asked) == 2
    driver = FakeDriver({first.name: b"other GPU"})
    assert dump.make([first], driver, file, record._replace(device="another GPU")) and len(driver.asked) == 2


def test_a_gpu_runs_what_it_knows(tmp_path):
    """wgmma and all that is compiled for sm_90a runs on 90 alone."""
    for capability, runs in ((80, {80}), (89, {80, 89}), (90, {80, 89, 90}), (100, {80, 89})):
        some = [next(kernel for kernel in kernels.KERNELS if kernel.gpu == gpu) for gpu in kernels.TARGETS]
        driver = FakeDriver({kernel.name: b"" for kernel in some}, capability)
        assert dump.make(some, driver, tmp_path / f"{capability}.json", Record("golden", "a GPU", None, {}))
        assert {kernel.gpu for kernel in some if kernel.name in driver.asked} == runs


# ---------------------------------------------------------------------------------------------------- the emulator


@pytest.fixture(scope="module")
def emulation():
    module = pytest.importorskip("fused_resnet.emulation", reason="there is no emulator in this tree")
    if reason := module.why_missing():
        pytest.skip(reason)
    return module


def emulated(emulation, kernel, capability):
    """(what the emulator leaves of a kernel's output, "" or why nothing). Tensor cores round as that GPU's do."""
    given, out = drawn(kernel.name, kernel.inputs), numpy.full(kernel.out_bytes, kernels.POISON, numpy.uint8)
    arguments = [given, out]
    if kernel.tensor_map is not None:
        try:
            arguments.append(tensor_map_of(emulation, kernel.tensor_map, given))
        except ValueError as error:
            return None, f"an open question, which a GPU answers first: {error}"
    rounding = "fp64"
    if kernel.sums:
        known = importlib.import_module("fused_resnet.emulation.kernel").ROUNDINGS
        if capability not in known:
            return None, f"nobody has published how tensor cores of {capability} round"
        rounding = capability
    outcome = emulation.Kernel(kernel.text).run(1, kernel.threads, arguments, writable=[out], rounding=rounding)
    assert outcome.reports == []
    return out.tobytes(), ""


def tensor_map_of(emulation, wanted, given):
    how = {"swizzle": wanted.swizzle, "element_strides": wanted.steps, "dtype": "f16"}
    if not wanted.pixels:
        return emulation.TensorMap(given, wanted.sizes, wanted.strides, wanted.box, **how)
    corners = {name: getattr(wanted, name) for name in ("lower", "upper", "pixels", "channels")}
    return emulation.TensorMap.im2col(given, wanted.sizes, wanted.strides, **corners, **how)


def differences(kernel, left, wanted):
    """The words, as (place, a GPU's, the emulator's), that lie further apart than they may."""
    got, expected = (numpy.frombuffer(one, numpy.uint32) for one in (left, wanted))
    wrong = got != expected
    if kernel.ulps or kernel.relative:
        values, exact = (one.view(numpy.float32).astype(numpy.float64) for one in (got, expected))
        ulp = numpy.spacing(numpy.abs(exact).astype(numpy.float32)).astype(numpy.float64)
        with numpy.errstate(invalid="ignore"):
            # the emulator's value is the exact one rounded, which half an ulp stands for
            allowed = numpy.abs(values - exact) <= (kernel.ulps + 0.5) * ulp + kernel.relative * numpy.abs(exact)
        wrong &= ~(allowed | numpy.isnan(values) & numpy.isnan(exact))
    return [(int(place), hex(got[place]), hex(expected[place])) for place in wrong.nonzero()[0]]


def test_a_difference_is_seen():
    words = numpy.array([1.0, numpy.nan, numpy.inf, 1.5, -0.0], numpy.float32)
    exact, near = BY_NAME[LANE], BY_NAME["rcp_approx_f32"]
    for step, is_seen in ((0, (False, False)), (1, (True, False)), (2, (True, True))):
        moved = words.view(numpy.uint32).copy()
        moved[3] += step
        seen = tuple(bool(differences(kernel, moved.tobytes(), words.tobytes())) for kernel in (exact, near))
        assert seen == is_seen
    other = numpy.array([1.0, 5.0, numpy.inf, 1.5, 0.0], numpy.float32)
    assert [place for place, *_ in differences(near, other.tobytes(), words.tobytes())] == [1]


def test_every_kernel_runs_in_the_emulator(emulation):
    """Without a report, the same each time, and with something written. It says nothing about the values."""
    left_out = set()
    for name, kernel in BY_NAME.items():
        (first, why), (second, _) = (emulated(emulation, kernel, 90) for _ in range(2))
        if first is None:
            left_out.add(name)
            assert "narrow" in name, why
        assert first == second != bytes([kernels.POISON]) * kernel.out_bytes, name
    assert len(left_out) <= 4


NO_DUMP = pytest.param(None, None, marks=pytest.mark.skip("no GPU's golden.json is committed yet"), id="no dump")


@pytest.mark.parametrize(
    "file, name",
    [pytest.param(file, name, id=f"{file.parent.name}-{name}") for file in DUMPS for name in BY_NAME] or [NO_DUMP],
)
def test_the_emulator_leaves_what_a_gpu_left(emulation, file, name):
    kernel, record = BY_NAME[name], json.loads(file.read_text())
    left, why = dump.outputs_of(record["answers"], kernel)
    wanted, why = emulated(emulation, kernel, record["capability"]) if left is not None else (None, why)
    if wanted is None:
        pytest.skip(why)
    found = differences(kernel, left, wanted)
    assert not found, f"{len(found)} of {kernel.out_bytes // 4} words: (place, GPU, emulator) {found[:5]}"
