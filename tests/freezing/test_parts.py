"""freeze where the whole cannot be traced: the parts that can, and what the rest of the model sees of them."""

import collections
import copy
import logging
import pickle

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet.freezing import parts
from fused_resnet.freezing.frozen import FrozenModel, FrozenParts
from fused_resnet.freezing.modules import FrozenConv
from fused_resnet.nn import ConvBNAct
from tests.support import networks


class Backbone(nn.Sequential):
    stride = 4


class Detector(nn.Module):
    """A list of images in, a dict out; the shared head is called once a level, and tells its stride when asked."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone(ConvBNAct(3, 8, stride=2), ConvBNAct(8, 8, stride=2), nn.Dropout(0.5))
        self.levels = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(2)])
        self.head = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.same_head = self.head
        self.scored = nn.Conv2d(8, 1, 1)

    def forward(self, images):
        if not isinstance(images, list):
            raise TypeError("a list of images")
        x = self.backbone(torch.stack(images))
        maps = [self.head(self.levels[0](x)), self.same_head(self.levels[1](x)[:, :, ::2])]
        score = self.scored(x) + self.scored(input=x)  # no part: called in two ways
        return collections.OrderedDict(maps=maps, stride=self.backbone.stride, score=score, kept={"image": images[0]})


@pytest.fixture
def detector():
    return networks.randomize(Detector())


def images(*size):
    return [torch.randn(3, *(size or (16, 12))) for _ in range(2)]


def close(actual, expected, tolerance=1e-5):
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected):
            close(one, other, tolerance)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    else:
        assert actual == expected


def test_the_largest_parts_are_frozen_and_the_rest_runs(detector, caplog):
    x = images()
    with torch.no_grad():
        expected = detector(x)
    with caplog.at_level(logging.INFO, "fused_resnet"):
        frozen = fused_resnet.freeze(detector, x)
    assert isinstance(frozen, FrozenParts)
    assert list(frozen.parts) == ["backbone", "levels.0", "levels.1", "head"]
    assert "frozen in 4 parts (backbone, levels.0, levels.1, head): it takes a list" in caplog.text
    assert not frozen(x)["maps"][0].requires_grad
    close(frozen(x), expected)
    plans = [plan for part in frozen.parts.values() for plan in part.plans()]
    assert sum(isinstance(module, FrozenConv) for plan in plans for module in plan.modules()) == 2 + 2 + 2 * 2
    with torch.no_grad():
        other = images(20, 28)
        close(frozen(other), detector(other))


def test_the_model_is_as_before_and_comes_back(detector):
    before = {
        name: (id(module), type(module), len(module._forward_pre_hooks)) for name, module in detector.named_modules()
    }
    x = images()
    frozen = fused_resnet.freeze(detector, x)
    with torch.no_grad():
        expected = frozen(x)
        detector.backbone[0][0].weight.zero_()
    close(frozen(x), expected)
    after = {
        name: (id(module), type(module), len(module._forward_pre_hooks)) for name, module in detector.named_modules()
    }
    assert after == before and frozen.unfreeze() is detector
    with pytest.raises(RuntimeError, match="a frozen model cannot be trained"):
        frozen.train()
    with pytest.raises(RuntimeError, match="a frozen model cannot be moved"):
        frozen.half()
    with pytest.raises(ValueError, match="the model is frozen already"):
        fused_resnet.freeze(frozen, x)


class Taps(nn.Sequential):
    """Feature maps from the middle, as torchvision's IntermediateLayerGetter returns them, and the image itself."""

    def forward(self, x):
        taps = collections.OrderedDict(image=x)
        for name, module in self.named_children():
            x = taps[name] = module(x)
        return taps


def test_feature_maps_keep_their_names_and_order():
    model, x = networks.randomize(Taps(ConvBNAct(3, 8), nn.Conv2d(8, 4, 1))), torch.randn(2, 3, 9, 7)
    x = x.contiguous(memory_format=torch.channels_last)  # as a plan works, so that nothing else makes a copy
    frozen = fused_resnet.freeze(model, x)
    assert isinstance(frozen, FrozenModel)
    with torch.no_grad():
        close(frozen(x), model(x))
    assert frozen(x)["image"].data_ptr() != x.data_ptr()
    half = fused_resnet.freeze(model, x, dtype=torch.bfloat16)(x)
    assert list(half) == ["image", "0", "1"] and {tap.dtype for tap in half.values()} == {torch.float32}


def test_shared_modules_are_frozen_once(detector):
    frozen = fused_resnet.freeze(detector, images())
    copied = frozen.__dict__["_copy"]
    assert copied.head is copied.same_head is frozen.parts["head"] and len(frozen.parts["head"].plans()) == 2


@pytest.mark.parametrize("dtype, tolerance", ((torch.bfloat16, 0.1), (torch.float64, 1e-5)))
def test_dtypes(detector, dtype, tolerance):
    x = images()
    with torch.no_grad():
        expected = detector(x)
    actual = fused_resnet.freeze(detector, x, dtype=dtype)(x)
    assert actual["maps"][0].dtype == torch.float32
    close(actual, expected, tolerance)


def test_copies_and_pickles(detector):
    x = images()
    frozen = fused_resnet.freeze(detector, x)
    for copied in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        close(copied(x), frozen(x))


class Listed(nn.Module):
    """Its convolution is called by keyword, which a part is not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, images):
        return [self.conv(input=image[None]) for image in images]


class Chooses(nn.Module):
    """Two branches by value: only what is inside them can be frozen."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x, *, twice=False):
        out = self.part(x) if x.sum() > 0 else -self.part(x)
        return 2 * out if twice else out


def test_a_model_of_one_tensor_that_looks_at_its_values():
    model, x = Chooses(networks.small()).eval(), torch.randn(2, 3, 16, 16)
    frozen = fused_resnet.freeze(model, x)
    assert list(frozen.parts) == ["part"] and isinstance(frozen.parts["part"], FrozenModel)
    with torch.no_grad():
        for one in (x, -x):
            close(frozen(one, twice=True), model(one, twice=True))


def test_smaller_parts_where_the_larger_cannot_be():
    model = Chooses(Chooses(nn.Sequential(ConvBNAct(3, 4), nn.Conv2d(4, 4, 1)))).eval()
    frozen = fused_resnet.freeze(model, torch.randn(1, 3, 8, 8))
    assert list(frozen.parts) == ["part.part"]


class WritesItsInput(nn.Module):
    """Pre-activation: the block's in-place ReLU is what the sum around it reads."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3))

    def forward(self, images):
        x = torch.stack(images)
        return x + self.block(x)


def test_a_part_that_writes_its_input_is_not_frozen():
    model, x = networks.randomize(WritesItsInput()), images()
    frozen = fused_resnet.freeze(model, x)
    assert list(frozen.parts) == ["block.1"]
    with torch.no_grad():
        close(frozen(x), model(x))


class WritesIntoItsImages(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, images):
        for image in images:
            image += 1
        return [self.conv(self.relu(image)[None]) for image in images]


def test_what_the_rest_writes_into_is_a_copy_of_the_input():
    model, x = WritesIntoItsImages().eval(), images()
    before = copy.deepcopy(x)
    with torch.no_grad():
        expected = model(copy.deepcopy(x))
    frozen = fused_resnet.freeze(model, x)
    close(x, before, 0)
    for restored in (frozen, pickle.loads(pickle.dumps(frozen))):
        close(restored(x), expected)
        close(x, before, 0)
    with torch.inference_mode():
        x = images()
        before = copy.deepcopy(x)
        frozen(x), fused_resnet.freeze(model, x)(x)
        close(x, before, 0)


class Counts(nn.Module):
    """The rest counts on the whole model, one block on itself, the other one does not."""

    def __init__(self):
        super().__init__()
        self.block, self.counting, self.log = nn.Sequential(nn.Conv2d(3, 3, 1)), Counting(), []
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, images):
        self.calls += 1
        self.log.append(len(images))
        return [self.counting(self.block(image[None])) * self.calls * len(self.log) for image in images]


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.calls = nn.Conv2d(3, 3, 1), []

    def forward(self, x):
        self.calls.append(1)
        return self.inner(x) * len(self.calls)


def test_the_rest_keeps_state_from_where_the_model_is():
    model, x = Counts().eval(), images()
    frozen = fused_resnet.freeze(model, x)
    assert list(frozen.parts) == ["block", "counting.inner"]
    assert model.calls == 0 and not model.log and not model.counting.calls
    with torch.no_grad():
        for _ in range(3):
            close(frozen(x), model(x))


class ReturnsItsInput(nn.Module):
    """The block hands its input on, and the model writes into that."""

    def __init__(self):
        super().__init__()
        self.block, self.writes = Taps(nn.Conv2d(3, 3, 3, padding=1)), True

    def forward(self, images):
        x = torch.stack(images)
        taps = self.block(x)
        if self.writes:
            taps["image"].mul_(2)
        return x + taps["0"]


def test_a_part_that_returns_its_input_to_be_written_into_is_not_frozen():
    model, x = networks.randomize(ReturnsItsInput()), images()
    frozen = fused_resnet.freeze(model, x)
    assert list(frozen.parts) == ["block.0"]
    with torch.no_grad():
        close(frozen(x), model(x))
    model.writes = False
    assert list(fused_resnet.freeze(model, x).parts) == ["block"]


class AsksItsPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.block.stride, self.block.mean = 4, nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, images):
        return [(self.block(image[None]) - self.block.mean, self.block.stride) for image in images]


def test_later_changes_of_the_model_do_not_reach_what_parts_are_asked_for():
    model, x = networks.randomize(AsksItsPart()), images()
    frozen = fused_resnet.freeze(model, x)
    expected = copy.deepcopy(frozen(x))
    with torch.no_grad():
        model.block.mean.zero_()
    model.block.stride = 8
    assert frozen(x)[0][1] == expected[0][1] == 4
    model.to("meta")
    for (actual, _), (wanted, _) in zip(frozen(x), expected):
        close(actual, wanted)


class SetsOnItsPart(nn.Module):
    """Tells the block how to run before each call."""

    def __init__(self):
        super().__init__()
        self.block = Scaled(3, 3, 1)
        self.scale = None

    def forward(self, images):
        if self.scale is not None:
            self.block.scale = self.scale
        return [self.block(image[None]) for image in images]


class Scaled(nn.Conv2d):
    scale = 1.0

    def forward(self, x):
        return self.scale * super().forward(x)


@pytest.mark.parametrize("restored", (lambda frozen: frozen, lambda frozen: pickle.loads(pickle.dumps(frozen))))
def test_an_attribute_set_on_a_part_is_an_error(restored):
    model, x = networks.randomize(SetsOnItsPart()), images()
    frozen = restored(fused_resnet.freeze(model, x))
    frozen.__dict__["_copy"].scale = 2.0
    with pytest.raises(RuntimeError, match="sets 'scale' of Scaled, a frozen part.*Set it before freezing"):
        frozen(x)
    model.scale = 3.0
    with pytest.raises(ValueError, match="no part of SetsOnItsPart can be frozen"):
        fused_resnet.freeze(model, x)


class Remembers(nn.Module):
    """Keeps what its model asks for later."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 3, 1), None

    def forward(self, x):
        self.last = x.shape[-1]
        return self.conv(x)


class Writes(nn.Module):
    """Writes to a module inside the block before each call, depending on the images."""

    def __init__(self, write):
        super().__init__()
        tail = nn.Sequential(collections.OrderedDict(conv=Scaled(3, 3, 1), act=nn.ReLU()))
        self.block, self.write = nn.Sequential(collections.OrderedDict(first=Remembers(), tail=tail)), write

    def forward(self, images):
        self.write(self.block.tail.conv, images[0].shape[-1])
        return [(self.block(image[None]), self.block.first.last) for image in images]


WRITES = {
    "nothing": (lambda conv, width: None, ["block.first.conv", "block.tail"]),
    "an attribute": (lambda conv, width: setattr(conv, "scale", width), ["block.first.conv"]),
    "a weight": (lambda conv, width: conv.weight.fill_(width), ["block.first.conv"]),
    "another weight": (
        lambda conv, width: setattr(conv, "weight", nn.Parameter(torch.full((3, 3, 1, 1), width / 9))),
        ["block.first.conv"]),
}  # fmt: skip


@pytest.mark.parametrize("what", WRITES)
def test_what_the_forward_writes_to_is_in_no_part(what):
    write, parts = WRITES[what]
    model, x = networks.randomize(Writes(write)), images()
    frozen = fused_resnet.freeze(model, x)
    copied = copy.deepcopy(model)
    assert list(frozen.parts) == parts
    for size in ((16, 12), (20, 28)):
        x = images(*size)
        with torch.no_grad():
            expected = copied(x)
        for (actual, last), (wanted, width) in zip(frozen(x), expected):
            close(actual, wanted)
            assert last == width


def test_what_a_trace_in_another_thread_patched_is_not_put_back(monkeypatch):
    stock = nn.Module.__setattr__

    class EndOfAnotherTrace:
        """The lock, got when the other thread has undone its patch."""

        def __enter__(self):
            nn.Module.__setattr__ = stock

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(nn.Module, "__setattr__", lambda *args: stock(*args))
    monkeypatch.setattr(parts, "TRACING", EndOfAnotherTrace())
    with parts._noting_writes(nn.ReLU()):
        assert nn.Module.__setattr__ is not stock
    assert nn.Module.__setattr__ is stock


def test_no_part_at_all():
    with pytest.raises(ValueError, match="torch.fx cannot trace Chooses: .*Freeze the part that is a plain network"):
        fused_resnet.freeze(Chooses(nn.Linear(3, 3)).eval(), torch.randn(2, 3))
    with pytest.raises(ValueError, match="freeze: no part of Listed can be frozen, and it takes a list"):
        fused_resnet.freeze(Listed().eval(), images())


def test_an_example_that_does_not_fit(detector):
    with pytest.raises(ValueError, match="freeze: Detector does not run on the example: "):
        fused_resnet.freeze(detector, [torch.randn(4, 16, 16)] * 2)
    with pytest.raises(TypeError, match="example_input must be .*list"):
        fused_resnet.freeze(detector, [1, 2])


def test_a_forced_backend_that_cannot_is_an_error(detector):
    with pytest.raises(fused_resnet.BackendError, match="'cudnn' cannot run this"):
        fused_resnet.freeze(detector, images(), backend="cudnn")
    assert not any(module._forward_pre_hooks for module in detector.modules())


def test_autocast_changes_nothing():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Linear(8, 5)

        def forward(self, images):
            mixed = torch.stack(images) @ torch.eye(16)  # what autocast would do in bf16
            return [self.head(self.body(mixed).mean((2, 3)))]

    model, images = Listed().eval(), [torch.randn(3, 16, 16)]
    (expected,) = fused_resnet.freeze(model, images)(images)
    with torch.autocast("cpu", torch.bfloat16):
        (actual,) = fused_resnet.freeze(model, images)(images)
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)


class Refined(nn.Module):
    """Its branch is in no graph. One part is fp64 on purpose, one has an fp32 step before its convolution."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.last(self.first(x).float().softmax(1))

    def __init__(self):
        super().__init__()
        self.stem, self.head = ConvBNAct(3, 8), Refined.Head()
        self.exact = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()).double()

    def forward(self, x):
        y = self.stem(x)
        if y.shape[0] > 1:
            y = y.clone()
        return self.head(y), self.exact(y.double())


@pytest.mark.parametrize("dtype", (None, torch.bfloat16, torch.float16), ids=str)
def test_a_part_of_another_dtype_than_the_model_stays_in_it(dtype):
    model, x = networks.randomize(Refined()), torch.randn(2, 3, 8, 8)
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    own = dtype or torch.float32
    assert {name: part.dtype for name, part in frozen.parts.items()} == {
        "stem": own, "head": own, "exact": torch.float64
    }  # fmt: skip
    with torch.no_grad():
        wanted, seen = model(x), model.stem(x)
    for actual, expected in zip(frozen(x), wanted, strict=True):
        assert actual.dtype == expected.dtype
        assert networks.error(actual, expected.double()) < (1e-5 if dtype is None else 0.02)
    assert networks.error(frozen.parts["exact"](seen.double()), model.exact(seen.double())) < 1e-14
