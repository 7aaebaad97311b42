"""freeze: what is refused."""

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import BackendError
from tests.support import networks
from tests.support.plans import Traced, X, as_good_as_plain, frozen_equals
from tests.support.snapshots import snapshot, unchanged


def test_training_mode_is_refused():
    model, x = networks.small(), torch.randn(X)
    model.layer2[0].bn1.train()
    with pytest.raises(RuntimeError, match=r"freeze: layer2.0.bn1 is in training mode; call model.eval\(\) first"):
        fused_resnet.freeze(model, x)
    with pytest.raises(RuntimeError, match="freeze: bn1 is in training mode; .* BatchNorm2d does something else then"):
        fused_resnet.freeze(model.train(), x)
    dropping = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout())
    for name, module in (("1", dropping), ("the model", Branches())):
        with pytest.raises(RuntimeError, match=f"freeze: {name} is in training mode"):
            fused_resnet.freeze(module, x)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if self.training else -self.conv(x)


def ask(module):
    return module.training


class AsksThroughAFunction(nn.Module):
    """Its own code does not say `training`."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if ask(self) else -self.conv(x)


class CountsInTraining(AsksThroughAFunction):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        if ask(self):
            self.calls += 1
        return self.conv(x) + self.calls


@pytest.mark.parametrize("model", (AsksThroughAFunction, CountsInTraining))
def test_what_training_mode_means_is_seen_in_the_graph(model):
    model, x = model(), torch.randn(X)
    with pytest.raises(RuntimeError, match="freeze: the model is in training mode; call model.eval"):
        fused_resnet.freeze(model, x)
    frozen_equals(model.eval(), x)


def with_fresh_modules(model):
    model.relu, model.layer1[0].relu = nn.Sequential(nn.Identity(), nn.ReLU()), nn.ReLU()
    return model


def exported(model):
    return torch.export.export(model, (torch.randn(X),)).module()


MODELESS = {
    "fresh modules": with_fresh_modules,
    "exported": exported,
    "traced by torch.fx": lambda model: torch.fx.symbolic_trace(nn.Sequential(model).eval()),
    "a flag alone": lambda model: model.conv1.train() and model,
}


@pytest.mark.parametrize("make", MODELESS.values(), ids=MODELESS)
def test_a_training_flag_that_means_nothing_is_no_matter(make):
    model, x = make(networks.small()), torch.randn(X)
    assert any(module.training for module in model.modules())
    flags, hooks = [module.training for module in model.modules()], len(model._forward_pre_hooks)
    with torch.no_grad():
        expected = model(x)
    frozen = fused_resnet.freeze(model, x)
    torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-5)
    assert [module.training for module in model.modules()] == flags and len(model._forward_pre_hooks) == hooks


def test_an_exported_model_keeps_its_guards():
    frozen = fused_resnet.freeze(exported(networks.small()), torch.randn(X))
    with pytest.raises(ValueError, match="Guard failed"):
        frozen(torch.randn(3, *X[1:]))


def test_a_wrapper_with_hooks_is_refused():
    model, x = torch.compile(networks.small(), backend="eager"), torch.randn(X)
    model.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="freeze: the model has forward hooks, which a plan would drop"):
        fused_resnet.freeze(model, x)


def test_hooks_of_leaves_are_kept_and_those_of_containers_refused():
    model, x, seen = networks.small(), torch.randn(X), []
    handle = model.layer1[0].conv1.register_forward_hook(
        lambda module, args, out: seen.append(tuple(out.shape)) or 2 * out
    )
    frozen = fused_resnet.freeze(model, x)
    seen.clear()
    as_good_as_plain(frozen, model, x)
    seen.clear()
    frozen(x)
    assert seen == [(2, 8, 16, 16)]
    handle.remove()
    for module, name in ((model.layer1[0], "layer1.0"), (model, "the model")):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_: None)
            with pytest.raises(ValueError, match=f"freeze: {name} has forward hooks, which a plan would drop"):
                fused_resnet.freeze(model, x)
            handle.remove()


class Tagged(torch.Tensor):
    """A subclass of which only torch functions know what it does."""


def with_weight(change):
    def make():
        model = networks.small()
        with torch.no_grad():
            model.fc.weight = nn.Parameter(change(model.fc.weight.detach()), requires_grad=False)
        return model

    return make


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def quantized(by_torch_fx):
    from torch.ao import quantization
    from torch.ao.quantization import quantize_fx

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).eval()
    x = torch.randn(X)
    if by_torch_fx:
        prepared = quantize_fx.prepare_fx(model, quantization.get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        return quantize_fx.convert_fx(prepared)
    model = nn.Sequential(quantization.QuantStub(), *model, quantization.DeQuantStub()).eval()
    model.qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(model)
    prepared(x)
    return quantization.convert(prepared)


CONVERTED = {
    "int8": (lambda: quantized(False), "the model is quantized already .*Freeze the float model"),
    "int8 by torch.fx": (lambda: quantized(True), "the model is quantized already .*Freeze the float model"),
    "a quantized tensor": (
        with_weight(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)), "fc.weight .* dtype qint8, .* dense"),
    "a subclass": (with_weight(lambda w: w.as_subclass(Tagged)), "fc.weight is a Tagged"),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(3, 3)).eval(), "0.weight has no values yet. Call the model once"),
    "sparse": (with_weight(lambda w: w.to_sparse_csr()), "fc.weight is a Parameter of layout sparse_csr"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make, message", CONVERTED.values(), ids=CONVERTED)
def test_models_of_other_numbers_are_refused(make, message):
    with pytest.raises(TypeError, match=f"freeze: {message}"):
        fused_resnet.freeze(make(), torch.randn(X))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", (None, torch.float64, torch.bfloat16))
def test_a_linear_that_quantizes_its_input_serves_in_a_plan(dtype):
    from torch.ao.quantization import quantize_dynamic

    model, x = networks.small(), torch.randn(X)
    model = quantize_dynamic(model, {nn.Linear})
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    with torch.no_grad():
        assert networks.error(frozen(x), model(x).double()) < 0.01  # inputs that differ by rounding may be int8s apart


def test_a_sparse_operand_is_no_weight():
    model, x = Traced(lambda m, x: torch.sparse.mm(m.mix, m.conv(x).flatten(1).t())).eval(), torch.randn(2, 4, 6, 7)
    model.register_buffer("mix", torch.randn(3, 4 * 6 * 7).relu().to_sparse())
    with torch.no_grad():
        torch.testing.assert_close(fused_resnet.freeze(model, x)(x), model(x), rtol=1e-4, atol=1e-4)


class TwoBranches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


REFUSED = {
    "wrong channels": (lambda m: fused_resnet.freeze(m, torch.randn(2, 4, 16, 16)), ValueError, "cannot take an input"),
    "wrong rank": (lambda m: fused_resnet.freeze(m, torch.randn(2, 3)), ValueError, r"input of shape \(2, 3\)"),
    "integers": (lambda m: fused_resnet.freeze(m, torch.ones(X).int()), TypeError, "floating-point tensor .* int32"),
    "not a tensor": (lambda m: fused_resnet.freeze(m, [1.0]), TypeError, "example_input must be .*list"),
    "not a module": (lambda m: fused_resnet.freeze(torch.relu, torch.ones(X)), TypeError, "expected an nn.Module"),
    "dtype": (lambda m: fused_resnet.freeze(m, torch.ones(X), dtype=torch.uint8), TypeError, "dtype must be float32"),
    "unknown backend": (
        lambda m: fused_resnet.freeze(m, torch.ones(X), backend="tpu"), BackendError, "unknown backend 'tpu'; known"),
    "forced backend": (
        lambda m: fused_resnet.freeze(m, torch.ones(X), backend="cudnn"), BackendError, "'cudnn' cannot run this"),
    "forced dtype": (
        lambda m: fused_resnet.freeze(m, torch.ones(X), dtype=torch.float64, backend="onednn"), BackendError,
        "'onednn' cannot run this: float64 is not supported"),
    "example on another device": (
        lambda m: fused_resnet.freeze(m, torch.ones(X, device="meta")), (TypeError, ValueError), "meta"),
}  # fmt: skip


@pytest.mark.parametrize("call, error, message", REFUSED.values(), ids=REFUSED)
def test_refused_and_the_model_unchanged(call, error, message):
    model, x = networks.small(), torch.randn(X)
    model.fc.register_forward_hook(lambda *_: None)
    before, expected = snapshot(model), model(x)
    with pytest.raises(error, match=message):
        call(model)
    unchanged(model, before)
    assert torch.equal(model(x), expected)


def test_an_example_on_another_device_is_refused():
    with pytest.raises(TypeError, match="example_input is on meta but the model is on cpu"):
        fused_resnet.freeze(networks.small(), torch.randn(X, device="meta"))


def test_untraceable_models_are_refused():
    with pytest.raises(
        ValueError, match="torch.fx cannot trace TwoBranches: .*Freeze the part that is a plain network"
    ):
        fused_resnet.freeze(TwoBranches().eval(), torch.ones(X))


def test_calls_that_do_not_fit_are_refused():
    frozen = fused_resnet.freeze(networks.small(), torch.randn(X))
    with pytest.raises(TypeError, match="frozen for float32 inputs on cpu, got float64 on cpu"):
        frozen(torch.randn(X).double())
    with pytest.raises(TypeError, match="frozen for float32 inputs on cpu, got float32 on meta"):
        frozen(torch.randn(X, device="meta"))
    with pytest.raises(TypeError, match="got list"):
        frozen([1])
    with pytest.raises(ValueError, match=r"cannot take an input of shape \(2, 5, 16, 16\)"):
        frozen(torch.randn(2, 5, 16, 16))
    x = torch.randn(X, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradients: use fused_resnet.fuse"):
        frozen(x)
    with torch.no_grad():
        assert not frozen(x).requires_grad


def test_fake_quantization_is_refused_in_other_float_dtypes():
    """torch reads a scale in bf16 as if it were fp32, and gives anything. In fp32 such a model is frozen."""
    from torch.ao import quantization

    fake = quantization.FakeQuantize(quantization.MovingAverageMinMaxObserver, 0, 255, dtype=torch.quint8)
    model, x = nn.Sequential(fake, nn.Conv2d(3, 8, 3), nn.ReLU()), torch.randn(X)
    model(x)
    model.eval().apply(quantization.disable_observer)
    frozen_equals(model, x)
    with pytest.raises(ValueError, match="fake_quantize_per_tensor_affine rounds as a quantized model would.*int8"):
        fused_resnet.freeze(model, x, dtype=torch.bfloat16)
