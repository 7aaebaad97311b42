"""The models: their parameters, keys, initialisation and shapes, and what trained weights answer on real images."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from fused_resnet import models
from fused_resnet.fusing.convert import fused_convs
from fused_resnet.models import cifar
from fused_resnet.models.resnet import SqueezeExcitation
from fused_resnet.nn import BasicBlock, Bottleneck, FusedBasicBlock, FusedBlock, FusedBottleneck, PreActBottleneck
from tests.support import networks, real_data

full = pytest.mark.full

# parameters, and the SHA-256 of the lines "key shape" of torchvision 0.28.0's state_dict, in its order
TORCHVISION = {
    "resnet18": (11_689_512, "84fb10d9c6905a1c"),
    "resnet34": (21_797_672, "28f9096d51307499"),
    "resnet50": (25_557_032, "d7e4f8bb0a536344"),
    "resnet101": (44_549_160, "02c0f34f4842751f"),
    "resnet152": (60_192_808, "685c66205bc823aa"),
    "resnext50_32x4d": (25_028_904, "e3bad165c034e60f"),
    "resnext101_32x8d": (88_791_336, "da7dd7525807e2ee"),
    "resnext101_64x4d": (83_455_272, "90caac80ae24c51d"),
    "wide_resnet50_2": (68_883_240, "41203d1d536c02ed"),
    "wide_resnet101_2": (126_886_696, "4f088c0a152b8f5c"),
}
# He et al. 2015, table 6, in millions
CIFAR = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7, "resnet1202": 19.4}
PLAIN = ("plain20", "plain32", "plain44", "plain56", "plain110")
# He et al. 2016, table 4, in millions: 1.7, 1.7 and 10.2 of the last three
PREACT = {"preact20": 269_722, "preact32": 464_154, "preact44": 658_586, "preact56": 853_018, "preact110": 1_727_962,
          "preact164": 1_703_258, "preact1001": 10_327_706}  # fmt: skip
FIRST_TIER = ("resnet18", "resnet50", "resnext50_32x4d")
SMALL_IMAGES = ("resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2")  # torchvision's choice for its own test


def tiered(names):
    return [name if name in FIRST_TIER else pytest.param(name, marks=full) for name in names]


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (BasicBlock, Bottleneck))]


def fuse_all(model: nn.Module) -> nn.Module:
    """Fuse in place, every block."""
    count = len(blocks_of(model))
    fused_resnet.fuse(model, strict=True)
    assert sum(isinstance(module, FusedBlock) for module in model.modules()) == count > 0
    return model


@pytest.mark.parametrize("name", TORCHVISION)
def test_parameters_and_keys_are_torchvisions(name):
    with torch.device("meta"):
        model = models.create(name)
    lines = "\n".join(f"{key} {tuple(tensor.shape)}" for key, tensor in model.state_dict().items())
    assert (parameter_count(model), hashlib.sha256(lines.encode()).hexdigest()[:16]) == TORCHVISION[name], lines


@pytest.mark.parametrize("name", tiered(TORCHVISION))
def test_expected_outputs_of_torchvision(name):
    """Plain, fused and frozen in fp32."""
    expected = real_data.expected_output(name)
    torch.manual_seed(0)
    model = models.create(name, num_classes=50).eval()
    size = 64 if name in SMALL_IMAGES else 224
    x = torch.rand(1, 3, size, size)
    frozen = fused_resnet.freeze(model, x)
    with torch.inference_mode():
        outputs = {"plain": model(x), "frozen": frozen(x), "fused": fuse_all(model)(x)}
    for form, actual in outputs.items():
        # the weights are the same to the bit, only the order of fp32 sums differs: 1e-6 was seen at worst, torchvision
        # allows 1e-3
        difference = (actual - expected).abs().max().item()
        assert difference <= 1e-5 * expected.abs().max().item(), (form, difference)


@pytest.mark.parametrize("name", tiered(TORCHVISION))
def test_seed_gives_torchvisions_weights_to_the_bit(name):
    theirs_of = getattr(real_data.torchvision().models, name)
    torch.manual_seed(3)
    theirs, their_next = theirs_of(num_classes=10), torch.rand(1)
    torch.manual_seed(3)
    ours, our_next = models.create(name, num_classes=10), torch.rand(1)
    assert their_next == our_next
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key


@pytest.mark.parametrize("name, blocks", (("resnet18", 8), ("resnet50", 16)))
def test_torchvisions_own_models_fuse_and_freeze(name, blocks):
    """Trained-like norms, so that a wrong fold shows; fused and frozen round differently, so fp64 is the judge."""
    model = networks.randomize(getattr(real_data.torchvision().models, name)(num_classes=10))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    x = torch.randn(2, 3, 64, 64)
    exact = networks.in_fp64(model, x)
    frozen = fused_resnet.freeze(model, x)
    with torch.inference_mode():
        allowed = networks.allowed(model(x), exact)
        assert 0 < allowed < 1e-4
        of_frozen = networks.allowed(model(x), exact, winograd=networks.has_winograd(frozen.plan(x)))
        assert networks.error(frozen(x), exact) <= of_frozen
        fused_resnet.fuse(model, strict=True)
        assert networks.error(model(x), exact) <= allowed
    assert sum(isinstance(module, FusedBlock) for module in model.modules()) == blocks
    assert list(model.state_dict()) == list(state)
    for key, tensor in state.items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_dilation_replaces_strides():
    torch.manual_seed(0)
    model = models.resnet50(replace_stride_with_dilation=(False, True, True), num_classes=3).eval()
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    with torch.inference_mode():
        x = model.layer2(model.layer1(stem(torch.rand(1, 3, 64, 64))))
        assert x.shape[2:] == model.layer3(x).shape[2:] == model.layer4(model.layer3(x)).shape[2:] == (8, 8)
    assert [block.conv2.dilation[0] for block in model.layer3] == [1] + [2] * 5
    assert [block.conv2.dilation[0] for block in model.layer4] == [2, 4, 4]
    assert {block.conv2.stride for stage in (model.layer3, model.layer4) for block in stage} == {(1, 1)}


def test_dilation_needs_three_flags():
    with pytest.raises(ValueError, match="one flag for each of the last three stages"):
        models.resnet50(replace_stride_with_dilation=(True, True))


def test_stride_in_1x1_moves_the_stride_and_keeps_the_keys():
    with torch.device("meta"):
        plain, moved = models.resnet50(), models.resnet50(stride_in_1x1=True)
    strides = [(block.conv1.stride[0], block.conv2.stride[0]) for block in (plain.layer2[0], moved.layer2[0])]
    assert strides == [(1, 2), (2, 1)]
    assert list(plain.state_dict()) == list(moved.state_dict())
    assert moved(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1000)


def test_stride_in_1x1_needs_bottlenecks():
    with pytest.raises(ValueError, match="needs Bottleneck blocks"):
        models.resnet18(stride_in_1x1=True)


@pytest.mark.parametrize("create", (models.resnet18, models.resnet50, cifar.resnet20))
def test_zero_init_residual_makes_every_block_its_shortcut(create):
    torch.manual_seed(0)
    model = create(zero_init_residual=True).eval()
    for block in blocks_of(model):
        x = torch.randn(2, block.conv1.in_channels, 8, 8)
        shortcut = x if block.downsample is None else block.downsample(x)
        assert torch.equal(block(x), shortcut.relu())
        zeroed = [name for name, norm in block.named_children() if name.startswith("bn") and not norm.weight.any()]
        assert zeroed == ["bn3" if isinstance(block, Bottleneck) else "bn2"]


def test_other_norm_layers_are_used_everywhere():
    model = models.resnet50(norm_layer=lambda channels: nn.GroupNorm(8, channels), num_classes=3)
    norms = [type(module) for module in model.modules() if isinstance(module, (nn.GroupNorm, nn.BatchNorm2d))]
    assert norms == [nn.GroupNorm] * 53
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 3)


def cifar_parameters(depth: int) -> int:
    count, inplanes = 9 * 3 * 16 + 2 * 16, 16
    for planes in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            count += 9 * inplanes * planes + 9 * planes * planes + 4 * planes
            inplanes = planes
    return count + 64 * 10 + 10


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_parameter_counts(name):
    model = models.create(name)
    assert parameter_count(model) == cifar_parameters(depth=int(name.removeprefix("resnet")))
    assert round(parameter_count(model) / 1e6, 1 if CIFAR[name] > 1 else 2) == CIFAR[name]
    projections = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert parameter_count(models.create(name, option="B")) == parameter_count(model) + projections


@pytest.mark.parametrize("name", PLAIN)
def test_plain_networks_are_the_resnets_without_shortcuts(name):
    """As many layers and parameters as option A, in the order of the paper, and no sum anywhere."""
    with torch.device("meta"):
        plain, resnet = models.create(name), models.create(name.replace("plain", "resnet"))
    assert parameter_count(plain) == parameter_count(resnet)
    shapes = [[tuple(p.shape) for p in model.parameters()] for model in (plain, resnet)]
    assert shapes[0] == shapes[1]
    layers = [module for module in plain.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == int(name.removeprefix("plain"))
    strides = [conv.stride[0] for conv in layers[:-1]]
    n = (len(layers) - 2) // 6
    assert [index for index, stride in enumerate(strides) if stride == 2] == [1 + 2 * n, 1 + 4 * n]


@pytest.mark.parametrize("name", PREACT)
def test_preactivation_networks_have_the_papers_depths(name):
    with torch.device("meta"):
        model = models.create(name)
    named = model.named_modules()
    layers = [one for key, one in named if isinstance(one, (nn.Conv2d, nn.Linear)) and "downsample" not in key]
    assert len(layers) == int(name.removeprefix("preact"))
    assert parameter_count(model) == PREACT[name]
    assert [conv.out_channels for conv in layers[:-1] if conv.stride == (2, 2)] == [32, 64]


def _by_hand(model, x):
    """Every norm and ReLU in front of its convolution, and the shortcuts of option A."""

    def normalised(bn, x):
        return F.relu((x - bn.running_mean[:, None, None]) / (bn.running_var[:, None, None] + bn.eps).sqrt()
                      * bn.weight[:, None, None] + bn.bias[:, None, None])  # fmt: skip

    x = F.conv2d(x, model.conv1.weight, padding=1)
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            a = normalised(block.bn1, x)
            out = F.conv2d(a, block.conv1.weight, stride=block.stride, padding=1)
            out = F.conv2d(normalised(block.bn2, out), block.conv2.weight, padding=1)
            is_first = block is model.layer1[0]
            shortcut = a if is_first else x[:, :, :: block.stride, :: block.stride]
            missing = out.shape[1] - shortcut.shape[1]
            zeros = torch.zeros_like(out[:, : missing // 2])
            x = out + torch.cat((zeros, shortcut, zeros), 1)
    return normalised(model.bn, x).mean((2, 3)) @ model.linear.weight.T + model.linear.bias


def test_preactivation_by_hand():
    model = networks.randomize(cifar.preact20()).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), _by_hand(model, x))


@pytest.mark.parametrize("create, activated", (
    (lambda: cifar.CifarPreActResNet(2), [True, False, False, False, False, False]),
    (lambda: cifar.CifarPreActResNet(2, option="B"), [True, False, True, False, True, False]),
    (lambda: cifar.CifarPreActResNet(2, block=PreActBottleneck), [True, False, True, False, True, False]),
    (lambda: cifar.CifarPreActResNet(2, block=PreActBottleneck, option="A"), [True] + [False] * 5),
))  # fmt: skip
def test_shortcuts_of_preactivation_networks(create, activated):
    """A projection starts behind the activation, as does the first block's shortcut. Other identities are of x."""
    model = create().eval()
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
    assert [block.activated_shortcut for block in blocks] == activated
    for block in blocks:
        nn.init.zeros_((block.conv3 if isinstance(block, PreActBottleneck) else block.conv2).weight)
        x = torch.randn(2, block.bn1.num_features, 6, 6)
        start = block.bn1(x).relu() if block.activated_shortcut else x
        expected = start if block.downsample is None else block.downsample(start)
        torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    "name, convs", (("plain20", 19), ("preact20", 18), ("seresnet50", 69), pytest.param("resnet1202", 1201, marks=full))
)
def test_the_other_models_fuse_and_freeze(name, convs):
    model = networks.randomize(models.create(name, num_classes=10))
    for block in blocks_of(model):  # without it, rounding grows with the depth as in no trained network
        nn.init.constant_(block.bn2.weight if isinstance(block, BasicBlock) else block.bn3.weight, 0.1)
    x = torch.randn(2, *models.input_shape(name)[:1], 32, 32)
    exact, frozen = networks.in_fp64(model, x), fused_resnet.freeze(model, x)
    with torch.inference_mode():
        allowed = networks.allowed(model(x), exact)
        assert 0 < allowed < 1e-4
        of_frozen = networks.allowed(model(x), exact, winograd=networks.has_winograd(frozen.plan(x)))
        assert networks.error(frozen(x), exact) <= of_frozen
        fused_resnet.fuse(model, strict=True)
        assert networks.error(model(x), exact) <= allowed
    assert len(fused_convs(model)) == convs


def test_squeeze_and_excitation_by_hand():
    """Gates are sigmoid(fc2(relu(fc1(mean)))), one for each channel of each image."""
    se = SqueezeExcitation(32, reduction=16)
    x = torch.randn(2, 32, 3, 5)
    hidden = torch.relu(x.mean((2, 3)) @ se.fc1.weight[:, :, 0, 0].T + se.fc1.bias)
    gates = torch.sigmoid(hidden @ se.fc2.weight[:, :, 0, 0].T + se.fc2.bias)
    torch.testing.assert_close(se(x), x * gates[:, :, None, None])
    with torch.device("meta"):
        model = models.seresnet50()
    assert parameter_count(model) == 28_088_024  # timm's seresnet50 has as many; the paper says 28.1 M


@pytest.mark.parametrize("option", "AB")
@pytest.mark.parametrize("size", (32, 31, 8))
def test_cifar_shapes(option, size):
    torch.manual_seed(0)
    model = cifar.resnet20(option=option, num_classes=7).eval()
    with torch.inference_mode():
        y = model(torch.randn(2, 3, size, size))
    assert y.shape == (2, 7)
    assert y.isfinite().all()
    assert y.std() > 0


def test_option_a_shortcut_by_hand():
    x = torch.arange(2 * 3 * 3, dtype=torch.float32).view(1, 2, 3, 3)
    y = cifar.PadShortcut(2, before=1, after=2)(x)
    assert y[0].tolist() == [
        [[0, 0], [0, 0]],
        [[0, 2], [6, 8]],
        [[9, 11], [15, 17]],
        [[0, 0], [0, 0]],
        [[0, 0], [0, 0]],
    ]


def test_inner_widths_change_only_what_is_inside_a_block():
    model = cifar.resnet20(inner_widths=real_data.PRUNED_WIDTHS)
    assert [block.conv1.out_channels for block in blocks_of(model)] == list(real_data.PRUNED_WIDTHS)
    assert [block.bn1.num_features for block in blocks_of(model)] == list(real_data.PRUNED_WIDTHS)
    assert [block.conv2.out_channels for block in blocks_of(model)] == [16] * 3 + [32] * 3 + [64] * 3
    assert list(model.state_dict()) == list(cifar.resnet20().state_dict())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_cifar_refuses_bad_options():
    with pytest.raises(ValueError, match="option must be 'A'"):
        cifar.resnet20(option="C")
    with pytest.raises(ValueError, match="option must be 'A'"):
        cifar.preact20(option="C")
    with pytest.raises(ValueError, match="each of the 9 blocks, got 3"):
        cifar.resnet20(inner_widths=(8, 8, 8))


def test_registry():
    assert models.names() == (*TORCHVISION, "seresnet50", *CIFAR, *PLAIN, *PREACT)
    assert models.input_shape("resnet50") == (3, 224, 224)
    assert models.input_shape("resnet56") == (3, 32, 32)
    for name in models.names():
        with torch.device("meta"):
            model = models.create(name, num_classes=5)
            assert model(torch.empty(1, *models.input_shape(name))).shape == (1, 5)
    with pytest.raises(ValueError, match="unknown model 'resnet51'; known ones are resnet18"):
        models.create("resnet51")


# --- trained weights on real images -------------------------------------------------------------------------------

# network: (correct of the first 500 test images, correct of all 10,000), both also counted with refcheck.py
CIFAR_CORRECT = {"resnet20": (455, 9173), "resnet32": (466, 9263), "resnet56": (470, 9339), "pruned20": (458, 9154)}
SIZES = (500, pytest.param(10_000, marks=full))


class Answers:
    """A trained network, its inputs and labels, and what it predicts unfused; computed once for all tests."""

    def __init__(self, create, inputs, labels, batch):
        self.create, self.inputs, self.labels, self.batch = create, inputs, labels, batch
        self.predicted = self.of(create())

    def of(self, model):
        return real_data.predictions(model, self.inputs, self.batch, k=5)

    def correct(self, predicted, k=1):
        return real_data.correct(predicted[:, :k], self.labels)

    def changed(self, predicted):
        return int((predicted[:, 0] != self.predicted[:, 0]).sum())


@pytest.fixture(scope="module")
def cifar_answers():
    known = {}

    def answers(name, count):
        if (name, count) not in known:
            images, labels = real_data.cifar10(count=count)
            if name == "pruned20":
                create, inputs = real_data.pruned_resnet20, real_data.half_normalized(images)
            else:
                create, inputs = (lambda: real_data.akamaster(name)), real_data.imagenet_normalized(images)
            known[name, count] = Answers(create, inputs, labels, batch=250)
        return known[name, count]

    return answers


@pytest.fixture(scope="module")
def imagenet_answers():
    return Answers(real_data.keras_resnet50, *real_data.imagenet_400(), batch=10)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", CIFAR_CORRECT)
def test_cifar_accuracy(cifar_answers, name, count):
    answers = cifar_answers(name, count)
    assert answers.correct(answers.predicted) == CIFAR_CORRECT[name][count == 10_000]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", CIFAR_CORRECT)
def test_cifar_accuracy_fused(cifar_answers, name, count):
    answers = cifar_answers(name, count)
    model = fused_resnet.fuse(answers.create())
    assert {type(block) for block in blocks_of(model)} == {FusedBasicBlock}
    assert answers.changed(answers.of(model)) <= count * 2 // 10_000


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", CIFAR_CORRECT)
def test_cifar_accuracy_frozen(cifar_answers, name, count):
    answers = cifar_answers(name, count)
    frozen = fused_resnet.freeze(answers.create(), answers.inputs[: answers.batch])
    assert answers.changed(answers.of(frozen)) <= count * 2 // 10_000


@full
@pytest.mark.parametrize("name", CIFAR_CORRECT)
def test_cifar_accuracy_frozen_bf16(cifar_answers, name):
    answers = cifar_answers(name, 10_000)
    frozen = fused_resnet.freeze(answers.create(), answers.inputs[: answers.batch], dtype=torch.bfloat16)
    predicted = answers.of(frozen)
    assert 0 < answers.changed(predicted)  # none at all would mean that nothing was rounded to bf16
    assert abs(answers.correct(predicted) - answers.correct(answers.predicted)) <= 15  # 0.15 points of 10,000


def test_logits_equal_an_independent_implementation():
    reference = real_data.refcheck()
    images = real_data.cifar10(count=50)[0]
    pruned = reference.cifar_optB(str(real_data.path("cifar10/distiller_resnet20_channel_pruned.npz")))
    cases = (
        (real_data.akamaster("resnet20"), reference.akamaster("20"), real_data.imagenet_normalized(images)),
        (real_data.pruned_resnet20(), pruned, real_data.half_normalized(images)),
        (real_data.keras_resnet50(), reference.resnet50_keras(), real_data.imagenet_400(4)[0]),
    )
    for ours, theirs, inputs in cases:
        with torch.inference_mode():
            actual, expected = ours(inputs), theirs(inputs)
        # the same convolutions; only the average pool sums in another order
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@full
def test_imagenet_accuracy(imagenet_answers):
    assert imagenet_answers.correct(imagenet_answers.predicted, k=1) == 368  # 92.0 % of 400
    assert imagenet_answers.correct(imagenet_answers.predicted, k=5) == 393  # 98.25 %


@full
def test_imagenet_accuracy_fused(imagenet_answers):
    model = fused_resnet.fuse(imagenet_answers.create())
    assert {type(block) for block in blocks_of(model)} == {FusedBottleneck}
    assert imagenet_answers.changed(imagenet_answers.of(model)) == 0


@full
@pytest.mark.parametrize("dtype, changes", ((None, 0), (torch.bfloat16, 6)))
def test_imagenet_accuracy_frozen(imagenet_answers, dtype, changes):
    example = imagenet_answers.inputs[: imagenet_answers.batch]
    frozen = fused_resnet.freeze(imagenet_answers.create(), example, dtype=dtype)
    assert imagenet_answers.changed(imagenet_answers.of(frozen)) <= changes


# --- the sample that travels with the repository ------------------------------------------------------------------
