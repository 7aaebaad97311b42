"""Models that other people wrote: how many convolutions are fused, and that the answers are the same.

A network's error is the root mean square of its difference to the model in fp64, relative to that of the exact result.
It is at most four times as large as eager's own. Sums in another order are up to 2.4 times worse or better (seen); a
mistake is a thousand times worse. Every output is held against it, whatever list or dict it comes in, and
containers, names, shapes and dtypes must be those of the model.
"""

import copy
import functools
import pickle
import warnings
from typing import Callable, NamedTuple, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import fused_resnet
from fused_resnet.freezing.frozen import FrozenModel, FrozenParts
from fused_resnet.freezing.modules import FrozenConv
from fused_resnet.fusing.adapters import Adapted
from fused_resnet.fusing.convert import fused_convs, left_alone
from fused_resnet.nn.fused import Fused
from tests.support import networks, real_data

full = pytest.mark.full


def settled(model):
    """Norms as after training, frozen ones included, that keep activations near 1 however deep the model is."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), torch.Tensor):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.3, 0.9)
                module.bias.normal_(0, 0.1)
    return model.eval()


def errors(outputs, exact):
    """How far each tensor in these outputs is from the exact one. The outputs must be alike in all else."""
    assert pytree.tree_structure(outputs) == pytree.tree_structure(exact)
    pairs = list(zip(pytree.tree_leaves(outputs), pytree.tree_leaves(exact)))
    assert all(a.shape == e.shape and a.dtype == torch.float32 for a, e in pairs)
    return [networks.error(a, e) for a, e in pairs]


def as_good_as(actual, plain, exact):
    for error, allowed in zip(errors(actual, exact), errors(plain, exact)):
        assert error <= 4 * max(allowed, networks.LUCK) < 1e-4 or error == allowed == 0


def frozen_modules(frozen):
    parts = [frozen] if isinstance(frozen, FrozenModel) else frozen.parts.values()
    return [module for part in parts for module in part.plans()[0].modules()]


def frozen_convs(frozen):
    return [module for module in frozen_modules(frozen) if isinstance(module, FrozenConv)]


# -------------------------------------------------------------------------------------------------- other people's zoos


def timm_model(name, **options):
    real_data.torchvision()
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model(name, **options)


def torchvision_model(name, **options):
    return getattr(real_data.torchvision().models, name)(**options)


def segmentation(name):
    return getattr(real_data.torchvision().models.segmentation, name)(weights_backbone=None)


def detection_backbone(name, frozen):
    torchvision = real_data.torchvision()
    norm = torchvision.ops.misc.FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    make = torchvision.models.detection.backbone_utils.resnet_fpn_backbone
    return make(backbone_name=name, weights=None, norm_layer=norm)


def faster_rcnn_backbone():
    make = real_data.torchvision().models.detection.fasterrcnn_resnet50_fpn
    return make(weights=None, weights_backbone=None).backbone


def small_densenet(**options):
    densenet = real_data.torchvision().models.densenet
    return densenet.DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=5, **options)


def transformers_resnet(head=False, **config):
    real_data.torchvision()  # which transformers imports where it finds it
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ResNetConfig(**{"depths": [1, 2], "embedding_size": 16, "hidden_sizes": [32, 64], **config})
    return (transformers.ResNetForImageClassification if head else transformers.ResNetModel)(config)


def smp_model(architecture, encoder):
    real_data.torchvision()
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    model = getattr(smp, architecture)(encoder, encoder_weights=None)
    return model.encoder if architecture == "FPN" else model


class Wild(NamedTuple):
    """A model, and of its convolutions: all; those fused live; those of the plan with an activation, and with a sum.

    functions: convolutions that are no modules, which a plan has too.
    """

    create: Callable[[], nn.Module]
    convs: int
    live: int
    frozen: tuple[int, int]
    size: int = 64
    parts: Optional[int] = None
    functions: int = 0


tv = functools.partial(functools.partial, torchvision_model)
timm = functools.partial(functools.partial, timm_model)

WILD = {
    "timm resnet18": Wild(timm("resnet18"), 20, 20, (17, 8)),
    "timm resnet26d": Wild(timm("resnet26d"), 31, 30, (27, 8)),
    "timm resnet50": Wild(timm("resnet50"), 53, 53, (49, 16)),
    "timm resnet50d": Wild(timm("resnet50d"), 55, 54, (51, 16)),
    "timm resnet101": Wild(timm("resnet101"), 104, 104, (100, 33)),
    "timm resnext50_32x4d": Wild(timm("resnext50_32x4d"), 53, 53, (49, 16)),
    "timm seresnet50": Wild(timm("seresnet50"), 85, 69, (49, 0)),
    "timm wide_resnet50_2": Wild(timm("wide_resnet50_2"), 53, 53, (49, 16)),
    "timm resnetblur50": Wild(timm("resnetblur50"), 53, 53, (49, 16), functions=4),
    "timm resnet18, dropping": Wild(timm("resnet18", drop_block_rate=0.1, drop_path_rate=0.1), 20, 20, (17, 8)),
    "timm cspresnet50": Wild(timm("cspresnet50"), 55, 55, (0, 13)),
    "timm inception_v3": Wild(timm("inception_v3"), 94, 94, (94, 0), 96),
    "timm resnetv2_50": Wild(timm("resnetv2_50"), 54, 48, (32, 16)),
    "torchvision fcn_resnet50": Wild(functools.partial(segmentation, "fcn_resnet50"), 55, 54, (50, 16)),
    "torchvision deeplabv3_resnet50": Wild(functools.partial(segmentation, "deeplabv3_resnet50"), 61, 60, (56, 16)),
    "torchvision fasterrcnn_resnet50_fpn, backbone": Wild(faster_rcnn_backbone, 61, 53, (49, 16)),
    "torchvision resnet50 fpn, frozen norms": Wild(
        functools.partial(detection_backbone, "resnet50", True), 61, 53, (49, 16)),
    "torchvision googlenet": Wild(tv("googlenet", init_weights=False, aux_logits=False), 57, 57, (57, 0)),
    "torchvision inception_v3": Wild(tv("inception_v3", init_weights=False, aux_logits=False), 94, 94, (94, 0), 80),
    "torchvision densenet121": Wild(tv("densenet121"), 120, 59, (59, 0)),
    "torchvision vgg16_bn": Wild(tv("vgg16_bn", num_classes=10), 13, 13, (13, 0), 32),
    "torchvision regnet_y_400mf": Wild(tv("regnet_y_400mf"), 85, 69, (65, 16)),
    "transformers ResNet-50": Wild(
        functools.partial(transformers_resnet, depths=[3, 4, 6, 3], hidden_sizes=[64, 128, 256, 512]),
        53, 53, (49, 16), parts=5),
    "transformers ResNetForImageClassification, basic": Wild(
        functools.partial(transformers_resnet, head=True, layer_type="basic"), 9, 9, (7, 3), parts=3),
    "smp FPN's ResNet-34": Wild(functools.partial(smp_model, "FPN", "resnet34"), 36, 36, (33, 16)),
    "smp Unet": Wild(functools.partial(smp_model, "Unet", "resnet18"), 31, 30, (27, 8)),
    "smp DeepLabV3Plus": Wild(functools.partial(smp_model, "DeepLabV3Plus", "resnet50"), 68, 57, (58, 16), parts=5),
}  # fmt: skip
# one of each library, small: the rest is for the second tier
SMALL = {
    "timm resnet10t": Wild(timm("resnet10t"), 14, 13, (11, 4), 32),
    "timm regnetx_002": Wild(timm("regnetx_002"), 44, 44, (40, 13), 32),
    "torchvision DenseNet": Wild(small_densenet, 12, 6, (6, 0), 32),
    "torchvision resnet18 fpn, frozen norms": Wild(
        functools.partial(detection_backbone, "resnet18", True), 28, 20, (17, 8), 32),
    "transformers ResNetModel": Wild(transformers_resnet, 12, 12, (10, 3), 32, parts=3),
    "smp FPN's encoder": Wild(functools.partial(smp_model, "FPN", "resnet18"), 20, 20, (17, 8), 32),
}  # fmt: skip


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=full) for name in WILD)])
def test_fused_and_frozen(name):
    wild = {**SMALL, **WILD}[name]
    model, x = settled(wild.create()), torch.randn(2, 3, wild.size, wild.size)
    keys = list(model.state_dict())
    with torch.no_grad():
        plain, exact = model(x), copy.deepcopy(model).double()(x.double())

    frozen = fused_resnet.freeze(model, x)
    assert len(frozen.parts if isinstance(frozen, FrozenParts) else [0]) == (wild.parts or 1)
    as_good_as(frozen(x), plain, exact)

    classes = [type(module) for module in model.modules()]
    assert fused_resnet.fuse(model) is model and list(model.state_dict()) == keys
    with torch.no_grad():
        as_good_as(model(x), plain, exact)
    live = fused_convs(model)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    problems = [conv.problem for conv in frozen_convs(frozen)]
    activated, summed = sum(p.activation != "none" for p in problems), sum(p.has_residual for p in problems)
    print(
        f"{name}: {len(convs)} convolutions, fused live {len(live)}; frozen with activation {activated}, sum {summed}"
    )
    assert (len(convs), len(set(live)), len(live)) == (wild.convs, wild.live, wild.live)
    assert (len(problems), activated, summed) == (wild.convs + wild.functions, *wild.frozen)
    if all(conv in live for conv, module in model.named_modules() if isinstance(module, nn.Conv2d)):
        assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in frozen_modules(frozen))
    fused_resnet.unfuse(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("name", ["resnet10t", *(pytest.param(n, marks=full) for n in ("resnetblur50", "regnety_002"))])
def test_fused_models_of_timm_compile_in_one_graph(name):
    """What fusion asks of a module at every call, Dynamo can follow."""
    torch._dynamo.reset()
    model, x = settled(timm_model(name)), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain, exact = model(x), copy.deepcopy(model).double()(x.double())
        assert fused_convs(fused_resnet.fuse(model))
        as_good_as(torch.compile(model, backend="aot_eager", fullgraph=True)(x), plain, exact)
    torch._dynamo.reset()


def one_group(channels, **_):
    return nn.GroupNorm(1, channels)


def test_what_is_left_alone_is_reported():
    with pytest.raises(ValueError, match="layer1.0: none of its convolutions is followed by a BN"):
        fused_resnet.fuse(timm_model("resnet10t", norm_layer=one_group).eval(), strict=True)


def test_a_layer_of_transformers_adds_in_place():
    plain = settled(transformers_resnet()).encoder.stages[1].layers[1]
    model, x = fused_resnet.fuse(copy.deepcopy(plain)), torch.randn(2, 64, 5, 5)
    assert isinstance(model, Adapted)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == plain(x).dtype == torch.bfloat16


@pytest.mark.parametrize("options", ({"memory_efficient": True}, {"drop_rate": 0.2}), ids=str)
def test_a_densenet_that_recomputes_or_drops_does_so_in_training(options, monkeypatch):
    plain = settled(small_densenet(**options))
    model, images = fused_resnet.fuse(copy.deepcopy(plain)), torch.randn(2, 3, 32, 32)
    recomputed, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **kw: recomputed.append(a) or checkpoint(*a, **kw)
    )
    for training in (True, False):
        gradients, calls = [], []
        for module in (plain, model):
            torch.manual_seed(0)
            module.train(training)(images).square().sum().backward()
            gradients.append([p.grad.clone() for p in module.parameters()])
            module.zero_grad()
            calls.append(len(recomputed))
            recomputed.clear()
        assert calls == [5 * ("memory_efficient" in options)] * 2
        for expected, actual in zip(*gradients):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(images.double())
        as_good_as(model(images), plain(images), exact)
    called = []
    monkeypatch.setattr(
        nn.Conv2d, "forward", lambda conv, x: called.append(conv) or conv._conv_forward(x, conv.weight, None)
    )
    with torch.no_grad():
        model(images)
    assert fused_convs(model) and called == [model.features.transition1.conv]  # in a Sequential, which is as it was


# ------------------------------------------------------------------------------------- blocks as they are in the wild


class ComputedNames(nn.Module):
    """mmpretrain: norms under computed names, read through properties."""

    def __init__(self):
        super().__init__()
        self.norm1_name, self.norm2_name = "bn1", "bn2"
        self.conv1, self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        for name in (self.norm1_name, self.norm2_name):
            self.add_module(name, nn.BatchNorm2d(6))
        self.relu, self.with_cp = nn.ReLU(inplace=True), False

    @property
    def norm1(self):
        return getattr(self, self.norm1_name)

    @property
    def norm2(self):
        return getattr(self, self.norm2_name)

    def forward(self, x):
        def inner(x):
            return self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))) + x

        out = torch.utils.checkpoint.checkpoint(inner, x) if self.with_cp and x.requires_grad else inner(x)
        return self.relu(out)


class FaceBlock(nn.Module):
    """Face recognition: BN first, PReLU inside, and no activation after the sum."""

    def __init__(self):
        super().__init__()
        self.bn0, self.bn1, self.bn2 = (nn.BatchNorm2d(6) for _ in range(3))
        self.conv1, self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.prelu = nn.PReLU(6)

    def forward(self, x):
        out = self.prelu(self.bn1(self.conv1(self.bn0(x))))
        out = self.bn2(self.conv2(out))
        out += x
        return out


class KerasStem(nn.Module):
    """Keras: padding at the bottom and the right only, a bias before the norm, eps 1e-3."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 6, 3, stride=2), nn.BatchNorm2d(6, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(F.pad(x, (0, 1, 0, 1)))))


class DlibBlock(nn.Module):
    """dlib: the shortcut is an average pool and zero channels."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + F.pad(F.avg_pool2d(x, 2, 2), (0, 0, 0, 0, 0, 2)))


@pytest.mark.parametrize("block", (ComputedNames, FaceBlock, KerasStem, DlibBlock))
def test_blocks_of_other_houses(block):
    model, x = networks.randomize(block()), torch.randn(2, 6, 8, 6)
    with torch.no_grad():
        plain, exact = model(x), copy.deepcopy(model).double()(x.double())
        as_good_as(fused_resnet.freeze(model, x)(x), plain, exact)
        as_good_as(fused_resnet.fuse(model, strict=True)(x), plain, exact)
    assert fused_convs(model) == [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def trained(model, images):
    """What two steps of SGD make of a model, with the same random numbers each time."""
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.01, momentum=0.9)
    for _ in range(2):
        out = model(images)
        out = out if isinstance(out, torch.Tensor) else next(iter(pytree.tree_leaves(out)))
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()
    return model.eval()


TRAINED = {
    "timm, dropping": timm("resnet10t", drop_block_rate=0.1, drop_path_rate=0.2),
    "timm, squeeze and excitation": timm("resnet10t", block_args={"attn_layer": "se"}),
    "torchvision DenseNet": small_densenet,
    "transformers": transformers_resnet,
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_a_fused_model_is_training_the_model(name):
    plain = settled(TRAINED[name]())
    model = fused_resnet.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 3, 64, 64)
    for network in (plain, model):
        trained(network, x)
    for (key, p), q in zip(plain.state_dict().items(), model.state_dict().values()):
        # the same up to what different rounding grows to in two steps: 2e-5 was seen
        assert networks.error(q, p.double()) < 2e-4 if p.is_floating_point() and p.any() else torch.equal(p, q), key
    pickled = pickle.loads(pickle.dumps(model))
    assert sum(isinstance(module, Fused) for module in pickled.modules()) > 3
    with torch.no_grad():
        for a, b in zip(pytree.tree_leaves(pickled(x)), pytree.tree_leaves(model(x))):
            assert torch.equal(a, b)


def test_frozen_norms_stay_frozen_in_training_mode():
    plain = settled(detection_backbone("resnet18", frozen=True))
    model, x = fused_resnet.fuse(copy.deepcopy(plain)), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        as_good_as(model.train()(x), plain.train()(x), exact)


def test_frozen_norms_under_autocast_give_what_theirs_give():
    """They multiply bf16 by their own fp32 vectors."""
    norm = real_data.torchvision().ops.misc.FrozenBatchNorm2d
    plain = settled(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU()))
    model, x = fused_resnet.fuse(copy.deepcopy(plain)), torch.randn(1, 3, 5, 5)
    assert fused_convs(model) == ["0"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, expected = model(x), plain(x)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected)


def test_a_patched_frozen_norm_is_no_norm(monkeypatch):
    norm = real_data.torchvision().ops.misc.FrozenBatchNorm2d
    model, x = settled(nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.ReLU())), torch.randn(1, 3, 5, 5)
    stock = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: 2 * stock(self, x))
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fused_resnet.freeze(model, x)(x), expected)
        torch.testing.assert_close(fused_resnet.fuse(model)(x), expected)
    assert not fused_convs(model)


def batch_norm_act(activation="relu", drop=None):
    real_data.torchvision()
    norm_act = pytest.importorskip("timm.layers.norm_act", reason="timm is not installed")
    return norm_act.BatchNormAct2d(4, act_layer=activation, apply_act=activation is not None, drop_layer=drop)


def converted_by_timm(function):
    """One with SiLU, as timm's function of this name converts it."""
    norm = batch_norm_act("silu")
    return getattr(__import__("timm").layers, function)(norm)


def detrs_norm():
    real_data.torchvision()
    detr = pytest.importorskip("transformers.models.detr.modeling_detr", reason="transformers is not installed")
    return detr.DetrFrozenBatchNorm2d(4)


NORMS = {  # and the activation that becomes the convolution's
    "timm": (batch_norm_act, "relu"),
    "timm, ReLU6": (functools.partial(batch_norm_act, "relu6"), "relu6"),
    "timm, SiLU": (functools.partial(batch_norm_act, "silu"), "silu"),
    "timm, LeakyReLU": (functools.partial(batch_norm_act, "leaky_relu"), "none"),
    "timm, no activation": (functools.partial(batch_norm_act, None), "none"),
    "timm, dropping": (functools.partial(batch_norm_act, drop=nn.Dropout2d), "relu"),
    "timm, dropping otherwise": (functools.partial(batch_norm_act, drop=nn.Dropout3d), "none"),
    "timm, frozen": (functools.partial(converted_by_timm, "freeze_batch_norm_2d"), "silu"),
    "timm, synchronised": (functools.partial(converted_by_timm, "convert_sync_batchnorm"), "silu"),
    "timm, split": (functools.partial(converted_by_timm, "convert_splitbn_model"), "silu"),
    "transformers": (detrs_norm, "none"),
}


class Summed(nn.Module):
    """relu(norm(conv(x)) + x): a norm with an activation of its own is not part of the sum."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), norm

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + x)


@pytest.mark.parametrize("is_summed", (False, True))
@pytest.mark.parametrize("name", NORMS)
def test_other_peoples_norms_are_folded_with_their_activation(name, is_summed):
    make, activation = NORMS[name]
    norm = make()
    model = settled(Summed(norm) if is_summed else nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm))
    ends_in = [module for module in (getattr(norm, "act", None),) if type(module) not in (type(None), nn.Identity)]
    x = torch.randn(2, 4, 6, 5)
    with torch.no_grad():
        plain, exact = model(x), copy.deepcopy(model).double()(x.double())
        frozen = fused_resnet.freeze(model, x)
        as_good_as(frozen(x), plain, exact)
        (conv,) = frozen_convs(frozen)
        is_last = is_summed and not ends_in
        assert (conv.problem.activation, conv.problem.has_residual) == ("relu" if is_last else activation, is_last)
        assert not any(hasattr(module, "running_var") for module in frozen_modules(frozen))
        fused_resnet.fuse(model, strict=True)
        assert len(fused_convs(model)) == 1
        as_good_as(model(x), plain, exact)
        as_good_as(pickle.loads(pickle.dumps(model))(x), plain, exact)


def _hooked_act(norm):
    norm.act.register_forward_hook(lambda module, args, out: out + 1)


def _another_act(norm):
    norm.act = nn.Tanh().eval()


def _no_act(norm):
    norm.act = nn.Identity().eval()


def _dropping(norm):
    norm.drop = nn.Tanh().eval()


def _hooked_norm(norm):
    norm.register_forward_hook(lambda module, args, out: out + 1)


def _own_forward(norm):
    norm.forward = lambda x: x


def _in_training(norm):
    norm.train()


@pytest.mark.parametrize(
    "change", (_hooked_act, _another_act, _no_act, _dropping, _hooked_norm, _own_forward, _in_training)
)
@pytest.mark.parametrize("apply_act", (True, False))
def test_what_becomes_of_a_norm_with_an_activation_has_its_effect(change, apply_act):
    """Also where the sum was in the convolution's call, and the norm got an activation afterwards."""
    plain = settled(Summed(batch_norm_act("relu" if apply_act else None)))
    model, x = fused_resnet.fuse(copy.deepcopy(plain)), torch.randn(2, 4, 6, 5)
    with torch.no_grad():
        before = plain(x)
        for network in (plain, model):
            change(network.norm)
        expected = plain(x)
        assert (change is _no_act and not apply_act) or not torch.allclose(expected, before, rtol=1e-3)
        torch.testing.assert_close(model(x), expected)
        if change is not _in_training:
            torch.testing.assert_close(fused_resnet.freeze(plain, x)(x), expected)


def test_a_norm_with_an_activation_trains_as_it_is():
    plain = settled(nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm_act("silu", nn.Dropout2d))).train()
    model, x = fused_resnet.fuse(copy.deepcopy(plain)), torch.randn(4, 3, 8, 8)
    for network in (plain, model):
        torch.manual_seed(3)
        network(x).square().sum().backward()
    assert len(fused_convs(model)) == 1
    for (key, p), q in zip(plain.named_parameters(), model.parameters()):
        assert torch.equal(p.grad, q.grad), key
    assert torch.equal(plain[1].running_mean, model[1].running_mean)


def test_a_patched_norm_with_an_activation_is_no_norm(monkeypatch):
    norm = batch_norm_act()
    stock = type(norm).forward
    monkeypatch.setattr(type(norm), "forward", lambda self, x: 2 * stock(self, x))
    model, x = settled(nn.Sequential(nn.Conv2d(3, 4, 1), norm)), torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fused_resnet.freeze(model, x)(x), expected)
        torch.testing.assert_close(fused_resnet.fuse(model)(x), expected)
    assert left_alone(model) == [("the model", "the norm is BatchNormAct2d, not nn.BatchNorm2d")]


def test_norms_with_activations_compile_in_one_graph():
    torch._dynamo.reset()
    model, x = settled(nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm_act("leaky_relu"))), torch.randn(1, 3, 6, 6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = model(x)
        fused_resnet.fuse(model, strict=True)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_transformers_layers_step_aside():
    """A hook on what the adapter bypasses: the containers, and each convolution layer."""
    plain = settled(transformers_resnet())
    model, x = fused_resnet.fuse(copy.deepcopy(plain)), torch.randn(1, 3, 32, 32)
    assert sum(isinstance(module, Adapted) for module in model.modules()) == 3
    names = (
        "encoder.stages.0.layers.0.layer",
        "encoder.stages.1.layers.0.layer.1",
        "encoder.stages.1.layers.1.activation",
    )
    for name in names:
        for network in (plain, model):
            network.get_submodule(name).register_forward_hook(lambda _, args, out: 1.5 * out)
        with torch.no_grad():
            torch.testing.assert_close(model(x).last_hidden_state, plain(x).last_hidden_state, rtol=1e-4, atol=1e-4)


@full
def test_our_se_resnet_is_timms():
    theirs, ours = settled(timm_model("seresnet50")), fused_resnet.models.seresnet50().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
