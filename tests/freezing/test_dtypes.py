"""freeze computes in the model's dtypes, or in another as autocast would, and says nothing beside its errors."""

import logging
import random
import threading
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import fused_resnet
from fused_resnet import backends, models
from fused_resnet.choosing import pieces
from fused_resnet.freezing.modules import FrozenConv
from tests.support import networks

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float64, torch.float32, *HALVES)
X = (2, 4, 8, 8)


class Steps(nn.Module):
    """A forward given as a function of (self, x), over modules of every kind that computes products or norms."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.conv, self.bn = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.pointwise = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.depthwise, self.up = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ConvTranspose2d(8, 8, 2, 2)
        self.conv1d, self.fc, self.embedding = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 5), nn.Embedding(10, 8)
        self.ln, self.gn, self.lrn = nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.LocalResponseNorm(3)
        self.prelu = nn.PReLU(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.gamma, self.filter = nn.Parameter(torch.randn(8, 1, 1)), nn.Parameter(0.3 * torch.randn(8, 8, 1, 1))
        self.vector, self.matrix = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(0.3 * torch.randn(8, 8))
        for name, value in (("mean", torch.rand(1, 4, 1, 1)), ("std", torch.rand(1, 4, 1, 1) + 0.5),
                            ("running_mean", torch.rand(8)), ("running_var", torch.rand(8) + 0.5)):  # fmt: skip
            self.register_buffer(name, value)
        networks.randomize(self)

    def forward(self, x):
        return self.function(self, x)


def tokens(y):
    return y.flatten(2).transpose(1, 2)


def standardized(w):
    return (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)


def grid(size):
    line = torch.linspace(-1, 1, 6)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).expand(size, 6, 6, 2)


def added_into(m, x):
    total = m.gamma.repeat(x.size(0), 1, 8, 8)
    total.add_(m.conv(x))
    return m.conv2(total)


fp32 = torch.float32

STEPS = {
    # explicit casts before products
    "iresnet": lambda m, x: m.fc(m.conv(x).mean((2, 3)).float()),
    "float, conv": lambda m, x: m.conv2(m.conv(x).float()),
    "float, grouped conv": lambda m, x: m.depthwise(m.conv(x).float()),
    "float, 1x1": lambda m, x: m.pointwise(m.conv(x).float()),
    "float, transposed": lambda m, x: m.conv2(m.up(m.conv(x).float())),
    "float, conv1d": lambda m, x: m.conv1d(m.conv(x).flatten(2).float()),
    "float, linear on tokens": lambda m, x: m.fc(tokens(m.conv(x)).float()),
    "to": lambda m, x: m.conv2(m.conv(x).to(fp32)),
    "to, keyword": lambda m, x: m.conv2(m.conv(x).to(dtype=fp32)),
    "type": lambda m, x: m.conv2(m.conv(x).type(fp32)),
    "double": lambda m, x: m.conv(x).double().mean((2, 3)),
    "double and back": lambda m, x: m.conv2((m.conv(x).double() * 2).float()),
    "half": lambda m, x: m.conv2(m.conv(x).half().float()),
    "to another's dtype": lambda m, x: m.conv2(m.conv(x).float().to(m.pointwise(m.conv(x)).dtype)),
    "to another": lambda m, x: m.conv2(m.conv(x).float().to(m.pointwise(m.conv(x)))),
    "type_as": lambda m, x: m.conv2(m.conv(x).float().type_as(x)),
    "to a weight's dtype": lambda m, x: m.conv2(m.conv(x).to(m.conv2.weight.dtype)),
    "to a weight": lambda m, x: m.conv2(m.conv(x).to(m.gamma)),
    # casts inside of what would be fused
    "residual": lambda m, x: F.relu(m.conv2(m.conv(x)) + m.conv(x).float()),
    "float, add": lambda m, x: F.relu(m.bn(m.conv(x)).float() + m.pointwise(m.conv(x))),
    "float, bn": lambda m, x: F.relu(m.bn(m.conv(x).float())),
    "float, relu": lambda m, x: F.relu(m.bn(m.conv(x)).float()),
    "two floats": lambda m, x: m.conv2(F.relu(m.conv(x).float() + m.conv(x).float())),
    "in place": lambda m, x: m.conv2(m.conv(x).add_(m.conv(x).float())),
    "into float": lambda m, x: m.conv2(m.conv(x).float().add_(m.conv(x))),
    "into a weight's": added_into,
    # functions with a dtype, and those without 16 bits
    "softmax": lambda m, x: m.conv2(m.conv(x).softmax(1, dtype=fp32)),
    "F.softmax": lambda m, x: F.softmax(m.fc(m.conv(x).mean((2, 3))), dim=1, dtype=fp32),
    "cumsum": lambda m, x: m.conv2(m.conv(x).cumsum(2, dtype=fp32) * 0.1),
    "interpolate": lambda m, x: m.conv2(F.interpolate(m.conv(x).float(), scale_factor=2, mode="bilinear")),
    "quantile": lambda m, x: m.conv(x) - m.conv(x).flatten(1).quantile(0.5, dim=1).view(-1, 1, 1, 1),
    "fft": lambda m, x: m.conv2(torch.fft.irfft2(torch.fft.rfft2(m.conv(x)), s=(8, 8))),
    "complex": lambda m, x: m.conv2(torch.complex(m.conv(x), m.conv(x)).abs()),
    "lrn": lambda m, x: m.conv2(m.lrn(m.conv(x))),
    "normalize": lambda m, x: F.normalize(m.fc(m.conv(x).mean((2, 3))).float()),
    "comparison": lambda m, x: m.conv2(m.conv(x) * (m.conv(x).float() > 0)),
    "masked_fill": lambda m, x: m.conv2(m.conv(x).float().masked_fill(m.conv(x) < 0, 0.0)),
    # constants
    "linspace": lambda m, x: m.conv2(m.conv(x) * torch.linspace(0, 1, 8).view(8, 1, 1)),
    "a number": lambda m, x: m.conv2(m.conv(x) * torch.tensor(0.5)),
    "a vector of one": lambda m, x: m.conv2(m.conv(x) * torch.tensor([0.5], dtype=fp32)),
    "arange": lambda m, x: m.conv2(m.conv(x) + torch.arange(x.size(3), dtype=fp32) * 0.1),
    "zeros": lambda m, x: m.conv2(torch.cat([m.conv(x)[:, :4], torch.zeros(x.size(0), 4, 8, 8, dtype=fp32)], 1)),
    "new_zeros": lambda m, x: m.conv2(torch.cat([m.conv(x)[:, :4], x.new_zeros(x.size(0), 4, 8, 8)], 1)),
    "grid": lambda m, x: F.grid_sample(m.conv(x), grid(2), align_corners=False),
    # the model's own weights and buffers
    "normalisation": lambda m, x: m.conv((x - m.mean) / m.std),
    "normalisation, float": lambda m, x: m.conv((x.float() - m.mean) / m.std),
    "gamma": lambda m, x: m.conv2(m.conv(x) * m.gamma),
    "gamma, float": lambda m, x: m.conv2(m.conv(x) * m.gamma.float()),
    "where": lambda m, x: m.conv2(torch.where(m.conv(x) > 0, m.conv(x), m.gamma)),
    "embedding": lambda m, x: m.fc(m.embedding(torch.arange(x.size(0))) + m.conv(x).mean((2, 3))),
    "frozen bn": lambda m, x: m.conv2(m.conv(x) * (m.running_var + 1e-5).rsqrt().mul(m.vector).view(1, -1, 1, 1)),
    "frozen bn of buffers": lambda m, x: m.conv2(m.conv(x) * (m.running_var + 1e-5).rsqrt().view(1, -1, 1, 1)),
    "layer norm": lambda m, x: m.fc(m.ln(tokens(m.conv(x)).float())),
    "layer norms": lambda m, x: m.fc(m.ln(m.ln(tokens(m.conv(x)).float()).type_as(m.conv(x)))),
    "F.layer_norm": lambda m, x: m.fc(F.layer_norm(tokens(m.conv(x)).float(), (8,), m.vector, m.running_mean)),
    "F.layer_norm, floats": lambda m, x: F.layer_norm(tokens(m.conv(x)).float(), (8,), m.vector.float()).type_as(x),
    "group norm": lambda m, x: m.conv2(m.gn(m.conv(x).float())),
    "convnext": lambda m, x: m.conv(x) + m.gamma * m.ln(m.depthwise(m.conv(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "prelu": lambda m, x: m.conv2(m.prelu(m.conv(x).float())),
    "F.prelu": lambda m, x: m.conv2(F.prelu(m.conv(x).float(), m.vector)),
    "F.batch_norm": lambda m, x: m.conv2(F.batch_norm(m.conv(x), m.running_mean, m.running_var, m.vector)),
    "relu, F.batch_norm": lambda m, x: m.conv2(
        F.batch_norm(torch.relu(m.conv(x)), m.running_mean, m.running_var, m.vector)
    ),
    "F.batch_norm, float": lambda m, x: F.batch_norm(m.conv(x).float(), m.running_mean, m.running_var, m.vector),
    # products that are no modules, and modules that are more
    "F.conv2d": lambda m, x: F.conv2d(m.conv(x).float(), m.filter),
    "F.conv2d, float filter": lambda m, x: F.conv2d(m.conv(x), m.filter.float()),
    "F.conv2d, standardized": lambda m, x: F.conv2d(m.conv(x), standardized(m.filter)),
    "F.linear": lambda m, x: F.linear(tokens(m.conv(x)).float(), m.matrix, m.vector),
    "matmul": lambda m, x: torch.matmul(tokens(m.conv(x)).float(), m.matrix),
    "@": lambda m, x: tokens(m.conv(x)).float() @ m.matrix,
    "bmm": lambda m, x: torch.bmm(tokens(m.conv(x)).float(), m.conv(x).flatten(2)).softmax(-1),
    "baddbmm": lambda m, x: torch.baddbmm(m.conv(x).flatten(2).float(), m.matrix.expand(2, 8, 8), m.conv(x).flatten(2)),
    "addmm": lambda m, x: torch.addmm(m.vector, m.conv(x).mean((2, 3)).float(), m.matrix),
    "einsum": lambda m, x: torch.einsum("nchw,cd->ndhw", m.conv(x).float(), m.matrix),
    "sdpa": lambda m, x: F.scaled_dot_product_attention(tokens(m.conv(x)).float(), *[tokens(m.conv(x))] * 2),
    "attention": lambda m, x: m.attention(tokens(m.conv(x)).float(), tokens(m.conv(x)), tokens(m.conv(x)))[0],
    "transformer": lambda m, x: m.fc(m.layer(tokens(m.conv(x)).float())),
    "lstm": lambda m, x: m.fc(m.lstm(tokens(m.conv(x)).float())[0]),
    # what is returned
    "outputs": lambda m, x: {
        "own": m.conv(x), "float": m.conv(x).float(), "half": m.conv(x).half(), "bfloat16": m.conv(x).bfloat16(),
        "double": m.conv(x).double(), "int": m.conv(x).argmax(1), "gamma": m.gamma, "text": "x",
    },
}  # fmt: skip


NOT_UNDER_AUTOCAST = {("lstm", torch.float16), ("complex", torch.bfloat16), ("complex", torch.float16)}  # on CPUs
if backends.onednn_missing(torch.bfloat16):
    NOT_UNDER_AUTOCAST.add(("lstm", torch.bfloat16))


def tensors(value):
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@pytest.mark.filterwarnings("ignore:Default")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_explicit_steps_are_as_under_autocast(name, dtype):
    """As near to fp32 as the plain model is under autocast, and of its dtypes."""
    model, x = Steps(STEPS[name]).eval(), torch.randn(X)
    is_half = dtype in HALVES
    with torch.no_grad():
        exact = tensors(model(x))  # of fp64, which an explicit cast keeps it from, it is 1e-6 away
        with torch.autocast("cpu", dtype, enabled=is_half and (name, dtype) not in NOT_UNDER_AUTOCAST):
            reference = tensors(model(x))
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    for actual, expected, near in zip(tensors(frozen(x)), exact, reference, strict=True):
        assert actual.dtype == expected.dtype
        if actual.is_floating_point():
            limit = 4 * max(networks.error(near, expected.double()), torch.finfo(dtype).eps) if is_half else 1e-5
            limit = max(limit, torch.finfo(actual.dtype).eps)
            assert networks.error(actual, expected.double()) < limit


def in_plan(function, dtype, **options):
    """What a plan of separate nodes computes: {name of the node: its dtype}, and its convolutions."""
    model, x = Steps(function).eval(), torch.randn(X)
    with mock.patch.object(pieces, "_BY_RULE", ()):
        plan = fused_resnet.freeze(model, x, dtype=dtype, **options).plan(x)
    dtypes = {node.name: node.meta["facts"].dtype for node in plan.graph.nodes if node.meta.get("facts")}
    return dtypes, [module.problem for module in plan.modules() if isinstance(module, FrozenConv)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("step, node, expected", [
    ("softmax", "softmax", fp32), ("cumsum", "cumsum", fp32), ("two floats", "relu", fp32), ("linspace", "mul", fp32),
    ("interpolate", "interpolate", fp32), ("layer norm", "model_ln", fp32), ("group norm", "model_gn", fp32),
    ("F.layer_norm", "layer_norm", fp32), ("prelu", "model_prelu", fp32), ("F.prelu", "prelu", fp32),
    ("residual", "add", fp32), ("into float", "add_", fp32), ("quantile", "quantile", fp32),
    ("grid", "grid_sample", fp32), ("double and back", "mul", torch.float64), ("gamma, float", "mul", fp32),
    ("normalisation, float", "truediv", fp32), ("lrn", "model_lrn", fp32), ("F.batch_norm, float", "batch_norm", fp32),
    # what the model's own weights meet keeps the plan's dtype, as do numbers, and products take nothing else
    ("gamma", "mul", None), ("a number", "mul", None), ("where", "where", None), ("convnext", "mul", None),
    ("normalisation", "truediv", None), ("frozen bn of buffers", "mul", None),
    ("relu, F.batch_norm", "batch_norm", None),
    ("to a weight", "to", None), ("to a weight's dtype", "to", None), ("in place", "add_", None),
    ("F.conv2d", "fused_model", None), ("F.linear", "model", None), ("matmul", "matmul", None), ("@", "matmul", None),
    ("bmm", "bmm", None), ("baddbmm", "baddbmm", None), ("einsum", "einsum", None), ("lstm", "getitem", None),
    ("sdpa", "scaled_dot_product_attention", None), ("attention", "getitem", None),
    ("float, conv1d", "model_conv1d", None), ("frozen bn", "mul_1", None),
])  # fmt: skip
def test_the_dtype_of_each_step(step, node, expected, dtype):
    dtypes, convolutions = in_plan(STEPS[step], dtype)
    assert dtypes[node] == (expected or dtype)
    assert convolutions and {problem.dtype for problem in convolutions} == {dtype}


@pytest.mark.parametrize("step, fused", [
    ("residual", (False, "none")), ("float, add", (False, "none")), ("float, relu", (False, "none")),
    ("float, bn", (False, "none")), ("gamma", (False, "none")),
])  # fmt: skip
def test_no_match_crosses_a_cast(step, fused):
    _, convolutions = in_plan(STEPS[step], torch.bfloat16)
    assert {(problem.has_residual, problem.activation) for problem in convolutions} == {fused}


@pytest.mark.parametrize("dtype", (None, torch.bfloat16))
def test_functional_batch_norm_folds_in_every_dtype(dtype):
    dtypes, convolutions = in_plan(STEPS["F.batch_norm"], dtype)
    assert "batch_norm" not in dtypes and {problem.has_bias for problem in convolutions} == {True}


def test_without_explicit_steps_nothing_is_cast():
    """As `model.to(dtype)`: casts would be passes over memory."""
    model, x = models.resnet18(num_classes=10).eval(), torch.randn(1, 3, 32, 32)
    plan = fused_resnet.freeze(model, x, dtype=torch.bfloat16).plan(x)
    assert not [node for node in plan.graph.nodes if node.target == "to"]


def test_weights_in_an_fp32_step_are_not_rounded():
    model, x = Steps(lambda m, x: m.conv(x).float() * 0 + m.vector.view(8, 1, 1)).eval(), torch.randn(X)
    frozen = fused_resnet.freeze(model, x, dtype=torch.bfloat16)
    assert torch.equal(frozen(x)[0, :, 0, 0], model.vector)


@pytest.mark.parametrize("other", (torch.float64, *HALVES, torch.complex64, torch.int64, torch.bool))
@pytest.mark.parametrize("dtype", (None, *FLOATS), ids=str)
def test_what_is_of_another_dtype_than_the_model_stays_in_it(other, dtype):
    model, x = Steps(lambda m, x: F.relu(m.bn(m.conv(x))) * m.temperature).eval(), torch.randn(X)
    value = (torch.rand(1, dtype=torch.float64) + 1) * 3
    model.temperature = nn.Parameter(value.to(other), requires_grad=False)
    frozen, expected = fused_resnet.freeze(model, x, dtype=dtype), model(x)
    assert frozen(x).dtype == expected.dtype
    wide = torch.complex128 if other.is_complex else torch.float64
    torch.testing.assert_close(frozen(x).to(wide), expected.to(wide).detach(), rtol=0.03, atol=0.03)
    kept = [buffer for buffer in frozen.plan(x).state_dict().values() if buffer.shape == (1,)]
    assert [value.dtype for value in kept] == [other] and torch.equal(kept[0], model.temperature)


# ------------------------------------------------------------------------------------------------------ random modules

PARAMETERS = (*FLOATS, torch.int64, torch.int8, torch.bool, torch.complex64)
KINDS = (
    "conv", "conv-bn", "conv-bn-relu", "residual", "grouped", "cast conv", "cast back", "scale", "shift", "number",
    "buffer", "pool", "prelu", "norm", "layer norm", "tied", "concatenate", "float", "half", "mixed sum", "iadd",
)  # fmt: skip


class Mixed(nn.Module):
    """A few steps over parameters, buffers, convolutions and norms of random dtypes, most of them in `main`."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        self.main = draw.choice((torch.float32,) * 4 + FLOATS)
        self.casts_input = draw.random() < 0.3
        self.conv, self.inner, self.steps = nn.Conv2d(3, 4, 3, padding=1).to(self.main), nn.ModuleDict(), []
        for index in range(draw.randint(1, 4)):
            kind, other, dtype = draw.choice(KINDS), draw.choice(FLOATS), draw.choice(PARAMETERS)
            name = f"{kind.replace(' ', '_')}_{index}"
            self.steps.append((kind, name, other))
            if kind in ("conv", "conv-bn", "conv-bn-relu", "residual", "grouped", "cast conv"):
                groups, bias = 2 if kind == "grouped" else 1, draw.random() < 0.5
                conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=bias)
                self.inner[name] = conv.to(other if kind == "cast conv" else self.main)
                self.inner[f"{name}_bn"] = nn.BatchNorm2d(4).to(draw.choice((self.main, torch.float32, other)))
            elif kind in ("prelu", "norm", "layer norm"):
                module = {"prelu": nn.PReLU(4), "norm": nn.BatchNorm2d(4), "layer norm": nn.LayerNorm(6)}[kind]
                self.inner[name] = module.to(draw.choice((self.main, torch.float32)))
            elif kind in ("scale", "shift", "number", "buffer"):
                value = torch.rand({"shift": (1,), "number": ()}.get(kind, (4, 1, 1))) * 3 + 1
                value = value > 2 if dtype == torch.bool else value.to(dtype)
                if kind == "buffer":
                    self.register_buffer(name, value)
                else:
                    self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        networks.randomize(self)

    def forward(self, x):
        y = self.conv(x.to(self.main) if self.casts_input else x)
        for kind, name, other in self.steps:
            y = self._step(kind, name, other, y)
        return y

    def _step(self, kind, name, other, y):
        if kind in ("conv", "grouped"):
            return self.inner[name](y)
        if kind == "conv-bn":
            return self.inner[f"{name}_bn"](self.inner[name](y))
        if kind == "conv-bn-relu":
            return F.relu(self.inner[f"{name}_bn"](self.inner[name](y)))
        if kind == "residual":
            return F.relu(self.inner[f"{name}_bn"](self.inner[name](y)) + y)
        if kind == "cast conv":
            return self.inner[name](y.to(other))
        if kind == "cast back":
            return y.to(self.main)
        if kind in ("scale", "number", "buffer"):
            return y * getattr(self, name)
        if kind == "shift":
            return y + getattr(self, name)
        if kind == "pool":
            return F.max_pool2d(y, 3, 1, 1)
        if kind in ("prelu", "norm", "layer norm"):
            return self.inner[name](y)
        if kind == "tied":
            return F.conv2d(y.float(), self.conv.weight[:, :1].repeat(1, 4, 1, 1).float(), padding=1)
        if kind == "concatenate":
            return torch.cat([y, y], 1)[:, 2:6]
        if kind in ("float", "half"):
            return getattr(y, kind)()
        if kind == "mixed sum":
            return y + y.float()
        assert kind == "iadd"
        out = y.clone()
        out += y.float()
        return out


def outcome(model, x):
    try:
        with torch.no_grad():
            return model(x)
    except Exception as error:
        return error


def as_frozen(model):
    return lambda x: fused_resnet.freeze(model, x)(x)


def compare(model, expected, actual, coarsest):
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype, model.steps)
    kind = torch.complex128 if expected.is_complex() else torch.float64
    difference = (actual.to(kind) - expected.to(kind)).abs().square().mean().sqrt()
    limit = 1e-5 if coarsest.itemsize > 2 else 10 * torch.finfo(coarsest).eps
    assert difference <= limit * expected.to(kind).abs().square().mean().sqrt(), model.steps


def coarsest(model, *more):
    dtypes = {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}
    dtypes |= {other for kind, _, other in model.steps if kind == "cast conv"} | set(more)
    dtypes |= {torch.float16 for kind, *_ in model.steps if kind == "half"}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("seeds", [range(start, start + 100) for start in (0, 100, 200)], ids=str)
def test_random_modules_are_as_plain(seeds):
    """The same values and dtypes, or refused where the model refuses, whatever the input's dtype.

    Where the model refuses the input's dtype alone, the input is cast to the model's, and the output back.
    """
    for seed in seeds:
        torch.manual_seed(seed)
        model = Mixed(seed)
        x = torch.randn(2, 3, 6, 6).to(random.Random(seed).choice((model.main,) * 2 + FLOATS))
        expected, actual = outcome(model, x), outcome(as_frozen(model), x)
        main = fused_resnet.freezing.dtypes.main_dtype(model, x.dtype)
        if isinstance(expected, Exception) and x.dtype != main:
            expected = outcome(model, x.to(main))
            if isinstance(expected, torch.Tensor) and expected.dtype == main:
                expected = expected.to(x.dtype)
        if isinstance(expected, Exception):
            assert isinstance(actual, ValueError), (seed, model.steps, expected)
        else:
            assert isinstance(actual, torch.Tensor), (seed, model.steps, actual)
            compare(model, expected, actual, coarsest(model, x.dtype, main))


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_random_modules_in_another_dtype(dtype):
    """What runs, runs in each dtype, and returns the same dtypes."""
    for seed in range(150):
        torch.manual_seed(seed)
        model = Mixed(seed)
        x = torch.randn(2, 3, 6, 6).to(model.main)
        expected = outcome(model, x)
        if isinstance(expected, torch.Tensor) and expected.isfinite().all():
            compare(model, expected, fused_resnet.freeze(model, x, dtype=dtype)(x), coarsest(model, dtype))


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(function, *args, **options):
    with pytest.raises(ValueError) as error:
        function(*args, **options)
    return str(error.value)


def small():
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    return networks.randomize(nn.Sequential(*layers))


@pytest.fixture
def torchs_log():
    """What torch's own handler, which pytest's streams come too late for, would print."""
    log, records = logging.getLogger("torch._subclasses.fake_tensor"), []
    handler = logging.Handler()
    handler.emit = records.append
    log.addHandler(handler)
    yield records
    log.removeHandler(handler)


WRONG = ((1, 4, 8, 8), (1, 3, 9, 9), (3, 8), (1, 3, 0, 8), (1, 3, 2, 2), (1, 3, 8, 8, 1))


@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", WRONG, ids=str)
def test_a_wrong_shape_is_refused_by_the_message_alone(shape, dtype, capfd, torchs_log):
    """Torch prints or logs a traceback of its own for what it refuses on tensors without memory."""
    model, x = small(), torch.randn(1, 3, 8, 8)
    frozen, wrong = fused_resnet.freeze(model, x, dtype=dtype), torch.randn(shape)
    for call in (frozen, frozen.plan, lambda x: fused_resnet.freeze(model, x, dtype=dtype)):
        assert refused(call, wrong).startswith(f"freeze: the model cannot take an input of shape {shape}: ")
    refused(fused_resnet.explain, model, wrong)
    refused(fused_resnet.explain, frozen, wrong)
    assert capfd.readouterr() == ("", "") and not torchs_log


@pytest.mark.parametrize("function, message", [
    (lambda m, x: m.conv(x) * m.conv(x).sum().item(), "what item returns has no shape or value before it runs"),
    (lambda m, x: m.conv(x)[m.conv(x) > 0], "what getitem returns has no shape or value before it runs"),
    (lambda m, x: m.conv(x) @ m.filter, "cannot take an input of shape"),
    (lambda m, x: torch.fft.hfft(m.conv(x)), "cannot be computed in bfloat16, because hfft cannot: .* Cast its"),
    (lambda m, x: torch.special.bessel_j0(m.conv(x)), "does not run in bfloat16 on an input of .*: .bessel_j0"),
])  # fmt: skip
def test_what_cannot_be_done_is_said_in_the_users_words(function, message, capfd, torchs_log):
    model, x = Steps(function).eval(), torch.randn(X)
    with pytest.raises(ValueError, match=message):
        fused_resnet.freeze(model, x, dtype=torch.bfloat16)
    assert capfd.readouterr() == ("", "") and not torchs_log


@pytest.mark.parametrize("dtype", (torch.float64, *HALVES), ids=str)
def test_products_of_two_dtypes_are_refused_as_the_model_refuses_them(dtype):
    for function in (lambda m, x: m.pointwise(m.conv(x).to(dtype)), lambda m, x: m.up(m.conv(x).to(dtype)),
                     lambda m, x: m.fc(m.conv(x).mean((2, 3)).to(dtype)), lambda m, x: m.gn(m.conv(x).to(dtype)),
                     lambda m, x: F.conv2d(m.conv(x).to(dtype), m.filter)):  # fmt: skip
        model, x = Steps(function).eval(), torch.randn(X)
        if isinstance(outcome(model, x), Exception):  # not the norm: it takes fp32 vectors beside 16 bits
            assert "cannot compute with" in refused(fused_resnet.freeze, model, x)


def test_a_norm_of_a_dtype_that_torch_refuses_is_not_folded():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).bfloat16()).eval(), torch.randn(1, 3, 8, 8)
    assert "1 cannot compute with bfloat16 and float32 together" in refused(fused_resnet.freeze, model, x)
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3).bfloat16(), nn.BatchNorm2d(4)).eval()  # which torch takes
    x = x.bfloat16()
    torch.testing.assert_close(fused_resnet.freeze(mixed, x)(x), mixed(x), rtol=0.02, atol=0.02)


def test_a_complex_convolution_stays_one():
    conv = nn.Conv2d(3, 4, 3, dtype=torch.complex64)
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), ToComplex(), conv), torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(fused_resnet.freeze(model.eval(), x)(x), model(x), rtol=1e-4, atol=1e-5)


class ToComplex(nn.Module):
    def forward(self, x):
        return x.to(torch.complex64)


def test_what_meta_tensors_cannot_do_is_inferred_nevertheless():
    """A tensor made on the model's device meets one without memory."""
    for function in (lambda m, x: m.conv(x).cpu() + 1, lambda m, x: m.conv(x) + torch.ones(x.size(0), 8, 8, 8)):
        model, x = Steps(function).eval(), torch.randn(X)
        for dtype in (None, torch.bfloat16):
            torch.testing.assert_close(fused_resnet.freeze(model, x, dtype=dtype)(x), model(x), rtol=0.05, atol=0.05)


def test_threads_that_ask_for_shapes_leave_no_mode_behind():
    """What meta tensors cannot do is asked of fake ones, whose mode torch notes for the whole process."""
    model = Steps(lambda m, x: m.conv(x).cpu() + torch.ones(1, 8, 8, 8)).eval()
    frozen, shown = fused_resnet.freeze(model, torch.randn(1, 4, 8, 8)), []

    def ask(thread):
        for width in range(6):
            with pytest.raises(ValueError, match="cannot take"):
                frozen(torch.randn(1, 4, 9 + thread, 9 + width))
        shown.append(thread)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shown) == 4 and not is_in_torch_dispatch_mode()


@pytest.mark.parametrize("norm", [
    nn.InstanceNorm2d(16, affine=True), nn.BatchNorm2d(16, track_running_stats=False),
], ids=str)  # fmt: skip
def test_norms_without_statistics_in_bf16(norm):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.ReLU()).eval().bfloat16()
    x = torch.randn(2, 3, 8, 8).bfloat16()
    torch.testing.assert_close(fused_resnet.freeze(model, x)(x), model(x), rtol=0.02, atol=0.02)
