"""Modules that do strange things when they are looked at or written: fused, or left alone with a reason."""

import abc

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet.fusing import convert
from fused_resnet.fusing.rewriting import Rewritten
from fused_resnet.nn import BasicBlock, ConvBNAct
from tests.support.fused import Rewritable
from tests.support.snapshots import snapshot, unchanged


class RefusesAttributes(Rewritable):
    """Frozen once it is made."""

    def __init__(self):
        super().__init__()
        self.eval()
        object.__setattr__(self, "is_made", True)

    def __setattr__(self, name, value):
        if self.__dict__.get("is_made"):
            raise AttributeError(f"{name} is read-only")
        super().__setattr__(name, value)


class KeepsAttributesInItsDictionary(Rewritable):
    def __setattr__(self, name, value):
        self.__dict__[name] = value


class RefusesDeletion(Rewritable):
    def __delattr__(self, name):
        raise AttributeError(name)


class WithSlots(Rewritable):
    __slots__ = ("one", "another")


class AnswersWithKeyErrors(Rewritable):
    def __getattr__(self, name):
        if name.isdigit():
            return super().__getattr__(name)
        raise KeyError(name)


class WithATrainingProperty(Rewritable):
    training = property(lambda self: False, lambda self, value: None)


class WithAMetaclass(Rewritable, metaclass=abc.ABCMeta):
    pass


class _Unasked(type):
    def __instancecheck__(cls, value):
        raise RuntimeError("isinstance")

    def __subclasscheck__(cls, value):
        raise RuntimeError("issubclass")


class NobodyAsksForItsClass(Rewritable, metaclass=_Unasked):
    pass


class RaisesOnEverything(Rewritable):
    """What Python asks of an object now and then."""

    def _raise(self, *_):
        raise RuntimeError("asked")

    __bool__ = __len__ = __repr__ = __eq__ = _raise
    __hash__ = nn.Module.__hash__


FUSED_THOUGH_ODD = (
    RefusesAttributes, KeepsAttributesInItsDictionary, RefusesDeletion, WithSlots, AnswersWithKeyErrors,
    WithATrainingProperty, WithAMetaclass, NobodyAsksForItsClass, RaisesOnEverything,
)  # fmt: skip


@pytest.mark.parametrize("kind", FUSED_THOUGH_ODD)
def test_odd_modules_are_fused(kind):
    """Past whatever they do when an attribute is set."""
    module = kind()
    model, x = nn.Sequential(module), torch.randn(2, 3, 6, 6)
    for inner in (*module.children(), *([] if kind is WithATrainingProperty else [module])):
        inner.__dict__["training"] = False
    before, expected = snapshot(model), model(x)
    assert convert.left_alone(model) == []
    unchanged(model, before)
    fused_resnet.fuse(model, backend="eager", strict=True)
    assert issubclass(type(module), Rewritten) and module.__dict__["_fused_resnet"].backend == "eager"
    assert convert.fused_convs(model) == ["0.0"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    fused_resnet.unfuse(model)
    unchanged(model, before)


class NoSubclass(Rewritable):
    def __init_subclass__(cls):
        raise RuntimeError("it is final")


class NoFusedSubclass(Rewritable):
    def __init_subclass__(cls):
        if cls.__name__.startswith("Fused"):
            raise RuntimeError("no subclass of this name")


class _Final(type):
    def __new__(meta, name, bases, contents):
        if name.startswith("Fused"):
            raise TypeError("it is final")
        return super().__new__(meta, name, bases, contents)


class NoSubclassByMetaclass(Rewritable, metaclass=_Final):
    pass


class _Unhashable(type):
    __hash__ = None


class OfAnUnhashableClass(Rewritable, metaclass=_Unhashable):
    pass


class WithAClassOfItsOwn(Rewritable):
    __class__ = property(lambda self: nn.Linear)


class RefusesAList(Rewritable):
    def __dir__(self):
        raise RuntimeError("not this")


class WithABackendProperty(Rewritable):
    @property
    def backend(self):
        raise RuntimeError("not this")


class CountsPastItsOwnSetattr(Rewritable):
    def __init__(self):
        super().__init__()
        object.__setattr__(self, "count", 1000)

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value) if name == "count" else super().__setattr__(name, value)

    def forward(self, x):
        self.count = self.count + 1000
        return super().forward(x)


class CountsPastSetattr(CountsPastItsOwnSetattr):
    def forward(self, x):
        object.__setattr__(self, "count", self.count + 1000)
        return Rewritable.forward(self, x)


class SetsWhatItHas(CountsPastItsOwnSetattr):
    def forward(self, x):
        self.count = True
        return Rewritable.forward(self, x)


LEFT_ALONE_AS_ODD = (
    (NoSubclass, "torch.fx cannot trace its forward: RuntimeError: it is final"),
    (NoFusedSubclass, "its class cannot be replaced: RuntimeError: no subclass of this name"),
    (NoSubclassByMetaclass, "its class cannot be replaced: TypeError: it is final"),
    (OfAnUnhashableClass, "torch.fx cannot trace its forward: TypeError: unhashable type: '_Unhashable'"),
    (WithAClassOfItsOwn, "it cannot be looked at: AttributeError: "),
    (RefusesAList, "it cannot be looked at: RuntimeError: not this"),
    (WithABackendProperty, "its attribute backend has a name that fused modules use for something else"),
    (CountsPastItsOwnSetattr, "its forward writes its attribute count"),
    (CountsPastSetattr, "its forward writes its attribute count"),
    (SetsWhatItHas, "its forward writes its attribute count"),
)


@pytest.mark.parametrize("kind, why", LEFT_ALONE_AS_ODD)
def test_odd_modules_are_left_alone_with_a_reason(kind, why):
    model = nn.Sequential(ConvBNAct(3, 3), kind(), BasicBlock(4, 4)).eval()
    before, values = snapshot(model), dict(model[1].__dict__)
    ((name, reason),) = convert.left_alone(model)
    assert name == "1" and reason.startswith(why)
    fused_resnet.fuse(model)
    assert type(model[1]) is kind and model[1].__dict__ == values
    assert convert.fused_convs(model) == ["0.0", "2.conv1", "2.conv2"]
    with pytest.raises(ValueError, match="strict=True and some blocks cannot be fused:\n  1: "):
        fused_resnet.fuse(model, strict=True)
    fused_resnet.unfuse(model)
    unchanged(model, before)
