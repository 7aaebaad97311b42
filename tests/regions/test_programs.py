"""What a program of cpu_region may say: poolings, the table of micro-kernels, and that wrong integers are refused."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cpu_check.cores import threads
from fused_resnet.kernels import compiled
from fused_resnet.operators import quantized
from fused_resnet.operators.quantized import Epilogue, Quantized, Wide
from fused_resnet.regions.program import Pooling, Region, Requantizing, Segment, StepKind, packed_weights
from tests.support.regions import call, channels_last, fastest, int8_kernels, kernels, table

if compiled.load("cpu") is not None:
    pytest.skip(compiled.load("cpu"), allow_module_level=True)

FASTEST = {dtype: fastest(dtype) for dtype in kernels().values()}

# shape, window, stride, padding
POOLINGS = (
    ((2, 64, 12, 12), (3, 3), (2, 2), (1, 1)),  # a ResNet's stem
    ((3, 5, 9, 7), (2, 3), (2, 1), (1, 1)),
    ((1, 40, 7, 7), (7, 7), (1, 1), (0, 0)),  # and its tail
    ((0, 8, 4, 4), (2, 2), (2, 2), (0, 0)),
)


@pytest.mark.parametrize("case", POOLINGS, ids=str)
@pytest.mark.parametrize("dtype, kernel", FASTEST.items(), ids=str)
def test_poolings_are_those_of_aten(dtype, kernel, case):
    shape, *window = case
    x = channels_last(torch.randn(shape).to(dtype))
    if shape[0] > 1:
        x[1, 1, 2, 2], x[1, 2, 3] = torch.nan, -torch.inf
    region = Region(dtype)
    read = region.read(shape)
    region.write(region.pool(read, "max", *window))
    for counts in (False, True):
        region.write(region.pool(read, "average", *window, count_include_pad=counts))
    with threads(2):
        largest, *averages = call(region, [x], kernel)
    if shape[0] == 0:
        assert largest.shape[0] == averages[0].shape[0] == 0
        return
    assert shape[0] == 1 or largest.isnan().any()
    torch.testing.assert_close(largest, F.max_pool2d(x, *window), rtol=0, atol=0, equal_nan=True)
    for counts, average in zip((False, True), averages):
        expected = F.avg_pool2d(x.double(), *window, count_include_pad=counts).to(dtype)
        torch.testing.assert_close(average, expected, equal_nan=True)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype, kernel", FASTEST.items(), ids=str)
def test_a_norm_with_its_activation(dtype, kernel, in_place):
    x, scale, shift = channels_last(torch.randn(3, 37, 5, 7).to(dtype)), torch.randn(37), torch.randn(37)
    for activation, act in (("none", lambda y: y), ("relu", F.relu), ("relu6", F.relu6), ("silu", F.silu)):
        region = Region(dtype)
        region.write(region.norm(region.read(x.shape), scale, shift, activation=activation, in_place=in_place))
        (y,) = call(region, [x], kernel)
        expected = act(x.double() * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)).to(dtype)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("is_signed", [False, True])
def test_a_norm_of_bytes_is_the_contracts(is_signed):
    x = torch.randint(-128 if is_signed else 0, 128, (3, 70, 5, 7)).float()
    epilogue = Epilogue(torch.randn(70), torch.randn(70) * 20, 0.0, 0.0, 255.0, torch.uint8)
    region, how = Region(torch.int8), Quantized(1.0, is_signed)
    bounds = Requantizing(epilogue, is_signed)
    y = region.norm(region.read(x.shape, how), epilogue.multiplier, epilogue.bias, requantizing=bounds)
    region.write(y, Quantized(1.0, False))
    compiled_region = region.compile()
    for kernel in int8_kernels():
        (y,) = compiled_region([x], compiled_region.empty_workspace().fill_(0xA5), kernel)
        assert torch.equal(y, quantized.requantize(x.int(), epilogue).float()) and y.unique().numel() > 100


def test_a_pooled_convolution_of_two_inputs():
    """Two tensors in, two out; a map with a halo that a pooling has written."""
    region = Region(torch.float32)
    a, b = region.read((2, 20, 8, 8)), region.read((2, 9, 4, 4))
    weights = torch.randn(24, 20, 3, 3) / 14, torch.randn(24, 9, 1, 1) / 3
    pooled = region.pool(a, "max", (2, 2), (2, 2))
    y = region.convolve([Segment(pooled, weights[0], padding=(1, 1)), Segment(b, weights[1])], None)
    region.write(y)
    region.write(region.pool(y, "average", (4, 4), (1, 1)))
    x = [channels_last(torch.randn(m.shape)) for m in (a, b)]
    found, mean = call(region, x, FASTEST[torch.float32])
    expected = F.conv2d(F.max_pool2d(x[0], 2), weights[0], padding=1) + F.conv2d(x[1], weights[1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, expected.mean((2, 3), keepdim=True), rtol=1e-5, atol=1e-5)


LAYOUTS = {
    "NHWC": channels_last,
    "NCHW": lambda x: x.contiguous(memory_format=torch.contiguous_format),
    "every other column": lambda x: torch.stack((x, torch.zeros_like(x)), -1).flatten(3)[..., ::2],
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one image many times": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype, kernel", FASTEST.items(), ids=str)
def test_inputs_may_lie_anyhow_and_have_either_dtype(dtype, kernel, given, name):
    """Converted on the way as by `to`. In the last element of memory, too."""
    for C, window in ((3, (7, 7)), (40, (1, 1)), (16, (3, 3))):
        x = LAYOUTS[name](torch.randn(3, C, 10, 70).to(given))
        padding, weight = (window[0] // 2,) * 2, torch.randn(32, C, *window).to(dtype)
        outputs = []
        for one in (x, channels_last(x.to(dtype))):
            region = Region(dtype)
            region.write(region.convolve([region.read_for(tuple(x.shape), weight, (1, 1), padding)], None))
            outputs.append(call(region, [one], kernel)[0])
        assert torch.equal(*outputs) and outputs[0].count_nonzero() == outputs[0].numel()


# ------------------------------------------------------------------------------------------------ the table's choice


def test_which_kernels_run_only_by_name():
    """The emulated ones, and what was measured not to pay."""
    named = {name for name, (_, taken, _) in table().items() if taken == "named"}
    always = {"amx_bf16_emulated", "amx_int8_emulated", "portable_bf16"}
    assert always <= named <= always | {"avx512_bf16"}
    is_chosen = any(not table()[name][2] and name not in named for name in ("amx_bf16", "avx512_bf16"))
    x = channels_last(torch.randn(1, 32, 4, 4).bfloat16())
    region = Region(torch.bfloat16)
    region.write(region.pool(region.read((1, 32, 4, 4)), "max", (2, 2), (2, 2)))
    if is_chosen:
        call(region, [x], "")
    else:
        with pytest.raises(RuntimeError, match="no kernel for bfloat16 runs here: amx_bf16: .*; avx512_bf16: "):
            call(region, [x], "")
    with pytest.raises(RuntimeError, match="there is no kernel avx2_fp32"):
        call(region, [x], "avx2_fp32")


@pytest.mark.parametrize("limit", ["portable", "avx2", "avx512"])
def test_a_variable_limits_them(limit):
    code = "import json; from tests.support.regions import kernels; print(json.dumps(list(kernels())))"
    environment = {**os.environ, "FUSED_RESNET_CPU_ISA": limit}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    left = json.loads(done.stdout)
    of_avx512 = {"amx_bf16", "avx512_bf16", "avx512_fp32"}
    wider = {"portable": {*of_avx512, "avx2_fp32"}, "avx2": of_avx512}
    assert "amx_bf16" not in left and not wider.get(limit, set()) & set(left)
    assert {"amx_bf16_emulated", "portable_bf16", "portable_fp32"} <= set(left)


# ---------------------------------------------------------------------------------------------------- wrong programs


class Call:
    """A convolution with a residual, as the operator takes it. A step: out, residual, activation, ..."""

    def __init__(self):
        region = Region(torch.float32)
        x, y = region.read((1, 16, 6, 6)), region.read((1, 32, 6, 6))
        weight = torch.randn(32, 16, 3, 3)
        region.write(region.convolve([Segment(x, weight, padding=(1, 1))], torch.randn(32), residual=y))
        self.region = region.compile()
        self.program = self.region.program.tolist()
        self.inputs = [channels_last(torch.randn(1, 16, 6, 6)), channels_last(torch.randn(1, 32, 6, 6))]
        self.weights, self.biases = self.region.weights, self.region.biases
        self.workspace = self.region.empty_workspace()
        self.outputs = [channels_last(torch.full((1, 32, 6, 6), torch.nan))]
        self.kernel = ""

    def run(self):
        program = torch.tensor(self.program, dtype=torch.int64)
        torch.ops.fused_resnet.cpu_region(
            program, self.inputs, self.weights, self.biases, self.kernel, self.workspace, self.outputs
        )


# version, dtype, number of buffers, three buffers of 7, two steps of 7 with a halo's 2 between, the convolution, output
BUFFER, INPUT, CONVOLUTION = 3, 3 + 3 * 7 + 2, 3 + 3 * 7 + 7 + 2 + 7


def put(place, value):
    return lambda call: call.program.__setitem__(place, value)


WRONG = {
    "programs of version 6 are run": put(0, 1),
    "dtype is 0, 2 or 3, for float32, bfloat16 and int8, not 1": put(1, 1),
    "has a header of 2 integers, not 1": lambda call: call.program.__delitem__(slice(1, None)),
    "number of buffers must be from": put(2, -1),
    "a buffer's C must be from 1": put(BUFFER + 1, 0),
    "a buffer's pitch must be from": put(BUFFER + 5, 6),
    "offset must be a multiple of 64": put(BUFFER + 6, 8),
    "does not fit the workspace": put(BUFFER, 1000),
    "a buffer's number must be from 0 to 2": put(CONVOLUTION + 1, 3),
    "a residual of \\(1, 16, 6, 6\\) is added to an output": put(CONVOLUTION + 2, 0),
    "an activation must be from 0 to 3": put(CONVOLUTION + 3, 4),
    "a weight's number must be from 0 to 0": put(CONVOLUTION + 5, 1),
    "a bias's number must be from -1 to 0": put(CONVOLUTION + 6, 1),
    "number of segments must be from 1 to 2": put(CONVOLUTION + 7, 3),
    "an input of .* and the output of .* overlap": put(BUFFER + 2 * 7 + 6, 0),
    "does not give \\(1, 32, 6, 6\\)": put(CONVOLUTION + 10, 5),
    "needs as much halo, the buffer has 0": put(BUFFER + 4, 0),
    "the first image must be from 0 to 1": put(INPUT + 2, 2),
    "an input of 1 images has no 1 from image 1 on": put(INPUT + 2, 1),
    "an output of 1 images has no 1 from image 1 on": put(-1, 1),
    "the taps of an unfolding must be from 1": put(INPUT + 4, 0),
    "the stride of an unfolding must be from 1": put(INPUT + 5, 0),
    "the padding of an unfolding must be from 0": put(INPUT + 6, -1),
    "16 taps of an input of 6 columns do not give": put(INPUT + 4, 16),
    "3 taps of an input of 6 columns do not give": put(INPUT + 4, 3),
    "channels of a phased map must be from 0 to 16": put(CONVOLUTION + 9, 17),
    "a dilation must be from 1": put(CONVOLUTION + 16, 0),
    "a convolution's groups must be from 1 to 16": put(CONVOLUTION + 18, 17),
    "16 and 32 channels have no 3 groups": put(CONVOLUTION + 18, 3),
    "ends within a step": lambda call: call.program.pop(),
    f"a step must be from 0 to {len(StepKind) - 1}": lambda call: call.program.append(len(StepKind)),
    "_fp32 has no step 7": lambda call: call.program.append(7),
    "_fp32 has no step 9": lambda call: call.program.append(9),
    "an input must have the shape": lambda call: call.inputs.reverse(),
    "an input must be float32 or bfloat16": lambda call: call.inputs.__setitem__(0, call.inputs[0].half()),
    "an input's number must be from 0 to -1": lambda call: call.inputs.clear(),
    "a region has at least one output": lambda call: call.outputs.clear(),
    "an output must be channels_last": lambda call: call.outputs.__setitem__(0, call.outputs[0].contiguous()),
    "an output must be Float beside .*_fp32, not BFloat16": lambda call: call.outputs.__setitem__(
        0, call.outputs[0].bfloat16()
    ),
    "a weight must have the shape": lambda call: call.weights.__setitem__(0, call.weights[0][:, 1:].contiguous()),
    "that of 9 k steps or more has 0": lambda call: call.weights.__setitem__(0, torch.empty(1, 1 << 40, 2, 16, 0)),
    "a bias must have the shape": lambda call: call.biases.__setitem__(0, call.biases[0][:16]),
    "workspace must begin at a multiple of 64": lambda call: setattr(call, "workspace", call.workspace[1:]),
    "workspace must be a contiguous vector": lambda call: setattr(call, "workspace", call.workspace[::2]),
}


class CallOfPhases(Call):
    """The same of a convolution that reads the phases of its map. A step: in, out, window, dilation."""

    def __init__(self):
        super().__init__()
        region, weight = Region(torch.float32), torch.randn(32, 16, 3, 3)
        x = region.read((1, 16, 12, 12))
        region.write(region.convolve([Segment(x, weight, (2, 2), (1, 1))], None))
        self.region = region.compile()
        self.program = self.region.program.tolist()
        self.inputs, self.weights, self.biases = [channels_last(torch.randn(1, 16, 12, 12))], self.region.weights, []
        self.workspace = self.region.empty_workspace()


PHASES = 3 + 3 * 7 + 7 + 2
SEGMENT = PHASES + 11 + 8
WRONG_PHASES = {
    "the phases of \\(1, 16, 12, 12\\) for a window of 2x3 are not": put(PHASES + 3, 2),
    "the phases of \\(1, 32, 6, 6\\) for a window of 3x3 are not": put(PHASES + 1, 2),
    "an input of .* and the output of .* overlap": put(BUFFER + 7 + 6, 0),
    "channels for a window of 1x3 do not give": put(SEGMENT + 2, 1),
    "of 64 channels for a window of 3x3 do not give": put(SEGMENT + 1, 64),
    "the window reaches beyond the halo of 1": put(SEGMENT + 2, 5),
}


class CallOfWinograd(Call):
    """A 3x3 convolution by Winograd that replaces what it is added to."""

    def __init__(self):
        super().__init__()
        region = Region(torch.float32)
        x, y = region.read((1, 32, 6, 6)), region.read((1, 32, 6, 6))
        region.write(region.winograd(x, torch.randn(36, 2, 32, 16), (1, 1), torch.randn(32), replaced=y))
        self.region = region.compile()
        self.program = self.region.program.tolist()
        self.inputs = [channels_last(torch.randn(1, 32, 6, 6)) for _ in range(2)]
        self.weights, self.biases = self.region.weights, self.region.biases
        self.workspace = self.region.empty_workspace()


def of_16_channels(call):
    put(BUFFER + 1, 16)(call)
    call.inputs[0] = channels_last(torch.randn(1, 16, 6, 6))


AT = 3 + 2 * 7 + 7 + 7
WRONG_WINOGRAD = {
    "whether out is added must be from 0 to 1": put(AT + 3, 2),
    "an activation must be from 0 to 3": put(AT + 4, 4),
    "a bias must have the shape": lambda call: call.biases.__setitem__(0, call.biases[0][:16]),
    "a 3x3 convolution of \\(1, 32, 6, 6\\) does not give": put(AT + 7, 0),
    "an input of .* and the output of .* overlap": put(AT + 2, 0),
    "Winograd's channels are multiples of 32": of_16_channels,
    "a weight must have the shape": lambda call: call.weights.__setitem__(0, call.weights[0][:35]),
    "Winograd's weight must be contiguous and float32": lambda call: call.weights.__setitem__(
        0, call.weights[0].half()
    ),
}


class CallOfPooledStem(Call):
    """A stem and its pooling in one step."""

    def __init__(self):
        super().__init__()
        region, pooling = Region(torch.float32), Pooling("max", (3, 3), (2, 2), (1, 1))
        region.write(region.pooled_stem((1, 3, 23, 24), torch.randn(32, 3, 7, 7), (2, 2), (3, 3), None, pooling))
        self.region = region.compile()
        self.program = self.region.program.tolist()
        self.inputs = [channels_last(torch.randn(1, 3, 23, 24))]
        self.weights, self.biases = self.region.weights, []
        self.workspace = self.region.empty_workspace()


STEM = 3 + 7
# out, input, first image; taps, stride, padding; activation, weight, bias; window and dilation; kind; window; lines
UNFOLDING, STEM_WINDOW = STEM + 4, STEM + 10
KIND, POOL_WINDOW, LINES = STEM_WINDOW + 8, STEM_WINDOW + 10, STEM_WINDOW + 16
WRONG_STEMS = {
    "an input's number must be from 0 to 0": put(STEM + 2, 1),
    "an input of 1 images has no 1 from image 1 on": put(STEM + 3, 1),
    "an input must have the shape": lambda call: call.inputs.__setitem__(0, call.inputs[0][0]),
    "an input must be float32 or bfloat16": lambda call: call.inputs.__setitem__(0, call.inputs[0].half()),
    "the taps of an unfolding must be from 1": put(UNFOLDING, 0),
    "31 taps and a window of 7x1 give nothing": put(UNFOLDING, 31),
    "7 taps and a window of 30x1 give nothing": put(STEM_WINDOW, 30),
    "a weight must have the shape of its convolution": put(STEM_WINDOW, 8),
    "that of 14 k steps or more has 0": lambda call: call.weights.__setitem__(0, torch.empty(1, 1 << 40, 2, 16, 0)),
    "a weight must have the shape \\(1, 12": put(STEM_WINDOW, 6),
    "a dilation must be from 1": put(STEM_WINDOW + 6, 0),
    "an activation must be from 0 to 3": put(STEM + 7, 4),
    "a weight's number must be from 0 to 0": put(STEM + 8, 1),
    "a bias's number must be from -1 to -1": put(STEM + 9, 0),
    "a pooling's kind must be from 0 to 1": put(KIND, 2),
    "a window of 3x1 over .* lies outside of the map": put(POOL_WINDOW + 1, 1),
    "a window of 3x3 over .* lies outside of the map": put(POOL_WINDOW + 2, 3),
    "an average that counts padding must have its windows inside": put(POOL_WINDOW, 5),
    "the lines of a band must be from 1": put(LINES, 0),
    "a band of .* lines is too large": put(STEM_WINDOW + 5, 1 << 24),
    "ends within a step": lambda call: call.program.__delitem__(slice(LINES, None)),
}


class CallOfCopy(Call):
    """Every second pixel twice, after three channels of zeros."""

    def __init__(self):
        super().__init__()
        region = Region(torch.float32)
        region.write(region.copy([region.read((1, 32, 6, 6))], before=3, stride=(2, 2), factor=(2, 2)))
        self.region = region.compile()
        self.program = self.region.program.tolist()
        self.inputs, self.weights, self.biases = [channels_last(torch.randn(1, 32, 6, 6))], [], []
        self.workspace = self.region.empty_workspace()
        self.outputs = [channels_last(torch.full((1, 35, 6, 6), torch.nan))]


COPY = 3 + 2 * 7 + 7
WRONG_COPIES = {
    "a channel must be from 0 to 35": put(COPY + 3, 36),
    "from channel 4 on, every 2x2 pixels 2x2 times, does not fill": put(COPY + 3, 4),
    "every 3x2 pixels 2x2 times, does not fill \\(1, 35, 6, 6\\)": put(COPY + 4, 3),
    "every 2x2 pixels 2x1 times, does not fill": put(COPY + 7, 1),
    "a factor must be from 1": put(COPY + 6, 0),
    "whether out is zeroed must be from 0 to 1": put(COPY + 8, 2),
    "an input of .* and the output of .* overlap": put(BUFFER + 7 + 6, 0),
}


class CallOfGate(Call):
    """A gated map with a sum. A step: out, x, gate, residual, function, activation."""

    def __init__(self):
        super().__init__()
        region = Region(torch.float32)
        x, gate, y = (region.read(shape) for shape in ((1, 32, 6, 6), (1, 32, 1, 1), (1, 32, 6, 6)))
        region.write(region.gate(x, gate, "sigmoid", residual=y, activation="relu"))
        self.region = region.compile()
        self.program = self.region.program.tolist()
        self.inputs = [channels_last(torch.randn(1, 32, *size)) for size in ((6, 6), (1, 1), (6, 6))]
        self.weights, self.biases = [], []
        self.workspace = self.region.empty_workspace()


GATE = 3 + 4 * 7 + 3 * 7
WRONG_GATES = {
    "a gated map of \\(1, 32, 1, 1\\) does not give": put(GATE + 2, 1),
    "gates of \\(1, 32, 6, 6\\) are not those of": put(GATE + 3, 2),
    "a residual of \\(1, 32, 1, 1\\) does not give": put(GATE + 4, 1),
    "gates of .* and the output of .* overlap": lambda call: put(BUFFER + 7 + 6, call.program[BUFFER + 21 + 6])(call),
    "a gated map of .* and the output of .* overlap": lambda call: put(BUFFER + 6, call.program[BUFFER + 21 + 6])(call),
    "a gate's function must be from 0 to 1": put(GATE + 5, 2),
    "an activation must be from 0 to 3": put(GATE + 6, 4),
}


class CallOfVectors(Call):
    """A gate in int8. Step 13: channels, vectors, factor, sign, activation, weight and constants."""

    def __init__(self):
        super().__init__()
        region, how = Region(torch.int8), Quantized(0.5, False)
        x = region.read((1, 32, 6, 6), how)
        packed = packed_weights([torch.ones(32, 32, 1, 1).to(torch.int8)], torch.int8)
        constants = Epilogue(torch.ones(32), torch.ones(32), 0.0, -1.0, 1.0, torch.float32)
        gate = region.linear(region.means(x, how), 32, packed, constants, Wide(0.5, False))
        bounds = Epilogue(torch.ones(1), torch.zeros(1), 1.0, 0.0, 255.0, torch.uint8)
        y = region.gate(x, gate, "sigmoid", residual=x, requantizing=Requantizing(bounds, False))
        constants = Requantizing(bounds, False)
        region.write(region.norm(y, torch.ones(32), torch.ones(32), requantizing=constants), how)
        self.region = region.compile()
        self.program = self.region.program.tolist()
        self.inputs = [channels_last(torch.randn(1, 32, 6, 6))]
        self.weights, self.biases = self.region.weights, list(self.region.biases)
        self.outputs = [torch.zeros(1, 32, 6, 6).contiguous(memory_format=torch.channels_last)]
        self.workspace = self.region.empty_workspace()


MEANS = 3 + 5 * 7 + 11
LAYER, GATED, NORM = MEANS + 5, MEANS + 5 + 10, MEANS + 5 + 10 + 13
WRONG_VECTORS = {
    "means of 32 channels are a vector of 4 bytes for each of 64, not": put(MEANS + 2, 0),
    "means of 32 channels are a vector of 4 bytes for each of 64, not ": put(BUFFER + 7 + 1, 255),
    "the inputs of a linear layer of 65 channels are a vector": put(LAYER + 1, 65),
    "the outputs of a linear layer of 65 channels are a vector": put(LAYER + 2, 65),
    "a linear layer's|overlap": put(LAYER + 4, 1),
    "256 / scale must be finite": put(LAYER + 5, 0x7F800000),
    "a weight must have the shape": put(LAYER + 2, 33),
    "gates of 32 channels are a vector": put(GATED + 3, 0),
    "in int8 a gate has no activation, not relu": put(GATED + 6, 1),
    "the bounds of bytes are": put(GATED + 9, 0x3F800000),
    "in int8 a norm has no activation, not relu": put(NORM + 3, 1),
    "a norm's constants must have the shape": put(NORM + 4, 0),
    "a map before its norm of .* does not give": put(NORM + 2, 1),
}


class CallOfBytes(Call):
    """The same in int8, with two rows in a pixel."""

    def __init__(self):
        super().__init__()
        region, pooling = Region(torch.int8), Pooling("max", (3, 3), (2, 2), (1, 1))
        weight, how = torch.ones(32, 3, 7, 7).to(torch.int8), Quantized(0.5, True)
        requantizing = Requantizing(Epilogue(torch.ones(32), torch.ones(32), 0.0, 0.0, 255.0, torch.uint8), True)
        stem = ((1, 3, 23, 24), weight, (2, 2), (3, 3), None, pooling)
        region.write(region.pooled_stem(*stem, how=how, requantizing=requantizing), Quantized(1.0, False))
        self.region = region.compile()
        self.program = self.region.program.tolist()
        self.inputs = [channels_last(torch.randn(1, 3, 23, 24))]
        self.weights, self.biases = self.region.weights, list(self.region.biases)
        self.outputs = [torch.zeros(self.region.output_shapes[0]).contiguous(memory_format=torch.channels_last)]
        self.workspace = self.region.empty_workspace()


# after the unfolding's padding: rows, padding, lines; and at the end 1 / scale, is signed, and a convolution's end
MORE = 3
WRONG_BYTES = {
    "the rows of an unfolding must be from 1 to 64, not 0": put(UNFOLDING + 3, 0),
    "4 rows of 7 taps of an input of 3 channels and 23 lines do not give 15": put(UNFOLDING + 3, 4),
    "1 rows of 7 taps of an input of 3 channels and 23 lines do not give 15": put(UNFOLDING + 3, 1),
    "a window of 4x1 give nothing": put(UNFOLDING + 5, 3),
    "its activations|no activation": put(STEM + 7 + MORE, 1),
    "a convolution's constants must have the shape": lambda call: call.biases.__setitem__(
        0, call.biases[0][:, :2].contiguous()
    ),
    "in int8 poolings are maxima": put(KIND + MORE, 0),
    "1 / scale must be finite": put(LINES + MORE + 1, 0x7F800000),
    "the bounds of bytes are": put(LINES + MORE + 4, 0x3F800000),
}

OF_EACH = {
    **{Call: WRONG, CallOfPhases: WRONG_PHASES, CallOfWinograd: WRONG_WINOGRAD},
    **{CallOfGate: WRONG_GATES, CallOfVectors: WRONG_VECTORS},
    **{CallOfPooledStem: WRONG_STEMS, CallOfBytes: WRONG_BYTES, CallOfCopy: WRONG_COPIES},
}


@pytest.mark.parametrize("make, sentence", [(make, sentence) for make, wrong in OF_EACH.items() for sentence in wrong])
def test_it_refuses(make, sentence):
    """And nothing of the program has run then. As it was, it runs."""
    call = make()
    call.run()
    assert not call.outputs[0].isnan().any()
    call.outputs[0].fill_(torch.nan)
    OF_EACH[make][sentence](call)
    with pytest.raises(RuntimeError, match=sentence):
        call.run()
    assert all(output.isnan().all() for output in call.outputs)


@pytest.mark.parametrize("make", [Call, CallOfPooledStem, CallOfVectors])
def test_whatever_the_integers_nothing_outside_is_written(make):
    """Random ones in place of right ones, in a workspace between guards."""
    refused, size = 0, make().region.workspace_bytes
    for _ in range(500):
        call = make()
        memory = torch.full((size + 2 * 4096,), 0x5A, dtype=torch.uint8)
        begin = 4096 - memory.data_ptr() % 64
        call.workspace = memory[begin : begin + size]
        for _ in range(random.randint(1, 2)):
            value = random.choice((-1, 0, 1, 2, 3, 7, 64, 1 << 20, 1 << 24, (1 << 62) + 1, random.randint(0, 9000)))
            call.program[random.randrange(3, len(call.program))] = value
        try:
            call.run()
        except RuntimeError:
            refused += 1
        assert (memory[:begin] == 0x5A).all() and (memory[begin + size :] == 0x5A).all()
    assert 250 < refused < 500
