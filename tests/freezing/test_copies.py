"""freeze: copies of models, without wrappers, of tensors with a history, and of frozen models."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fused_resnet
from tests.support import networks
from tests.support.plans import Each, Traced, X, convolutions
from tests.support.snapshots import snapshot, unchanged


def ddp(model):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


def with_a_compiled_stage(model):
    model.layer2 = torch.compile(model.layer2, backend="eager")
    return model


def compiled_in_place(model):
    model.layer2.compile(backend="eager")
    return model


WRAPPED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "a compiled stage": with_a_compiled_stage,
    "compiled twice": lambda model: torch.compile(with_a_compiled_stage(model), backend="eager"),
    "compiled in place": compiled_in_place,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": ddp,
    "compiled DistributedDataParallel": lambda model: torch.compile(ddp(model), backend="eager"),
}


@pytest.fixture
def no_process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_models_are_frozen_like_what_is_in_them(wrap, no_process_group):
    plain, x = networks.small(), torch.randn(X)
    model, expected = wrap(copy.deepcopy(plain)).eval(), fused_resnet.freeze(plain, x)(x)
    frozen = fused_resnet.freeze(model, x)
    assert torch.equal(frozen(x), expected) and frozen.unfreeze() is model
    assert len(convolutions(frozen, x)) == 12
    parts = fused_resnet.freeze(Each(model).eval(), [x])
    assert list(parts.parts) == ["model"] and torch.equal(parts.parts["model"](x), expected)
    bn = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    bn.train()
    with pytest.raises(RuntimeError, match="bn1 is in training mode"):
        fused_resnet.freeze(model, x)


@pytest.mark.parametrize(
    "copied", (copy.deepcopy, lambda frozen: pickle.loads(pickle.dumps(frozen))), ids=("copy", "pickle")
)
def test_copies_and_pickles(copied):
    model, x = networks.small(), torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    again = copied(frozen)
    assert torch.equal(again(x), frozen(x)) and again.dtype == torch.float32
    assert torch.equal(again(x[:1]), frozen(x[:1])) and isinstance(again.unfreeze(), networks.Network)


COMPUTED = {
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "pruned twice": lambda conv: [prune.random_unstructured(conv, "weight", 0.3) for _ in range(2)],
    "weight_norm, old": pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
    "spectral_norm, old": nn.utils.spectral_norm,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.parametrize("grad_mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_weights_that_are_computed_from_others(compute, grad_mode):
    """In grad mode such a weight has a history, which deepcopy refuses. The model's own stays as it was, trainable."""
    model, x = networks.small(), torch.randn(X)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs[:3]:
        compute(conv)
    images = [x]
    parts = Each(model).eval()
    model(x)
    before, hooks = snapshot(model), [len(conv._forward_pre_hooks) for conv in convs]
    with torch.no_grad():
        expected, of_parts = model(x), parts(images)
    with grad_mode():
        frozen, in_parts = fused_resnet.freeze(model, x), fused_resnet.freeze(parts, images)
    torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(in_parts(images), of_parts, rtol=1e-4, atol=1e-5)
    assert list(in_parts.parts) == ["model"]
    unchanged(model, before)
    assert torch.equal(model(x), expected)
    assert [len(conv._forward_pre_hooks) for conv in convs] == hooks
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in convs[0].parameters())
    if hooks[0]:  # a hook's weight is folded like any other
        assert len(convolutions(frozen, x)) == len(convs)


def test_a_hook_beside_the_one_that_computes_the_weight_is_kept():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(X)
    prune.l1_unstructured(model[0], "weight", 0.5)
    model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(fused_resnet.freeze(model, x)(x), expected, rtol=1e-4, atol=1e-5)


def test_tensors_with_a_history_are_copied():
    """As an attribute, as a buffer and in a list."""
    weight = torch.ones(4, 1, 1, requires_grad=True)
    model = Traced(lambda m, x: m.conv(x) * m.scale + m.shift * m.others[0]).eval()
    model.scale, model.others = 2 * weight, [3 * weight]
    model.register_buffer("shift", 4 * weight)
    x = torch.randn(2, 4, 6, 7)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(fused_resnet.freeze(model, x)(x), expected, rtol=1e-4, atol=1e-5)
    assert model.scale.requires_grad and model.shift.requires_grad
