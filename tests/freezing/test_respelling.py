"""freeze of graphs of torch.export and of convolutions called as functions: the plans of the modules they stand for."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from fused_resnet import models
from fused_resnet.freezing.modules import FrozenConv, FrozenLinear, FrozenMaxPool
from fused_resnet.freezing.region import FrozenRegion
from fused_resnet.measuring import rooflines
from fused_resnet.nn import BasicBlock, Bottleneck
from tests.support import networks

X = (2, 3, 16, 16)


def exported(model, x=None, **options):
    return torch.export.export(model, (torch.randn(X) if x is None else x,), **options).module()


def decomposed(model, x):
    return torch.export.export(model, (x,)).run_decompositions().module()


def reloaded(model, x):
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    return torch.export.load(file).module()


def steps(frozen, x):
    """What its plan computes by modules: each convolution's problem, inputs and memory, those of each region, and the
    kinds of the others."""
    plan = frozen.plan(x)
    modules = dict(plan.named_modules())
    calls = [(modules[node.target], len(node.args)) for node in plan.graph.nodes if node.op == "call_module"]
    convs = [(str(conv), conv.in_place, inputs) for conv, inputs in calls if isinstance(conv, FrozenConv)]
    regions = [
        tuple(str(conv.problem) for conv in region.convolutions)
        for region, _ in calls
        if isinstance(region, FrozenRegion)
    ]
    return convs, regions, [type(module) for module, _ in calls if isinstance(module, (FrozenLinear, FrozenMaxPool))]


def is_frozen_alike(model, other, x, **options):
    """Both have the same plan, and answer the same."""
    frozen, another = fused_resnet.freeze(model, x, **options), fused_resnet.freeze(other, x, **options)
    assert steps(frozen, x) == steps(another, x)
    torch.testing.assert_close(another(x), frozen(x), rtol=1e-5, atol=1e-6)
    return another


class Activations(nn.Sequential):
    """Every activation, in place or not, after a convolution; norms and dropouts; poolings of all kinds."""

    def __init__(self):
        activations = (nn.ReLU(), nn.ReLU(True), nn.ReLU6(), nn.ReLU6(True), nn.SiLU(), nn.SiLU(True))
        blocks = ((nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), activation) for activation in activations)
        pools = nn.MaxPool2d(3, 2, 1), nn.Dropout2d(), nn.AvgPool2d(2), nn.Dropout(inplace=True)
        head = nn.Hardtanh(0, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 4)
        layers = (layer for block in blocks for layer in block)
        super().__init__(nn.Conv2d(3, 8, 1), *layers, *pools, nn.Conv2d(8, 8, 1), *head)


MODELS = {
    "basic": lambda: networks.small(BasicBlock),
    "bottleneck": lambda: networks.small(Bottleneck),
    "activations": lambda: networks.randomize(Activations()),
    "resnet18": lambda: networks.randomize(models.resnet18(num_classes=10)),
}


@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_exported_models_are_frozen_like_plain_ones(make, dtype):
    model, x = make(), torch.randn(X)
    is_frozen_alike(model, exported(model), x, dtype=dtype)


@pytest.mark.parametrize("form", (decomposed, reloaded))
def test_exported_models_in_other_forms(form):
    model, x = (
        nn.Sequential(networks.single(Bottleneck, stride=1), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten()),
        torch.randn(2, 16, 9, 9),
    )
    is_frozen_alike(model.eval(), form(model, x), x)


def test_an_exported_model_takes_the_batches_that_it_was_exported_for():
    model, x = networks.small(), torch.randn(X)
    frozen = is_frozen_alike(model, exported(model, dynamic_shapes=({0: torch.export.Dim("n", max=4)},)), x)
    smaller = torch.randn(1, *X[1:])
    torch.testing.assert_close(frozen(smaller), fused_resnet.freeze(model, x)(smaller), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="Guard failed"):
        frozen(torch.randn(5, *X[1:]))


def test_a_frozen_exported_model_is_apart_from_the_model_and_from_its_copies():
    """Pickled it is not: torch cannot pickle the graph that it keeps for `unfreeze`."""
    program, x = exported(networks.small(), dynamic_shapes=({0: torch.export.Dim("n")},)), torch.randn(X)
    frozen = fused_resnet.freeze(program, x)
    expected, copied = frozen(x), copy.deepcopy(frozen)
    with torch.no_grad():
        for parameter in program.parameters():
            parameter.zero_()
    assert torch.equal(copied(x), expected) and steps(copied, x) == steps(frozen, x)
    larger = torch.cat((x, x))  # whose plan is made now
    torch.testing.assert_close(frozen(larger), torch.cat((expected, expected)), rtol=1e-5, atol=1e-6)


def test_frozen_functions_are_pickled():
    model, x = networks.randomize(Functions()), torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    copied = pickle.loads(pickle.dumps(frozen))
    assert torch.equal(copied(x), frozen(x)) and steps(copied, x) == steps(frozen, x)


def test_explain_names_the_modules_that_an_exported_model_had():
    model, x, roofline = networks.small(), torch.randn(X), rooflines.Roofline(bytes_per_s=1e10, flops_per_s=1e11)
    names = [
        [row.name for row in fused_resnet.explain(fused_resnet.freeze(form, x), x, roofline=roofline).rows]
        for form in (model, exported(model))
    ]
    assert names[0] == names[1] and "layer2.0.downsample.0" in names[0]


def test_models_exported_in_training_mode_are_refused():
    model = exported(networks.small().train())
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        fused_resnet.freeze(model, torch.randn(X))


# ------------------------------------------------------------------------------------------------------------ functions


class Functions(nn.Module):
    """A network of functions over its own attributes, some used twice, some buffers, most by keyword."""

    def __init__(self):
        super().__init__()
        self.stem, self.weight = nn.Parameter(torch.randn(8, 3, 3, 3) / 5), nn.Parameter(torch.randn(8, 4, 3, 3) / 6)
        self.bias, self.fc = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(4, 8))
        self.register_buffer("point", torch.randn(8, 8, 1, 1) / 3)
        self.bn = nn.BatchNorm2d(8)

    def norm(self, x):
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(F.conv2d(input=x, weight=self.stem, padding=1))), 3, stride=2)
        y = F.silu(F.conv2d(x, self.weight, self.bias, stride=(1, 1), padding=1, groups=2))
        y = torch.convolution(y, self.weight, None, (1, 1), (2, 2), (2, 2), False, (0, 0), 2)
        x = F.relu(self.norm(F.conv2d(y, self.point)) + x)
        return F.linear(x.mean((2, 3)), self.fc)


class AsModules(nn.Module):
    """The same network of modules."""

    def __init__(self, model):
        super().__init__()
        self.stem, self.bn, self.pool = nn.Conv2d(3, 8, 3, padding=1, bias=False), model.bn, nn.MaxPool2d(3, 2)
        self.once = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.again = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False)
        self.point, self.fc = nn.Conv2d(8, 8, 1, bias=False), nn.Linear(8, 4, bias=False)
        self.once.weight, self.once.bias, self.again.weight = model.weight, model.bias, model.weight
        self.stem.weight, self.point.weight, self.fc.weight = model.stem, nn.Parameter(model.point), model.fc

    def forward(self, x):
        x = self.pool(F.relu(self.bn(self.stem(x))))
        y = self.again(F.silu(self.once(x)))
        return self.fc(F.relu(self.bn(self.point(y)) + x).mean((2, 3)))


@pytest.mark.parametrize("form", (lambda model: model, exported), ids=("itself", "exported"))
@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=str)
def test_functions_over_attributes_are_frozen_like_modules(dtype, form):
    model, x = networks.randomize(Functions()), torch.randn(X)
    modules = AsModules(model).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), modules(x))
    convs, regions, _ = steps(is_frozen_alike(modules, form(model), x, dtype=dtype), x)
    assert len(convs) + sum(map(len, regions)) == 4 and (regions or [inputs for _, _, inputs in convs] == [1, 1, 1, 2])


def writes_what_is_read_later(x, conv, m):
    out = conv(x)
    return torch.relu_(out[:, :2]) + out.sum(1, keepdim=True)


def adds_to_what_is_read_later(x, conv, m):
    out, other = conv(x), conv(-x)
    again = out.relu()
    out += other
    return out * again


def computes_its_weight(x, conv, m):
    return F.conv2d(x, m.weight * x.mean(), m.bias).relu()


def computes_its_bias(x, conv, m):
    return F.conv2d(x, m.weight, m.bias * x.mean()).relu()


def makes_its_weight(x, conv, m):
    weight = torch.zeros(4, 3, 1, 1)
    weight += x.mean()
    return F.conv2d(x, weight).relu()


def takes_its_stride_from_x(x, conv, m):
    return F.conv2d(x, m.weight, m.bias, stride=x.shape[0], groups=x.shape[1] // 3)


def pads_by_name(x, conv, m):
    return F.conv2d(F.conv2d(x, m.weight, padding="same"), m.wide, padding="valid").relu()


def pools_with_indices(x, conv, m):
    out, where = F.max_pool2d(conv(x), 2, return_indices=True)
    return out + where


class OfFunction(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.bias = function, nn.Parameter(torch.ones(4))
        self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))
        self.wide, self.one = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.function(x, lambda x: F.conv2d(x, self.weight, self.bias), self)


@pytest.mark.parametrize("form", (lambda model: model, exported), ids=("itself", "exported"))
@pytest.mark.parametrize("function", (
    writes_what_is_read_later, adds_to_what_is_read_later, computes_its_weight, computes_its_bias, makes_its_weight,
    takes_its_stride_from_x, pads_by_name, pools_with_indices,
))  # fmt: skip
def test_the_results_stay_the_models(function, form):
    model, x = OfFunction(function).eval(), torch.randn(X)
    with torch.no_grad():
        expected = model(x.clone())
    torch.testing.assert_close(fused_resnet.freeze(form(model), x)(x), expected, rtol=1e-5, atol=1e-5)


def test_an_exported_model_that_reads_by_strides_is_refused():
    model = OfFunction(lambda x, conv, m: conv(x).as_strided((2, 4), (1, 2)))
    with pytest.raises(ValueError, match="reads memory by strides"):
        fused_resnet.freeze(exported(model.eval()), torch.randn(X))


@pytest.mark.parametrize("call", (
    lambda m, x: F.conv2d(x, m.weight, m.bias, groups=3),
    lambda m, x: F.conv2d(x, m.weight, padding="same", stride=2),
    lambda m, x: F.conv1d(x, m.weight),
    lambda m, x: F.linear(x, m.wide),
    lambda m, x: F.conv2d(x, m.weight, m.one),
    lambda m, x: F.max_pool2d(x, 2, 0),
), ids=("groups", "stride", "rank", "linear", "bias", "pooling"))  # fmt: skip
def test_what_torch_refuses_is_refused(call):
    with pytest.raises(ValueError, match="freeze: the model (cannot take|does not run on) an input of shape"):
        fused_resnet.freeze(OfFunction(lambda x, conv, m: call(m, x)).eval(), torch.randn(X))
