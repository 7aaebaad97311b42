"""Models that bring their scales, by FakeQuantize modules or by PT2E's quantize and dequantize nodes, in int8."""

import logging
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.ao import quantization
from torch.ao.nn import qat

import fused_resnet
from benchmarks import data
from fused_resnet.freezing.given_scales import Rounded, ranges_of
from fused_resnet.models import cifar
from fused_resnet.operators.quantized import Quantized
from fused_resnet.quantizing import Scales
from fused_resnet.regions import kernels
from tests.support import networks
from tests.support.quantized import by_reference, int8_regions
from tests.support.rounded import S8, U8, WEIGHTS, as_qdq, aware, by_our_recipe, seen

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min"),
]
RUNNING = [kernel for kernel in kernels.table() if kernel.dtype == torch.int8 and not kernel.why_not]
X = (2, 3, 16, 16)
_OPS = torch.ops.quantized_decomposed


class Block(nn.Module):
    """A stem, a residual block with a projection, and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.conv3, self.bn3 = nn.Conv2d(8, 12, 1, 2), nn.BatchNorm2d(12)
        self.relu1, self.relu2, self.fc = nn.ReLU(), nn.ReLU(), nn.Linear(12, 10)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)) + self.bn3(self.conv3(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def block():
    return networks.randomize(Block())


def rounded_weight(layer):
    """The bytes of a QAT layer's weight, and their scales."""
    fake, weight = layer.weight_fake_quant, layer.weight
    if hasattr(layer, "bn"):
        factor = layer.bn.weight / torch.sqrt(layer.bn.running_var + layer.bn.eps)
        weight = weight * factor.view(-1, 1, 1, 1)
    scale = fake.scale.expand(len(weight))
    steps = weight.detach() * (1 / scale).view(-1, *(1,) * (weight.dim() - 1))
    return steps.round().clamp(fake.quant_min, fake.quant_max).to(torch.int8), scale.double()


@pytest.fixture
def exact(monkeypatch):
    by_reference(monkeypatch)


# ------------------------------------------------------------------------------------------------ FakeQuantize modules


@pytest.mark.parametrize("backend", ("fbgemm", "qnnpack"))
def test_scales_and_weights_are_the_models(backend, exact):
    x = torch.randn(X)
    model = aware(block(), x, backend)
    frozen = fused_resnet.freeze(model, x, dtype=torch.int8)
    (region,) = int8_regions(frozen, x)
    assert [conv.name.removeprefix("fused_model_") for conv in region.convolutions] == ["conv1", "conv2", "conv3"]
    source, stem, projected, out, *_ = region.fragment.scales
    observed = [getattr(model, f"activation_post_process_{index}") for index in (1, 4)]
    assert [stem, out] == [Quantized(fake.scale.item(), False) for fake in observed]
    if backend == "fbgemm":  # of 7 bits, which fit s8 wherever their zero is
        assert source == Quantized(model.activation_post_process_0.scale.item(), True)
        assert projected == Quantized(model.activation_post_process_2.scale.item(), True)
        bounds = [(end.low, end.high) for end in list(region.epilogues.values())[:3]]
        assert bounds == [(0, 127), (-128, 127), (0, 127)]
    places = dict(zip((0, 1, 2, 5), (model.conv1, model.conv2, model.conv3, model.fc)))
    assert region.weights.keys() == places.keys()
    for place, layer in places.items():
        q, scales = rounded_weight(layer)
        assert torch.equal(region.weights[place].flatten(1), q.flatten(1)), place
        x_scale = region.fragment.scales[region.fragment.steps[place].x]
        if place < 3:
            wanted = x_scale.scale * scales / region.fragment.scales[1 + place].scale
            assert torch.equal(region.epilogues[place].multiplier, wanted.float())


@pytest.mark.parametrize("backend", ("fbgemm", "qnnpack"))
def test_answers_are_about_the_models(backend, exact):
    """A sum's first addend is rounded there, and not here. The rest is."""
    x = torch.randn(8, *X[1:])
    model = aware(block(), x, backend)
    found = fused_resnet.agreement(model, fused_resnet.freeze(model, x, dtype=torch.int8), [x])
    assert found.sqnr_db > 28


@pytest.mark.parametrize("form", (lambda model: model, as_qdq), ids=("modules", "nodes"))
def test_what_is_rounded_as_int8_does_is_the_same(form, exact, monkeypatch):
    """But for values beside a tie, which fp32 sums of another order decide otherwise."""
    monkeypatch.setattr("fused_resnet.freezing.calibration.beside_int8", lambda: torch.float32)
    x = torch.randn(8, *X[1:])
    model = form(by_our_recipe(block(), x, ["conv2"]))
    frozen = fused_resnet.freeze(model, x, dtype=torch.int8)
    assert fused_resnet.agreement(model, frozen, [x]).sqnr_db > 45
    (region,) = int8_regions(frozen, x)
    assert frozen.plan(x).meta["not_int8"] == {} and len(region.convolutions) == 3


def test_both_forms_are_one(exact):
    x = torch.randn(X)
    model = by_our_recipe(block(), x, ["conv2"])
    modules, nodes = (fused_resnet.freeze(form, x, dtype=torch.int8) for form in (model, as_qdq(model)))
    assert modules.scales() == nodes.scales()
    assert torch.equal(modules(x), nodes(x))


@pytest.mark.parametrize("kernel", RUNNING, ids=lambda kernel: kernel.name)
def test_all_kernels_give_the_same_bytes(kernel, monkeypatch):
    """With weights down to -128 and narrower limits, too."""
    monkeypatch.setattr("fused_resnet.freezing.calibration.beside_int8", lambda: torch.float32)
    fastest = kernels.fastest
    monkeypatch.setattr(kernels, "fastest", lambda dtype: kernel if dtype == torch.int8 else fastest(dtype))
    x, other = torch.randn(X), torch.randn(3, 3, 17, 14) * 3
    model = aware(block(), x)
    assert (rounded_weight(model.conv1)[0] == -128).any()
    frozen = fused_resnet.freeze(model, x, dtype=torch.int8)
    assert int8_regions(frozen, x)[0].micro_kernel == kernel.name
    answers = frozen(x), frozen(other)
    by_reference(monkeypatch)
    expected = fused_resnet.freeze(model, x, dtype=torch.int8)
    assert torch.equal(answers[0], expected(x)) and torch.equal(answers[1], expected(other))


def test_layers_of_eager_mode(exact):
    class Stubs(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant, self.net = quantization.QuantStub(), quantization.DeQuantStub(), block()
            self.net.conv1.bias, self.net.conv3, self.net.bn3 = nn.Parameter(torch.randn(8)), None, None

        def forward(self, x):
            net = self.net
            x = net.bn2(net.conv2(net.relu1(net.bn1(net.conv1(self.quant(x))))))
            return self.dequant(net.fc(torch.flatten(F.adaptive_avg_pool2d(net.relu2(x), 1), 1)))

    model, x = Stubs().train(), torch.randn(8, *X[1:])
    names = [["net.conv1", "net.bn1", "net.relu1"], ["net.conv2", "net.bn2", "net.relu2"]]
    quantization.fuse_modules_qat(model, names, inplace=True)
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    model = seen(quantization.prepare_qat(model), x)
    frozen = fused_resnet.freeze(model, x, dtype=torch.int8)
    (region,) = int8_regions(frozen, x)
    stem = model.net.conv1
    assert torch.equal(region.weights[0], rounded_weight(stem)[0])
    assert region.fragment.scales[:2] == (
        Quantized(model.quant.activation_post_process.scale.item(), True),
        Quantized(stem.activation_post_process.scale.item(), False),
    )
    assert {"x", "net_conv1", "net_conv2"} <= frozen.scales().ranges.keys()
    assert fused_resnet.agreement(model, frozen, [x]).sqnr_db > 28


def test_a_norm_behind_a_rounded_weight_is_folded_into_its_scales(exact):
    x, model = torch.randn(X), nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    networks.randomize(model)
    with torch.no_grad():
        model[1].weight[:2] = torch.tensor([-0.5, 0.0])
    model[0].qconfig = quantization.QConfig(activation=U8, weight=WEIGHTS)
    model[0] = qat.Conv2d.from_float(model[0])
    model = seen(nn.Sequential(S8(), model, U8()), x)
    (region,) = int8_regions(frozen := fused_resnet.freeze(model, x, dtype=torch.int8), x)
    q = rounded_weight(model[1][0])[0]
    q[1] = 0
    assert torch.equal(region.weights[0], q)
    assert fused_resnet.agreement(lambda x: model(x).flatten(1), lambda x: frozen(x).flatten(1), [x]).sqnr_db > 40


def torchaos(model, x):
    """A model quantized by torchao as it does for x86."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    prepared = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(torch.export.export(model, (x,)).module(), prepared)
    with torch.no_grad():
        prepared(x)
    return pt2e.convert_pt2e(prepared)


def test_torchaos_own_graphs(exact, caplog):
    x, model = torch.randn(8, *X[1:]), block()
    converted = torchaos(model, x)
    frozen = fused_resnet.freeze(converted, x, dtype=torch.int8)
    reasons = {"conv2 is not rounded in the model, nor calibrated"}  # it is added to another convolution's result
    assert set(frozen.plan(x).meta["not_int8"].values()) == reasons
    calibrated = fused_resnet.freeze(converted, x, dtype=torch.int8, calibrate=[x])
    (region,) = int8_regions(calibrated, x)
    held = dict(converted.named_buffers())
    weights = {tuple(q.shape): q for name, q in held.items() if name.startswith("_frozen_param")}
    assert len(region.weights) == len(weights) == 4 and calibrated.plan(x).meta["not_int8"] == {}
    for q in region.weights.values():
        known = weights.get(tuple(q.shape), weights.get(tuple(q.shape[:2])))
        assert torch.equal(q.flatten(1), known.flatten(1))
    assert {"x", "conv1", "conv3"} <= frozen.scales().ranges.keys()
    assert "x has zero point" in caplog.text
    assert fused_resnet.agreement(converted, frozen, [x]).sqnr_db > 35


def test_resnet20_on_the_sample(monkeypatch):
    if kernels.why_none(torch.int8) is not None:
        by_reference(monkeypatch)
    images, labels = data.load_cifar10_sample()
    inputs = data.normalize(images)
    calibrating, inputs, labels = inputs[1::32], inputs[::4], labels[::4]
    model = cifar.resnet20(weights=data.RESNET20_WEIGHTS).eval()
    rounded = by_our_recipe(model, calibrating)
    frozen, nodes = (fused_resnet.freeze(form, inputs, dtype=torch.int8) for form in (rounded, as_qdq(rounded)))
    (region,) = int8_regions(frozen, inputs)
    assert len(region.convolutions) == 19
    found = fused_resnet.agreement(rounded, frozen, [(inputs, labels)])
    assert found.changed <= 1 and found.sqnr_db >= 35, found
    assert nodes.scales() == frozen.scales() and torch.equal(nodes(inputs), frozen(inputs))


@pytest.mark.full
@pytest.mark.parametrize("backend", ("fbgemm", "qnnpack"))
def test_resnet20_of_torch_aos_recipes(backend, monkeypatch):
    """They round each convolution before it is added, which int8 does not: it is nearer to the float model."""
    if kernels.why_none(torch.int8) is not None:
        by_reference(monkeypatch)
    images, labels = data.load_cifar10_sample()
    inputs = data.normalize(images)
    calibrating, counted = inputs[1::32], list(zip(inputs.split(125), labels.split(125)))
    model = cifar.resnet20(weights=data.RESNET20_WEIGHTS).eval()
    rounded = aware(model, calibrating, backend)
    frozen = fused_resnet.freeze(rounded, inputs[:125], dtype=torch.int8)
    found, own = (fused_resnet.agreement(one, frozen, counted) for one in (rounded, model))
    assert found.changed <= 8 and found.sqnr_db >= 24, found
    assert own.sqnr_db > fused_resnet.agreement(model, rounded, counted).sqnr_db


# ------------------------------------------------------------------------------------------------------- scales, files


def test_scales_serve_the_float_model(tmp_path, exact):
    """Whose tensors have the same names. Its weights get scales of their own."""
    x, model = torch.randn(X), block()
    given = fused_resnet.freeze(aware(model, x, "qnnpack"), x, dtype=torch.int8)
    assert given.scales().weights is None and given.scales().images == 0
    path = given.scales().save(tmp_path / "scales.json")
    assert Scales.load(path) == given.scales()
    loaded = fused_resnet.freeze(model, x, dtype=torch.int8, calibrate=path)
    assert loaded.scales() == given.scales()
    (region,), (wanted,) = int8_regions(loaded, x), int8_regions(given, x)
    assert region.fragment.scales == wanted.fragment.scales and None not in region.fragment.scales[:4]
    with pytest.raises(ValueError, match=r"of x, conv1, conv2, conv3 and the like, .* convolutions are 0"):
        fused_resnet.freeze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), x, dtype=torch.int8, calibrate=path)


def test_what_the_model_does_not_round_is_calibrated(exact):
    """Else it stays in floats, and explain says why."""
    x = torch.randn(X)
    model = by_our_recipe(block(), x)  # conv2's result is rounded with the sum alone
    frozen = fused_resnet.freeze(model, x, dtype=torch.int8)
    assert frozen.plan(x).meta["not_int8"] == {
        "fused_model_1_conv2": "1_conv2 is not rounded in the model, nor calibrated",
        "fused_model_1_conv3": "1_conv2 is not rounded in the model, nor calibrated",
    }
    calibrated = fused_resnet.freeze(model, x, dtype=torch.int8, calibrate=[x], keep=1)
    assert len(calibrated.plan(x).meta["not_int8"]) == 1
    calibrated = fused_resnet.freeze(model, x, dtype=torch.int8, calibrate=[x])
    assert calibrated.plan(x).meta["not_int8"] == {}
    ranges, given = calibrated.scales().ranges, frozen.scales().ranges
    assert given.items() <= ranges.items() and "1_conv2" in ranges.keys() - given.keys()
    assert calibrated.scales().effects.keys() == {"1_conv1", "1_conv2", "1_conv3"}


CASES = {  # rounded, activation: range, the largest byte of u8
    "u8": (Rounded(0.5, 0, 0, 255), "relu", (0, 127.5), 255),
    "u8 of 7 bits": (Rounded(0.5, 0, 0, 127), "relu", (0, 127.5), 127),
    "u8 as s8": (Rounded(0.5, -128, -128, 127), "relu", (0, 127.5), 255),
    "s8 after ReLU": (Rounded(0.5, 0, -128, 127), "relu", (0, 127.5), 127),
    "s8": (Rounded(0.5, 0, -128, 127), "none", (-63.5, 63.5), None),
    "s8 as u8": (Rounded(0.5, 128, 0, 255), "none", (-63.5, 63.5), None),
    "4 bits": (Rounded(0.5, 8, 0, 15), None, (-63.5, 63.5), None),
    "7 bits around 72": (Rounded(0.5, 72, 0, 127), None, (-63.5, 63.5), None),
    "around 146": (Rounded(0.5, 146, 0, 255), None, (-73, 54.5), None),
}


@pytest.mark.parametrize("name", CASES)
def test_ranges(name, caplog):
    rounded, activation, wanted, largest = CASES[name]
    with caplog.at_level(logging.WARNING, "fused_resnet"):
        given = ranges_of({"x": (rounded,)}, {} if activation is None else {"x": activation})
    assert given.ranges == {"x": wanted} and given.limits == ({} if largest is None else {"x": largest})
    assert ("steps 1.15 times as long" in caplog.text) == (name == "around 146")


def test_a_value_that_is_cut_off_at_0_is_rectified(exact):
    """A convolution whose bytes begin at 0 has a ReLU in them."""
    x, conv = torch.randn(X), nn.Conv2d(3, 8, 3)
    model = seen(nn.Sequential(S8(), conv, U8()), x)
    model[2].zero_point.fill_(0)
    frozen = fused_resnet.freeze(model, x, dtype=torch.int8)
    (region,) = int8_regions(frozen, x)
    assert region.fragment.steps[0].problem.activation == "relu"
    assert region.fragment.scales[1] == Quantized(model[2].scale.item(), False)
    assert (frozen(x) >= 0).all() and (frozen(x) - model(x)).abs().max() < 0.1


def test_what_is_rounded_in_two_ways_stays_in_floats(exact):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.x, self.y, self.z = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), S8(), S8(), U8()

        def forward(self, x):
            return torch.cat([self.z(F.relu(self.a(self.x(x)))), self.z(F.relu(self.b(self.y(x))))], 1)

    x = torch.randn(X)
    model = seen(Twice(), x)
    assert fused_resnet.freeze(model, x, dtype=torch.int8).plan(x).meta["not_int8"] == {}
    model.y.scale.mul_(2)
    frozen = fused_resnet.freeze(model, x, dtype=torch.int8)
    reasons = set(frozen.plan(x).meta["not_int8"].values())
    assert len(reasons) == 1 and "x is rounded in two ways: scale" in reasons.pop()


def test_a_pickled_model_keeps_the_bytes(exact):
    x = torch.randn(X)
    frozen = fused_resnet.freeze(by_our_recipe(block(), x, ["conv2"]), x, dtype=torch.int8)
    again = pickle.loads(pickle.dumps(frozen))
    assert torch.equal(again(x), frozen(x)) and again.scales() == frozen.scales()


# ------------------------------------------------------------------------------------------------------ what is refused


def sequential(**options):
    """A convolution between two roundings, of which the first is made with these options."""
    fake = quantization.FakeQuantize(quantization.MinMaxObserver, **options)
    return nn.Sequential(fake, nn.Conv2d(3, 8, 3), nn.ReLU(), U8())


BAD = {
    "unseen": (lambda model, x: model.eval(), "rounds with a scale of nan, .*Run the model over 16 or more"),
    "zero": (lambda model, x: seen(model, x)[0].scale.fill_(0), "rounds with a scale of 0.0, not with a positive one"),
    "far": (
        lambda model, x: seen(model, x)[0].zero_point.fill_(300),
        "zero point 300, 0 to 255. int8 takes at most 256 values, a zero point among them",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_activations_are_refused(name):
    change, message = BAD[name]
    model, x = sequential(quant_min=0, quant_max=255, dtype=torch.quint8), torch.randn(X)
    change(model, x)
    with pytest.raises(ValueError, match=message):
        fused_resnet.freeze(model.eval(), x, dtype=torch.int8)


def test_16_bits_are_refused():
    model, x = sequential(quant_min=-32768, quant_max=32767, dtype=torch.qint32), torch.randn(X)
    with pytest.raises(ValueError, match="-32768 to 32767. int8 takes at most 256 values.*Quantize to 8 bits"):
        fused_resnet.freeze(seen(model, x), x, dtype=torch.int8)


def graph_of(*operands):
    """An exported convolution whose weight is dequantized from these operands."""
    graph, held = fx.Graph(), {}
    x = graph.placeholder("x")
    for index, operand in enumerate(operands):
        if isinstance(operand, torch.Tensor):
            held[f"p{index}"] = operand
    args = [graph.get_attr(f"p{i}") if isinstance(o, torch.Tensor) else o for i, o in enumerate(operands)]
    weight = graph.call_function(_OPS.dequantize_per_channel.default, tuple(args))
    for op in (_OPS.quantize_per_tensor.default, _OPS.dequantize_per_tensor.default):
        x = graph.call_function(op, (x, 0.02, 0, -128, 127, torch.int8))
    graph.output(graph.call_function(torch.ops.aten.conv2d.default, (x, weight)))
    return fx.GraphModule(held, graph).eval()


@pytest.mark.parametrize(
    "weight, operands, message",
    (
        (torch.int8, (torch.ones(3), torch.zeros(3), 1, -128, 127, torch.int8), "3 scales along dimension 1"),
        (torch.int8, (-torch.ones(8), torch.zeros(8), 0, -128, 127, torch.int8), "rounds with a scale of -1.0"),
    ),
)
def test_bad_weights_are_refused(weight, operands, message):
    q = torch.arange(8 * 3 * 9).remainder(256).view(8, 3, 3, 3).to(weight)
    with pytest.raises(ValueError, match=message):
        fused_resnet.freeze(graph_of(q, *operands), torch.randn(X), dtype=torch.int8)


def test_a_weight_beyond_s8_stays_in_floats(exact, monkeypatch):
    """As of a channel without negative weights, to which torch's symmetric recipe gives a zero point."""
    monkeypatch.setattr("fused_resnet.freezing.calibration.beside_int8", lambda: torch.float32)
    q = torch.arange(8 * 3 * 9).view(8, 3, 3, 3).to(torch.uint8)
    model, x = graph_of(q, torch.ones(8) / 99, torch.zeros(8), 0, 0, 255, torch.uint8), torch.randn(X).clamp(-2, 2)
    frozen = fused_resnet.freeze(model, x, dtype=torch.int8, calibrate=[x])
    reason = "the model rounds its weight to 0 to 215 around zero points, beyond s8"
    assert set(frozen.plan(x).meta["not_int8"].values()) == {reason}
    assert fused_resnet.agreement(lambda x: model(x).flatten(1), lambda x: frozen(x).flatten(1), [x]).sqnr_db > 35


def test_dynamic_quantization_is_refused():
    graph, ops = fx.Graph(), _OPS
    x = graph.placeholder("x")
    limits = (0, 255, 1e-9, torch.uint8)
    params = graph.call_function(ops.choose_qparams.tensor, (x, *limits))
    scale, zero_point = (graph.call_function(operator.getitem, (params, index)) for index in (0, 1))
    for op in (ops.quantize_per_tensor.tensor, ops.dequantize_per_tensor.tensor):
        x = graph.call_function(op, (x, scale, zero_point, 0, 255, torch.uint8))
    graph.output(graph.call_module("conv", (x,)))
    model = fx.GraphModule({"conv": nn.Conv2d(3, 8, 3)}, graph).eval()
    with pytest.raises(ValueError, match="getitem.* in each call, which is dynamic quantization. int8 takes static"):
        fused_resnet.freeze(model, torch.randn(X), dtype=torch.int8)


def test_models_that_round_nothing_of_use_need_images():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), U8()), torch.randn(X)
    with pytest.raises(ValueError, match="the model rounds nothing that int8 keeps.*needs calibrate"):
        fused_resnet.freeze(seen(model, x), x, dtype=torch.int8)
    with pytest.raises(ValueError, match="needs calibrate"):
        fused_resnet.freeze(nn.Conv2d(3, 8, 3).eval(), x, dtype=torch.int8)
