"""A frozen model: what would move or convert it, and the way back."""

import pytest
import torch
from torch import nn

import fused_resnet
from tests.support import networks
from tests.support.plans import Each, X, problems_of
from tests.support.snapshots import snapshot, unchanged


def test_the_model_is_unchanged_by_success_and_comes_back():
    model, x = networks.small(), torch.randn(X)
    before, expected = snapshot(model), model(x)
    frozen = fused_resnet.freeze(model, x, dtype=torch.float64)
    frozen(x)
    unchanged(model, before)
    assert torch.equal(model(x), expected)
    assert frozen.unfreeze() is model


def test_a_frozen_model_stays_as_it_is():
    frozen = fused_resnet.freeze(networks.small(), torch.randn(X))
    assert frozen.eval() is frozen and not frozen.training
    for call in (frozen.train, frozen.half, lambda: frozen.to(torch.float64)):
        with pytest.raises(RuntimeError, match="a frozen model cannot be .*frozen.unfreeze"):
            call()


UNMOVED = {
    "to(device)": lambda m: m.to("cpu"),
    "to(dtype)": lambda m: m.to(torch.float32),
    "to(tensor)": lambda m: m.to(torch.ones(1)),
    "to(memory_format)": lambda m: m.to(memory_format=torch.channels_last),
    "cpu": lambda m: m.cpu(),
    "float": lambda m: m.float(),
    "type": lambda m: m.type(torch.float32),
    "apply": lambda m: m.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Conv2d) else None),
    "share_memory": lambda m: m.share_memory(),
    "eval": lambda m: m.eval(),
    "train(False)": lambda m: m.train(False),
    "requires_grad_(False)": lambda m: m.requires_grad_(False),
    "zero_grad": lambda m: m.zero_grad() or m,
}
MOVED = {
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to(dtype)": lambda m: m.to(torch.bfloat16),
    "to(device)": lambda m: m.to("meta"),
    "type": lambda m: m.type(torch.float64),
    "to_empty": lambda m: m.to_empty(device="meta"),
    "to_empty, where it is": lambda m: m.to_empty(device="cpu"),
    "cuda": lambda m: m.cuda() if not torch.cuda.is_available() else m.to("meta"),
    "train": lambda m: m.train(),
}


@pytest.fixture(params=("whole", "parts"))
def frozen_and_example(request):
    """A frozen model and what it takes."""
    if request.param == "whole":
        return fused_resnet.freeze(networks.small(), torch.randn(X)), torch.randn(X)
    images = [torch.randn(X)]
    return fused_resnet.freeze(Each(networks.small()).eval(), images), images


@pytest.mark.parametrize("call", UNMOVED.values(), ids=UNMOVED)
def test_what_would_not_change_a_frozen_model_does_nothing(frozen_and_example, call):
    frozen, x = frozen_and_example
    around, expected = nn.Sequential(frozen, nn.Linear(10, 10)).eval(), frozen(x)
    assert call(frozen) is frozen and call(around) is around and around[0] is frozen
    assert torch.equal(frozen(x), expected)


@pytest.mark.parametrize("call", MOVED.values(), ids=MOVED)
def test_what_would_change_a_frozen_model_is_refused(frozen_and_example, call):
    frozen, x = frozen_and_example
    around, expected = nn.Sequential(frozen, nn.Linear(10, 10)).eval(), frozen(x)
    for module in (frozen, around):
        with pytest.raises(RuntimeError, match="a frozen model cannot be .*frozen.unfreeze"):
            call(module)
    assert torch.equal(frozen(x), expected) and {p.dtype for p in around[1].parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("in_parts", (False, True))
def test_a_model_frozen_in_another_dtype_is_in_that_of_its_inputs(dtype, in_parts):
    """What it takes and returns decides: in the dtype of its arithmetic, the next call would fail."""
    model, x = (Each(networks.small()).eval(), [torch.randn(X)]) if in_parts else (networks.small(), torch.randn(X))
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    around, expected = nn.Sequential(frozen, nn.LazyLinear(10)).eval(), frozen(x)
    around(x)
    for call in UNMOVED.values():
        assert call(frozen) is frozen and call(around) is around
    for other in (torch.bfloat16, torch.float16, torch.float64):
        for module in (frozen, around):
            with pytest.raises(RuntimeError, match="cannot be moved or converted.* is in float32 on cpu"):
                module.to(other)
    assert around[1].weight.dtype == torch.float32 and torch.equal(frozen(x), expected)
    assert in_parts or frozen.dtype == dtype


def test_a_frozen_model_has_no_state_and_is_not_frozen_again():
    x = torch.randn(X)
    frozen = fused_resnet.freeze(networks.small(), x)
    assert not frozen.state_dict() and not list(frozen.parameters())
    for model in (frozen, nn.Sequential(frozen).eval()):
        with pytest.raises(ValueError, match="frozen already. Freeze what it was made from"):
            fused_resnet.freeze(model, x)


def test_its_repr_says_what_computes_each_shape():
    x = torch.randn(X)
    frozen = fused_resnet.freeze(networks.small(), x, backend="eager")
    frozen(torch.randn(5, 3, 16, 16))
    count = len(problems_of(frozen, x))
    first, *plans = [line.strip() for line in repr(frozen).splitlines()[1:-1]]
    assert count > 1 and first == f"{type(frozen.unfreeze()).__name__} in float32 on cpu"
    # asking for the plan of x has made it the one used last
    assert plans == [f"5x3x16x16: eager {count}", f"2x3x16x16: eager {count}"]


def test_its_repr_counts_convolutions_in_regions_too():
    x = torch.randn(X)
    for dtype in (torch.float32, torch.bfloat16):
        frozen = fused_resnet.freeze(networks.small(), x, dtype=dtype)
        rows = fused_resnet.explain(frozen, x).rows
        (plan,) = [line.strip() for line in repr(frozen).splitlines()[2:-1]]
        shape, counted = plan.split(": ")
        found = {name: int(number) for name, number in (pair.split(" ") for pair in counted.split(", "))}
        assert shape == "2x3x16x16" and sum(found.values()) == len(problems_of(frozen, x))
        assert set(found) <= {row.backend for row in rows}
