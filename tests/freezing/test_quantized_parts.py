"""Models in int8 that are frozen in parts: each part by the contract's reference, calibrated inside of the model."""

import collections
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from fused_resnet.freezing.frozen import FrozenModel, FrozenParts
from fused_resnet.nn import ConvBNAct
from fused_resnet.quantizing import Scales
from tests.support import networks
from tests.support.quantized import by_reference, int8_regions


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    by_reference(monkeypatch)


class Detector(nn.Module):
    """A list of images in, a dict out. Its head is called once a level, with maps of two sizes."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(ConvBNAct(3, 8, stride=2), ConvBNAct(8, 8, stride=2))
        self.head = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, images):
        x = self.backbone(torch.stack(images)) * 3
        return collections.OrderedDict(large=self.head(x), small=self.head(F.max_pool2d(x, 2)))


class Branching(nn.Module):
    """A tensor in, whose values it looks at."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x) if x.sum() > 0 else -self.part(x)


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return networks.randomize(Detector())


def batches(count=3, size=(16, 12)):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(3, *size, generator=generator) for _ in range(2)] for _ in range(count)]


def in_int8(model, example, **options):
    return fused_resnet.freeze(model, example, dtype=torch.int8, tune=False, **options)


def sqnr(model, frozen, x):
    with torch.no_grad():
        right, found = (torch.cat([y.flatten() for y in one(x).values()]).double() for one in (model, frozen))
    return (10 * torch.log10(right.square().sum() / (found - right).square().sum())).item()


def regions_of(frozen):
    """How many convolutions each part has in int8."""
    return {
        name: sum(
            len(module.convolutions)
            for module in part.plans()[-1].modules()
            if getattr(getattr(module, "fragment", None), "scales", ())
        )
        for name, part in frozen.parts.items()
    }


def test_each_part_has_scales_of_its_own_calls(detector):
    given = batches()
    frozen = in_int8(detector, given[0], calibrate=given)
    assert isinstance(frozen, FrozenParts) and regions_of(frozen) == {"backbone": 2, "head": 2}
    assert sqnr(detector, frozen, given[1]) > 20 and sqnr(detector, frozen, batches(1, (24, 20))[0]) > 15
    scales = frozen.scales()
    assert set(scales.parts) == {"backbone", "head"} and scales.parts["head"].images == 12  # two levels
    with torch.no_grad():
        maps = torch.cat([3 * detector.backbone(torch.stack(batch)) for batch in given])
    least, largest = next(iter(scales.parts["head"].ranges.values()))
    assert (least, largest) == pytest.approx((maps.min().item(), maps.max().item()), rel=1e-5)
    assert frozen.parts["head"].dtype == torch.int8 and "s8" in str(fused_resnet.explain(frozen, given[0]))


def test_an_iterator_gives_all_parts_its_batches(detector):
    given = batches()
    once, always = (in_int8(detector, given[0], calibrate=loader) for loader in (iter(given), given))
    assert once.scales() == always.scales()
    assert all(map(torch.equal, once(given[0]).values(), always(given[0]).values()))


def test_scales_are_kept_in_a_file(detector, tmp_path):
    given = batches()
    frozen = in_int8(detector, given[0], calibrate=given)
    file = frozen.scales().save(tmp_path / "scales.json")
    assert Scales.load(file) == frozen.scales()
    for restored in (in_int8(detector, given[0], calibrate=file), pickle.loads(pickle.dumps(frozen))):
        assert all(map(torch.equal, restored(given[1]).values(), frozen(given[1]).values()))
        assert restored.scales() == frozen.scales()


def test_a_tensor_with_labels():
    model, x = Branching(networks.small()).eval(), torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match="freeze: calibrate holds no images.* \\(In part, a part of the model.\\)"):
        in_int8(model, x, calibrate=[])
    frozen = in_int8(model, x, calibrate=[(x, torch.tensor([1, 2]))])
    assert list(frozen.parts) == ["part"] and isinstance(frozen.parts["part"], FrozenModel)
    assert int8_regions(frozen.parts["part"], x) and fused_resnet.agreement(model, frozen, [x]).sqnr_db > 20


@pytest.mark.parametrize(
    "keep, counts",
    [
        ("backbone", {"backbone": 0, "head": 2}),
        (["backbone.0"], {"backbone": 1, "head": 2}),
        (["backbone.0", "head.3"], {"backbone": 1, "head": 1}),
    ],
)
def test_keep_names_a_part_or_what_is_inside(detector, keep, counts):
    given = batches()
    assert regions_of(in_int8(detector, given[0], calibrate=given, keep=keep)) == counts


def test_what_is_refused(detector):
    given = batches()
    scales = in_int8(detector, given[0], calibrate=given).scales()
    other = networks.randomize(Detector())
    odd = [[torch.randn(3, 16, 12), torch.randn(3, 15, 12)]]
    nan = [[torch.full((3, 16, 12), torch.nan)]]
    for model, options, sentence in (
        (detector, dict(calibrate=given, keep=2), "keep=2 asks for the most sensitive .* frozen in parts, which are"),
        (
            detector,
            dict(calibrate=given, keep="nowhere"),
            "keep names 'nowhere', which is in no part .* backbone, head",
        ),
        (detector, dict(calibrate=given, keep="head.9"), "keep names '9', which holds no .* \\(In head, a part of"),
        (detector, dict(calibrate=odd), "Detector does not run on a batch of calibrate: .* \\(In backbone, a part"),
        (detector, dict(calibrate=nan), "is NaN or infinite in batch 0 of calibrate.* \\(In backbone, a part"),
        (other, dict(calibrate=scales), "these scales are of other weights"),
        (detector, dict(calibrate=scales._replace(parts={"head": scales.parts["head"]})), "these scales are of head."),
    ):
        with pytest.raises(ValueError, match=sentence):
            in_int8(model, given[0], **options)
    whole = detector.backbone
    with pytest.raises(ValueError, match="of a model in parts \\(backbone, head\\), and this one is frozen as a whole"):
        in_int8(whole, torch.randn(2, 3, 16, 12), calibrate=scales)
    with pytest.raises(TypeError, match="scales: the model is frozen in floats"):
        fused_resnet.freeze(detector, given[0], tune=False).scales()


def test_fake_quantization_is_refused(detector):
    detector.head.append(torch.ao.quantization.FakeQuantize())
    given = batches()
    with pytest.raises(ValueError, match="head.4 rounds as a quantized model would, and int8 has scales of its own"):
        in_int8(detector, given[0], calibrate=given)
