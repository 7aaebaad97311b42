"""Models frozen in int8, by the contract's reference: what becomes int8, with which scales, and what is refused."""

import copy
import logging
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from fused_resnet.backends import BackendError
from fused_resnet.freezing import calibration
from fused_resnet.measuring.rooflines import Roofline
from fused_resnet.nn import BasicBlock, Bottleneck
from fused_resnet.operators import quantized
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.quantized import Quantized, Wide, quantized_over
from fused_resnet.quantizing import Scales
from fused_resnet.quantizing.calibrate import FloatConv
from fused_resnet.regions import kernels
from fused_resnet.regions.fragment import ConvStep, GateStep
from tests.support import networks
from tests.support.quantized import by_reference, int8_regions

X = (2, 3, 16, 16)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    by_reference(monkeypatch)


@pytest.fixture(params=(torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def rest(request, monkeypatch):
    """What stays in floats is in this dtype."""
    monkeypatch.setattr("fused_resnet.freezing.calibration.beside_int8", lambda: request.param)
    return request.param


def images(count=4, batches=2, shape=X[1:]):
    return [torch.randn(count, *shape) for _ in range(batches)]


def in_int8(model, x, **options):
    options = {"calibrate": images(shape=x.shape[1:]), **options}
    return fused_resnet.freeze(model.eval(), x, dtype=torch.int8, **options)


def sqnr(model, frozen, x):
    return fused_resnet.agreement(lambda x: model(x).flatten(1), lambda x: frozen(x).flatten(1), [x]).sqnr_db


class Forward(nn.Module):
    """A forward given as a function of (x, a, b, c): three 3x3 convolutions of eight channels, the first of three."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.run = forward

    def forward(self, x):
        return self.run(x, self.a, self.b, self.c)


# ------------------------------------------------------------------------------------------------ what becomes int8


def test_gates_are_within_the_region(rest):
    model, x = networks.randomize(networks.Gated()), torch.randn(X)
    loader = images()
    frozen = in_int8(model, x, calibrate=loader)
    (region,) = int8_regions(frozen, x)
    assert len(region.convolutions) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    gates = [step for step in region.fragment.steps if isinstance(step, GateStep)]
    assert [(gate.function, gate.activation, gate.residual is None) for gate in gates] == [
        ("sigmoid", "relu", False), ("sigmoid", "none", True),
        ("hardsigmoid", "relu", False), ("sigmoid", "none", True),
    ]  # fmt: skip
    assert sqnr(model, frozen, x) > 20
    scales = [str(how) for how in region.fragment.scales if isinstance(how, Wide)]
    assert len(scales) == 8 and {how[:3] for how in scales} == {"s16", "u16"}
    other = torch.randn(3, 3, 20, 13)
    assert sqnr(model, frozen, other) > 18


def test_gates_cost_no_accuracy(rest):
    """With the gates' small convolutions in floats, as they were, the answers are no nearer."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        model, x, loader = networks.randomize(networks.Gated()), torch.randn(8, *X[1:]), images()
        squeezes = [name for name, module in model.named_modules() if isinstance(module, networks.Squeeze)]
        plain = in_int8(model, x, calibrate=loader, keep=squeezes)
        assert all(region.fragment.steps != () and not any(isinstance(step, GateStep) for step in region.fragment.steps)
                   for region in int8_regions(plain, x))  # fmt: skip
        found.append((sqnr(model, in_int8(model, x, calibrate=loader), x), sqnr(model, plain, x)))
    ours, floats = (sum(column) / len(found) for column in zip(*found))
    assert ours > floats - 0.5, found


class Perceptron(nn.Module):
    """A map laid flat, as in VGG, and three linear layers."""

    def __init__(self, sides=(3, 4), flatten=None):
        super().__init__()
        self.conv, self.pool, self.sides = nn.Conv2d(3, 33, 3, padding=1), nn.AdaptiveAvgPool2d(sides), sides
        self.max, self.flatten = nn.MaxPool2d(4), flatten or nn.Flatten()
        self.layers = nn.Sequential(
            nn.Linear(33 * sides[0] * sides[1], 70), nn.ReLU(True), nn.Dropout(), nn.Linear(70, 40), nn.ReLU6()
        )
        self.fc = nn.Linear(40, 5)

    def forward(self, x):
        return self.fc(self.layers(self.flatten(self.pool(self.max(torch.relu(self.conv(x)))))))


@pytest.mark.parametrize("flatten", [None, lambda x: torch.flatten(x, 1), lambda x: x.flatten(1)])
def test_linear_layers_of_a_flat_map_are_within_the_region(flatten, rest):
    model, x = Perceptron(flatten=flatten).eval(), torch.randn(3, 3, 12, 16)
    frozen = in_int8(model, x)
    (region,) = int8_regions(frozen, x)
    steps = [step for step in region.fragment.steps if isinstance(step, ConvStep)]
    assert [(step.problem.K, step.problem.R, step.problem.S, step.is_linear) for step in steps] == [
        (33, 3, 3, False), (70, 3, 4, False), (40, 1, 1, False), (5, 1, 1, True),
    ]  # fmt: skip
    assert sqnr(model, frozen, x) > 25
    kept = in_int8(model, x, keep=["layers.0"])
    assert sqnr(model, kept, x) > 25
    assert [len(region.convolutions) for region in int8_regions(kept, x)] == [1]


def test_a_pooling_before_linear_layers_stays_in_floats(rest):
    """One that returns another size: what it gives is made bytes again."""
    model, x = Perceptron((2, 2)).eval(), torch.randn(3, 3, 12, 16)
    frozen = in_int8(model, x)
    assert [len(region.convolutions) for region in int8_regions(frozen, x)] == [1, 2]
    assert sqnr(model, frozen, x) > 25


@pytest.mark.parametrize("kept", ["3.se.fc1", "3.se.fc2", "3.conv2"])
def test_a_gate_of_which_something_is_kept_stays_in_floats(kept, rest):
    model, x = networks.randomize(networks.Gated()), torch.randn(X)
    frozen = in_int8(model, x, keep=[kept])
    counts = [sum(isinstance(step, GateStep) for step in one.fragment.steps) for one in int8_regions(frozen, x)]
    assert sum(counts) == 3 and sqnr(model, frozen, x) > 18


@pytest.mark.parametrize("block", (BasicBlock, Bottleneck))
def test_a_resnet_is_one_region(block, rest):
    model, x = networks.small(block), torch.randn(X)
    frozen = in_int8(model, x)
    (region,) = int8_regions(frozen, x)
    assert len(region.convolutions) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert frozen(x).dtype == torch.float32 and frozen.dtype == torch.int8
    assert sqnr(model, frozen, x) > 20
    other = torch.randn(3, 3, 20, 13)
    assert sqnr(model, frozen, other) > 18  # by the same scales
    assert [r.fragment.scales for r in int8_regions(frozen, other)] == [region.fragment.scales]


def test_scales_follow_from_the_ranges():
    model, x = Forward(lambda x, a, b, c: F.relu(c(F.relu(b(F.relu6(a(x))))) + a(x))), torch.randn(X)
    with torch.no_grad():
        for parameter in model.a.parameters():
            parameter.mul_(20)  # so that relu6 cuts
    batches = images()
    frozen = in_int8(model, x, calibrate=batches)
    (region,) = int8_regions(frozen, x)
    seen = torch.cat(batches)
    with torch.no_grad():
        a = model.a(seen)
        b = F.relu(model.b(F.relu6(a)))
        c = model.c(b)
    # the later convolution takes the sum: a's second call
    expected = [(seen, None), (F.relu6(a), False), (b, False), (c, True), (F.relu(c + a), False)]
    for how, (value, is_signed) in zip(region.fragment.scales, expected, strict=True):
        wanted = quantized_over(value.min().item(), value.max().item(), is_signed)
        assert how.is_signed == wanted.is_signed and how.scale == pytest.approx(wanted.scale, rel=1e-5)


def test_weights_are_folded_in_fp64(rest):
    model = networks.randomize(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()))
    (region,) = int8_regions(in_int8(model, torch.randn(X)), torch.randn(X))
    conv, bn = copy.deepcopy(model[0]).double(), copy.deepcopy(model[1]).double()
    factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    q, scales = quantized.quantized_weight(conv.weight * factor.view(-1, 1, 1, 1))
    assert torch.equal(region.weights[0], q)
    x, out = region.fragment.scales
    wanted = quantized.epilogue_of(x, scales, out, bn.bias - bn.running_mean * factor, None, "relu")
    assert torch.equal(region.epilogues[0].multiplier, wanted.multiplier)
    assert torch.equal(region.epilogues[0].bias, wanted.bias)


CUTS = {  # forward: (how many convolutions each region has, the reason of those that stay in floats)
    "silu": (lambda x, a, b, c: c(F.silu(b(F.relu(a(x))))), [1, 1], "silu has no int8 form"),
    "sigmoid": (lambda x, a, b, c: c(torch.sigmoid(b(F.relu(a(x))))), [2, 1], None),
    "concatenated": (lambda x, a, b, c: c(torch.cat([b(F.relu(a(x)))[:, :4], a(x)[:, 4:]], 1)), [2, 1, 1], None),
    "gated": (lambda x, a, b, c: c(F.relu(a(x)) * b(F.relu(a(x)).mean((2, 3), keepdim=True))), [2, 1, 1], None),
}


@pytest.mark.parametrize("name", CUTS)
def test_what_has_no_int8_form_is_between_regions(name, rest):
    forward, counts, reason = CUTS[name]
    model, x = Forward(forward).eval(), torch.randn(X)
    frozen = in_int8(model, x)
    assert [len(region.convolutions) for region in int8_regions(frozen, x)] == counts
    reasons = set(frozen.plan(x).meta["not_int8"].values())
    assert reasons == ({reason} if reason else set())
    assert sqnr(model, frozen, x) > 20


def test_a_shortcut_of_slices_and_zeros_keeps_its_scale(rest):
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)

        def forward(self, x):
            y = F.relu(self.a(x))
            return F.relu(self.c(y) + F.pad(y[:, :4, ::2, ::2], (0, 0, 0, 0, 2, 2)))

    model, x = Shortcut(), torch.randn(X)
    frozen = in_int8(model, x)
    first, second = int8_regions(frozen, x)
    assert first.fragment.scales[-1] == second.fragment.scales[0] == second.fragment.scales[1]
    assert all(node.target != "to" for node in frozen.plan(x).graph.nodes)  # and no digit in bf16


def test_a_step_in_fp32_is_between_regions(rest):
    """A conversion to bf16 casts what follows the step, which calibration has not seen as a node of its own."""
    model, x = Forward(lambda x, a, b, c: b(F.local_response_norm(F.relu(a(x)), 3))).eval(), torch.randn(X)
    frozen = in_int8(model, x)
    assert [len(region.convolutions) for region in int8_regions(frozen, x)] == [1, 1]
    assert not frozen.plan(x).meta["not_int8"] and sqnr(model, frozen, x) > 20


IN_PLACE = {
    "a module that is written into": lambda x, a, b, c: (lambda y: F.relu_(y) * 0 + c(b(y)) + y)(a(x)),
    "a function": lambda x, a, b, c: (lambda y: F.hardswish(y, inplace=True) * 0 + c(y))(a(x)),
}


@pytest.mark.parametrize("how", IN_PLACE)
def test_what_is_written_in_place_is_seen_by_all_its_readers(how, rest):
    model, x = Forward(IN_PLACE[how]), torch.randn(X)
    assert sqnr(model, in_int8(model, x), x) > 20


def test_a_convolution_that_was_calibrated_with_more_behind_it_stays_in_floats(rest):
    """In a bf16 plan the sum with an fp32 tensor is not the convolution's. The range that was found is the sum's."""

    def forward(x, a, b, c):
        y = F.relu(a(x))
        return c(F.relu(b(y) + (y + 4).float()))

    model, x = Forward(forward), torch.randn(X)
    with torch.no_grad():
        model.b.bias.sub_(4)
    assert sqnr(model, in_int8(model, x), x) > 20


def test_a_bf16_model_returns_bf16(rest):
    model, x = Forward(lambda x, a, b, c: c(F.relu(b(F.relu(a(x)))))).bfloat16(), torch.randn(X).bfloat16()
    frozen = in_int8(model, x, calibrate=[batch.bfloat16() for batch in images()])
    assert frozen(x).dtype == model(x).dtype == torch.bfloat16


def test_the_most_sensitive_are_such_as_could_be_int8(monkeypatch):
    model, x = Forward(lambda x, a, b, c: c(F.relu(b(F.relu(a(x)))))), torch.randn(X)
    model.b = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    monkeypatch.setattr(calibration, "sensitivity", lambda *args: {"b": 1.0, "a": 2.0, "c": 3.0})
    assert in_int8(model, x, keep=1)._quantization.kept == {"a"}


def test_depthwise_convolutions_stay_in_floats():
    """Those whose groups are narrow: a panel would multiply zeros for the most part."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()), torch.randn(X)
    reason = "its panels would read 64 channels for groups of 1, and more than 16 times as many do not pay"
    assert in_int8(model, x).plan(x).meta["not_int8"] == {"fused_model_2": reason}
    model[2] = nn.Conv2d(8, 8, 3, groups=2)
    assert not in_int8(model, x).plan(x).meta["not_int8"]


def test_nothing_in_int8_is_warned_of(caplog, rest):
    model, x = networks.small(), torch.randn(X)
    in_int8(model, x, keep="conv1")
    assert not caplog.records
    count = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    in_int8(model, x, keep=count)
    (text,) = caplog.messages
    name = str(rest).removeprefix("torch.")
    assert f"nothing became int8, and the model computes in {name}: {count} of its convolutions: keep asked for" in text
    assert f"Keep fewer of them, or freeze it in {rest}" in text
    caplog.clear()
    in_int8(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), x)
    assert "no convolution of it could be lowered" in caplog.text


def test_long_sums_stay_in_floats(caplog):
    model = nn.Sequential(nn.Conv2d(7400, 2, 3), nn.ReLU())
    x = torch.randn(1, 7400, 3, 3)
    frozen = in_int8(model, x, calibrate=[x])
    (reason,) = frozen.plan(x).meta["not_int8"].values()
    assert reason == "sums of 66,600 products may leave int32 (at most 66,310 stay)"
    assert not int8_regions(frozen, x)
    assert f"1 of its convolutions: {reason}." in caplog.text


def test_an_empty_batch_has_a_plan():
    model = networks.small()
    assert in_int8(model, torch.randn(X))(torch.randn(0, *X[1:])).shape == (0, 10)


def test_other_input_dtypes():
    model, x = networks.small().double(), torch.randn(X).double()
    frozen = in_int8(model, x, calibrate=[x])
    assert int8_regions(frozen, x) and frozen(x).dtype == torch.float64
    assert sqnr(model, frozen, x) > 20


# ------------------------------------------------------------------------------------------------------------- scales


def test_scales_outlive_the_model(tmp_path):
    model, x = networks.small(), torch.randn(X)
    frozen = in_int8(model, x, calibrate=[(x, torch.zeros(2)), (torch.randn(5, 3, 16, 16), torch.zeros(5))])
    path = frozen.scales().save(tmp_path / "scales.json")
    assert frozen.scales().images == 7
    for source in (path, str(path), frozen.scales(), Scales.load(path)):
        assert torch.equal(in_int8(model, x, calibrate=source)(x), frozen(x))
    with pytest.raises(TypeError, match="frozen in float32; int8 and float8_e4m3fn alone have scales"):
        fused_resnet.freeze(model, x).scales()


def test_a_copy_in_a_pickle_answers_alike():
    model, x = networks.small(), torch.randn(X)
    frozen = in_int8(model, x)
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), frozen(x))


def test_a_generator_is_read_once_and_eval_mode_is_kept():
    model, x = networks.small(), torch.randn(X)
    before = copy.deepcopy(model.state_dict())
    frozen = in_int8(model, x, calibrate=(batch for batch in images()))
    assert frozen.scales().images == 8
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tensor_that_stays_zero_is_warned_of_once(caplog):
    model, x = Forward(lambda x, a, b, c: F.relu(c(F.relu(b(F.relu(a(x)))))) + 1).eval(), torch.randn(X)
    with torch.no_grad():
        model.b.weight.zero_()
        model.b.bias.fill_(-1.0)
    with caplog.at_level(logging.WARNING, logger="fused_resnet"):
        frozen = in_int8(model, x)
    (message,) = [record.getMessage() for record in caplog.records if "kept with scale 1" in record.getMessage()]
    assert message == "0 in all 8 images of calibrate, and kept with scale 1: b"
    (region,) = int8_regions(frozen, x)
    assert region.fragment.scales[2] == (1.0, False)
    torch.testing.assert_close(frozen(x), model(x).detach(), rtol=0, atol=0.02)


@pytest.mark.parametrize("size", (1e-40, 1e-37, 1e-30, 1e30, 1e36))
def test_tensors_of_any_size(size, caplog):
    """Those below fp32's normal scales are 0, and a warning names them. All others are as precise as any."""
    model, x = Forward(lambda x, a, b, c: c(F.relu(b(F.relu(a(x)))))).eval(), torch.randn(X) * size
    with torch.no_grad():
        for conv in (model.a, model.b, model.c):
            conv.bias.mul_(size)
    frozen = in_int8(model, x, calibrate=[x])
    (region,) = int8_regions(frozen, x)
    if size < 3e-36:
        assert "too small for a scale in all 2 images of calibrate, and kept with scale 1: x, a, b, c" in caplog.text
        assert {how.scale for how in region.fragment.scales} == {1.0} and not frozen(x).any()
    else:
        assert not caplog.records and sqnr(model, frozen, x) > 25


def test_constants_beyond_fp32_are_an_error():
    model, x = Forward(lambda x, a, b, c: c(F.relu(b(F.relu(a(x)))))).eval(), torch.randn(X)
    with torch.no_grad():
        for parameter in model.b.parameters():
            parameter.mul_(1e-35)
        model.b.bias[0] = -1e6  # over a scale of 1e-37
    with pytest.raises(ValueError, match="freeze: b has no int8 form: .* constants beyond fp32. Name it in keep."):
        in_int8(model, x)
    assert sqnr(model, in_int8(model, x, keep="b"), x) > 20


# --------------------------------------------------------------------------------------------------------------- keep


@pytest.mark.parametrize(
    "keep, kept",
    (
        ("conv1", ["conv1"]),
        (["conv1", "layer2.0.conv2"], ["conv1", "layer2_0_conv2"]),
        (["layer2_0"], ["layer2_0_conv1", "layer2_0_conv2", "layer2_0_downsample_0"]),
    ),
    ids=str,
)
def test_named_convolutions_stay_in_floats(keep, kept, rest):
    model, x = networks.small(BasicBlock), torch.randn(X)
    frozen = in_int8(model, x, keep=keep)
    expected = {f"fused_model_{name}": "keep asked for it" for name in kept}
    assert frozen.plan(x).meta["not_int8"] == expected
    inside = sum(len(region.convolutions) for region in int8_regions(frozen, x))
    assert inside + len(kept) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert sqnr(model, frozen, x) > 20


HEADS = {
    "large": (lambda h: h(F.relu), (3, 3, 2, 129), False),
    "largest": (lambda h: h(F.relu), (3, 3, 1, 257), True),
    "signed": (lambda h: h(lambda y: y), X, False),
    "after an activation": (lambda h: h(F.relu, F.relu), X, False),
    "read twice": (lambda h: (h(F.relu), h.mean), X, True),
}


class Head(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv, self.pool, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)
        self.run = forward

    def forward(self, x):
        def head(activation, between=lambda y: y):
            head.mean = torch.flatten(self.pool(activation(self.conv(x))), 1)
            return self.linear(between(head.mean))

        return self.run(head)


@pytest.mark.parametrize("case", HEADS)
def test_linear_layers_of_means_of_bytes_are_int8(case, rest):
    forward, shape, is_inside = HEADS[case]
    model, x = Head(forward).eval(), torch.randn(shape)
    frozen = in_int8(model, x)
    (region,) = int8_regions(frozen, x)
    assert (5 in [shape[1] for shape in region.compiled.output_shapes]) == is_inside
    expected, actual = model(x), frozen(x)
    for right, y in zip(*((one if isinstance(one, tuple) else (one,)) for one in (expected, actual))):
        torch.testing.assert_close(y, right.detach(), rtol=0, atol=0.05)


def test_keep_names_linear_layers(rest):
    model, x = Head(HEADS["largest"][0]).eval(), torch.randn(X)
    frozen, kept = in_int8(model, x), in_int8(model, x, keep="linear")
    (region,), (other,) = int8_regions(frozen, x), int8_regions(kept, x)
    assert [one.compiled.output_shapes for one in (region, other)] == [[(2, 5, 1, 1)], [(2, 8, 1, 1)]]
    assert frozen(x).dtype == kept(x).dtype == torch.float32 and not torch.equal(frozen(x), kept(x))
    assert sqnr(model, frozen, x) > 30


def test_a_number_keeps_the_most_sensitive():
    model, x = Forward(lambda x, a, b, c: c(F.relu(b(F.relu(a(x)))))).eval(), torch.randn(X)
    with torch.no_grad():
        model.b.weight[:, 0] *= 50  # one input channel has all of the range of the weights
        model.a.weight[0], model.a.bias[0] = 0, -1  # and is always 0
    kept = [in_int8(model, x, keep=k).plan(x).meta["not_int8"] for k in range(4)]
    assert [len(one) for one in kept] == [0, 1, 2, 3]
    assert list(kept[1]) == ["fused_model_b"]
    scales = in_int8(model, x).scales()
    with pytest.raises(ValueError, match="keep=1 asks for the most sensitive convolutions, which only images show"):
        in_int8(model, x, calibrate=scales, keep=1)


# ----------------------------------------------------------------------------------------------------------- refusals


def refused(error, match, model=None, **options):
    x = torch.randn(X)
    with pytest.raises(error, match=match):
        fused_resnet.freeze(model or networks.small(), x, **{"dtype": torch.int8, "calibrate": [x], **options})


def test_arguments_that_do_not_fit_together():
    refused(ValueError, "dtype=torch.int8 needs calibrate: a loader", calibrate=None)
    dtypes = "dtype=torch.int8 or float8_e4m3fn"
    refused(ValueError, f"calibrate is for {dtypes}, got dtype=torch.bfloat16", dtype=torch.bfloat16)
    refused(ValueError, f"keep is for {dtypes}, got dtype=None", dtype=None, calibrate=None, keep=2)
    refused(TypeError, "keep must be names of convolutions or how many of them, got -1", keep=-1)
    refused(TypeError, "keep must be names of convolutions or how many of them, got 1.5", keep=1.5)
    unknown = "keep names .conv9., which holds no convolution and no linear layer. Known ones are conv1, "
    refused(ValueError, unknown, keep=["conv9"])
    refused(TypeError, r"got a Tensor. One batch x is \[x\]", calibrate=torch.randn(X))
    refused(TypeError, "must be batches of images, a path or Scales, got a int", calibrate=16)
    refused(ValueError, "backend='eager' is not for int8; 'auto', 'onednn' can be asked for", backend="eager")


def test_batches_that_do_not_fit():
    refused(ValueError, "calibrate holds no images", calibrate=[])
    refused(ValueError, "calibrate holds no images", calibrate=iter([torch.randn(0, 3, 16, 16)]))
    other = r"batch 1 of calibrate has shape \(N, 3, 8, 16\), but the example has \(N, 3, 16, 16\)"
    refused(ValueError, other, calibrate=[torch.randn(X), torch.randn(2, 3, 8, 16)])
    refused(ValueError, "batch 0 of calibrate has dtype torch.float64, but the example has torch.float32",
            calibrate=[torch.randn(X).double()])  # fmt: skip
    refused(ValueError, "has device meta, but the example has cpu", calibrate=[torch.empty(X, device="meta")])
    refused(TypeError, "batch 0 is a dict; batches are tensors", calibrate=[{"x": torch.randn(X)}])
    refused(TypeError, "batch 0 is a list", calibrate=[[torch.randn(X)] * 3])


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_what_is_no_number_is_named(value):
    broken = torch.randn(X)
    broken[1, 2, 3, 4] = value
    refused(ValueError, "x is NaN or infinite in batch 1 of calibrate", calibrate=[torch.randn(X), broken])
    model = networks.small()
    with torch.no_grad():
        model.layer2[0].bn1.bias[1] = float("inf")
    refused(ValueError, "layer2_0_conv1 is NaN or infinite in batch 0 of calibrate", model)


def test_scales_of_other_weights():
    model, x = networks.small(), torch.randn(X)
    scales = in_int8(model, x).scales()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] += 1e-3
    refused(ValueError, "these scales are of other weights .*Calibrate again", model, calibrate=scales)


def test_scales_of_other_steps(caplog):
    """Stride in the first convolution of a block or in the second; ReLU6 in the place of ReLU."""
    x = torch.randn(X)
    v15 = networks.small(Bottleneck)
    scales = in_int8(v15, x).scales()
    v1, other = copy.deepcopy(v15), copy.deepcopy(v15)
    block = v1.layer2[0]
    block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    other.layer1[0].relu = nn.ReLU6()
    for model in (v1, other):
        refused(ValueError, "of a model with the same weights and other steps: strides", model, calibrate=scales)
    for wrapped in (copy.deepcopy(v15), nn.DataParallel(v15)):
        fused_resnet.freeze(wrapped, torch.randn(1, 3, 20, 20), dtype=torch.int8, calibrate=scales)
    slower = copy.deepcopy(v15)
    slower.bn1.momentum = 0.01
    in_int8(slower, x, calibrate=scales)
    assert not caplog.records
    assert int8_regions(in_int8(v1, x, calibrate=scales._replace(steps=None)), x)
    assert "are taken for its weights alone. Calibrate again" in caplog.text


def test_without_a_kernel(monkeypatch):
    monkeypatch.setattr(kernels, "why_none", lambda dtype: "no compiler was found")
    refused(BackendError, r"int8 cannot run here: no compiler was found. Build the C\+\+ library .*or freeze in")


def test_what_stays_in_floats_is_bf16_where_that_is_fast(monkeypatch):
    monkeypatch.setattr(calibration.onednn, "has_amx", lambda: False)
    monkeypatch.setattr(calibration.onednn, "has_bf16", lambda: True)
    monkeypatch.setattr(calibration.devices, "cpu_flags", lambda: ["avx512f"])
    assert calibration.beside_int8() == torch.float32
    monkeypatch.setattr(calibration.devices, "cpu_flags", lambda: ["avx512f", "avx512_bf16"])
    assert calibration.beside_int8() == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------ explain


def test_effects_are_those_of_each_convolution_by_itself():
    model, x = Forward(lambda x, a, b, c: c(F.relu(b(F.relu(a(x)))))).eval(), torch.randn(X)
    with torch.no_grad():
        model.b.weight[:, 0] *= 50  # one input channel has all of the range of the weights
        model.a.weight[0], model.a.bias[0] = 0, -1  # and is always 0
    effects = in_int8(model, x).scales().effects
    assert set(effects) == {"a", "b", "c"}
    assert effects["b"].sqnr_db < 20 and min(effects["a"].sqnr_db, effects["c"].sqnr_db) > 30


def test_a_sum_without_activation_is_signed_whatever_it_was():
    """Its positive values take 127 of the bytes and not 255, for the plan and for what is said of it."""
    for activation, is_signed in (("none", True), ("relu", False), (None, False)):
        assert quantized.kept_over(0.0, 127.0, torch.int8, activation).is_signed is is_signed
    model, x = Forward(lambda x, a, b, c: a(x)).eval(), torch.rand(X)
    with torch.no_grad():
        model.a.weight.abs_()
        model.a.bias.abs_()
    frozen = in_int8(model, x, calibrate=[x])
    (_, how), y = int8_regions(frozen, x)[0].fragment.scales, model(x)
    assert how.is_signed
    error = quantized.dequantize(quantized.quantize(y, how), how) - y
    most = 10 * math.log10(y.double().square().sum() / error.double().square().sum())
    assert frozen.scales().effects["a"].sqnr_db < most + 1


def test_what_bytes_cut_off_is_counted():
    conv = FloatConv(conv_problem(ConvOperands(torch.empty(1, 1, 2, 2), torch.ones(1, 1, 1, 1)), (1, 1), (0, 0), (1, 1),
                                  1, "none"), torch.ones(1, 1, 1, 1), None)  # fmt: skip
    x = torch.tensor([[[[0.0, 127.0], [-64.0, 1.0]]]])
    y, cut = conv.quantized(x, None, [Quantized(0.5, True), Quantized(1.0, True)])
    assert cut == 0.25 and y.flatten().tolist() == [0.0, 63.5, -64.0, 1.0]


def test_explain_says_how_and_why_not(rest):
    model, x = networks.small(BasicBlock), torch.randn(X)
    frozen = in_int8(model, x, keep=["layer1"])
    found = fused_resnet.explain(frozen, x, roofline=Roofline(1e10, 1e11))
    rows = {row.name: row for row in found.rows}
    (first, *_) = [region.fragment.scales for region in int8_regions(frozen, x)]
    assert rows["conv1"].problem.dtype == torch.int8
    assert rows["conv1"].scales == {"x": f"s8 {first[0].scale:.4g}", "out": f"u8 {first[1].scale:.4g}"}
    assert set(rows["layer2.0.downsample.0"].scales) == {"x", "residual", "out"}
    assert rows["layer1.0.conv1"].not_int8 == "keep asked for it" and rows["layer1.0.conv1"].scales is None
    effect = rows["layer2.0.conv2"].effect
    assert 25 < effect.sqnr_db < 60 and 0 <= effect.clipped < 0.01 and rows["layer1.0.conv1"].effect is None
    text = str(found)
    assert f"SQNR by itself {effect.sqnr_db:.1f} dB, {100 * effect.clipped:.2f} % clipped" in text
    assert [row["effect"] for row in found.as_dict()["rows"] if row["name"] == "layer2.0.conv2"] == [effect._asdict()]
    again = fused_resnet.explain(in_int8(model, x, calibrate=frozen.scales()), x, roofline=Roofline(1e10, 1e11))
    assert {row.name: row.effect for row in again.rows}["layer2.0.conv2"] == effect
    assert "not int8: layer1.0.conv1, layer1.0.conv2, " in text and ": keep asked for it" in text
    assert f"int8: conv1: x s8 {first[0].scale:.4g}, out u8" in text
