"""Residual blocks, plain and fused, with torchvision's constructors, attributes and keys.

A fused block holds exactly what its plain class holds: the same children, parameters, buffers and hooks. Only
`forward` differs, so a block becomes fused by changing its class (see `convert`) and plain again by changing it back.
"""

from __future__ import annotations

import fnmatch
import functools
import operator
import sys
from typing import Any, Callable, NamedTuple, Optional, Union, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

from fused_resnet import functional
from fused_resnet.operators.library import AUTOCAST_DEVICES
from fused_resnet.operators.problem import ACTIVATIONS

# What calling a module runs of it, the second in a convolution; one in its __dict__ replaces its class's.
_CALLED = ("forward", "_conv_forward")
_ACTIVATION_OF = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Identity: "none"}
# They return their input itself; dropout in eval mode.
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# How a forward adds a residual to out = bn(conv(x)). An augmented sum has the dtype and shape of what it writes to.
_SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "out + residual": operator.add,
    "out += residual": operator.iadd,
    "residual += out": lambda out, residual: operator.iadd(residual, out),
}


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), both filters 3x3. He et al. 2015 (arXiv 1512.03385).

    x: (N, inplanes, H, W) -> (N, planes, H/stride, W/stride). The widths of the forward pass are those of the
    convolutions. So a pruned block (another inner width) or one with convolution biases works as it is.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: Optional[nn.Module] = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Optional[Callable[..., nn.Module]] = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicBlock supports groups=1 and base_width=64, got {groups} and {base_width}.")
        if dilation > 1:
            raise NotImplementedError(f"BasicBlock supports dilation=1, got {dilation}; Bottleneck supports any.")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand, each with BN, plus the shortcut. x: (N, inplanes, H, W) -> (N, 4*planes, ...).

    The stride sits in the 3x3 (torchvision, "v1.5"). `stride_in_1x1` puts it into the first 1x1, as in the paper and in
    the weights of Caffe and Keras.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: Optional[nn.Module] = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Optional[Callable[..., nn.Module]] = None,
        *,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width, stride if stride_in_1x1 else 1)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, 1 if stride_in_1x1 else stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def set_class(module: nn.Module, cls: type) -> None:
    """Past the module's own __setattr__, which may do anything."""
    object.__setattr__(module, "__class__", cls)


class NotScriptable:
    """Modules whose forward is no TorchScript, and which say so."""

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: unfuse or unfreeze the model first, or use "
            "torch.export or torch.jit.trace on the fused one."
        )


class FusedBlock(NotScriptable):
    """What the fused blocks share: forward through `functional`, or the plain class's forward where that is unsafe.

    In eval mode each conv+BN(+add)+ReLU is one call that reads the live parameters, so weights never go stale. A BN
    in training mode runs as it is, and the residual add and ReLU are one call. Whenever a child was replaced, hooked
    or parametrized since, the block runs as its plain class. A projection shortcut is computed in the same way, or is
    called where `calls_downsample` says so.
    """

    backend = "auto"
    calls_downsample = False
    plain_class: type[nn.Module]
    stage_names: tuple[tuple[str, str], ...]
    relu: nn.ReLU
    downsample: Optional[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):  # a symbolic trace is the plain block's; reading a parameter here would be in it
            return self.__dict__.get("_stock_class", self.plain_class).forward(self, x)
        stages = [(getattr(self, conv), getattr(self, bn)) for conv, bn in self.stage_names]
        if why_not_fused(self.relu, stages) is not None:
            return self.plain_class.forward(self, x)
        out = x
        for conv, bn in stages[:-1]:
            out = _conv_bn_act(out, conv, bn, self.relu, None, self.backend)
        # after the main path has read x, as in the plain block: a shortcut of somebody's own may write to it
        identity = x if self.downsample is None else self._shortcut(self.downsample, x)
        return _conv_bn_act(out, *stages[-1], self.relu, identity, self.backend, "out += residual")

    def fused_shortcut(self) -> Optional[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """conv and bn of the projection, where the block computes it."""
        return None if self.calls_downsample else fused_shortcut(self.downsample)

    def _shortcut(self, downsample: nn.Module, x: Tensor) -> Tensor:
        pair = self.fused_shortcut()
        return downsample(x) if pair is None else _conv_bn_act(x, *pair, None, None, self.backend)


class FusedBasicBlock(FusedBlock, BasicBlock):
    __doc__ = BasicBlock.__doc__
    plain_class = BasicBlock
    stage_names = (("conv1", "bn1"), ("conv2", "bn2"))


class FusedBottleneck(FusedBlock, Bottleneck):
    __doc__ = Bottleneck.__doc__
    plain_class = Bottleneck
    stage_names = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))


class ConvBNAct(NotScriptable, nn.Sequential):
    """act(BN(conv(x)) + residual): torchvision's Conv2dNormActivation with its constructor and keys, and a residual.

    padding=None means "same" for odd filters and stride 1; bias=None means a bias exactly when there is no norm.
    activation_layer: nn.ReLU, nn.ReLU6, nn.SiLU or None. x: (N, in_channels, H, W). What torch.nn takes besides (an
    unbatched x, a residual that broadcasts or has a wider dtype) is computed layer by layer.
    """

    backend = "auto"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: Optional[int] = None,
        groups: int = 1,
        norm_layer: Optional[Callable[..., nn.Module]] = nn.BatchNorm2d,
        activation_layer: Optional[Callable[..., nn.Module]] = nn.ReLU,
        dilation: int = 1,
        inplace: Optional[bool] = True,
        bias: Optional[bool] = None,
    ) -> None:
        if padding is None:
            padding = (kernel_size - 1) // 2 * dilation
        if bias is None:
            bias = norm_layer is None
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=bias)
        ]
        if norm_layer is not None:
            layers.append(norm_layer(out_channels))
        if activation_layer is not None:
            layers.append(activation_layer(**({} if inplace is None else {"inplace": inplace})))
        super().__init__(*layers)
        self.has_norm = norm_layer is not None

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        conv, *rest = self
        bn = rest.pop(0) if rest and self.has_norm else None
        act = rest.pop(0) if rest else None
        if isinstance(x, fx.Proxy) or rest or why_not_fused(act, [(conv, bn)]) is not None:
            return self._plain_forward(x, residual, act)
        return _conv_bn_act(x, conv, bn, act, residual, self.backend)

    def _plain_forward(self, x: Tensor, residual: Optional[Tensor], act: Optional[nn.Module]) -> Tensor:
        for layer in self:
            if layer is act and residual is not None:
                x = x + residual
            x = layer(x)
        return x + residual if act is None and residual is not None else x


# ---------------------------------------------------------------------------------------------------------------- norms


class Norm(NamedTuple):
    """A norm as a value: what a convolution is folded with, or computes live in its own call.

    (x - running_mean) / sqrt(running_var + eps) * weight + bias, then the modules that the norm calls with the result.
    Called, it is F.batch_norm in eval mode: it stands for one that a forward calls itself.
    """

    weight: Optional[Tensor]
    bias: Optional[Tensor]
    running_mean: Tensor
    running_var: Tensor
    eps: float
    then: tuple[nn.Module, ...] = ()
    training: bool = False
    promotes: bool = False  # the result has the wider dtype of x's and the vectors', not x's

    def __call__(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    @property
    def activation(self) -> tuple[str, tuple[nn.Module, ...]]:
        """The activation that a convolution may compute with the norm, and the modules to be called after that."""
        if self.then and type(self.then[0]) in _ACTIVATION_OF and why_called(self.then[0]) is None:
            return _ACTIVATION_OF[type(self.then[0])], self.then[1:]
        return "none", self.then


class _NormKind(NamedTuple):
    """What the forward of a class of norms does. then: the children that it calls with the result, where it has them.

    has_modes: F.batch_norm, with the batch's statistics in training mode; others multiply by their buffers as they are.
    eps: where the forward has it as a constant.
    """

    then: tuple[str, ...] = ()
    has_modes: bool = True
    eps: Optional[float] = None


_THEN = ("drop", "act")
_FROZEN_READS = "weight bias running_mean running_var reshape rsqrt"
_BATCH_NORM_READS = "F batch_norm weight bias running_mean running_var eps"
_MODE_READS = "training momentum track_running_stats num_batches_tracked add_ float"
# Other people's norms: the class, and the names that its forward reads. Nothing is imported to recognise them.
_KNOWN_NORMS = (
    ("torchvision.ops.misc.FrozenBatchNorm2d", f"{_FROZEN_READS} eps", _NormKind(has_modes=False)),
    ("timm.layers.norm_act.FrozenBatchNormAct2d", f"{_FROZEN_READS} eps drop act", _NormKind(_THEN, has_modes=False)),
    (
        "timm.layers.norm_act.BatchNormAct2d",
        f"{_BATCH_NORM_READS} {_MODE_READS} _assert ndim drop act",
        _NormKind(_THEN),
    ),
    ("timm.layers.norm_act.SyncBatchNormAct", "super forward hasattr drop act", _NormKind(_THEN)),
    (
        "timm.layers.split_batchnorm.SplitBatchNorm2d",
        "training shape num_splits split super forward enumerate aux_bn append torch cat hasattr drop act",
        _NormKind(_THEN),
    ),
    ("transformers.models.*FrozenBatchNorm2d", _FROZEN_READS, _NormKind(has_modes=False, eps=1e-5)),
    (
        "detectron2.layers.batch_norm.FrozenBatchNorm2d",
        f"{_BATCH_NORM_READS} requires_grad torch backends cudnn enabled",
        _NormKind(has_modes=False),
    ),
)


def norm_of(bn: Any) -> Optional[Norm]:
    """A norm as a value, as it is now; None of a module that is none (`is_norm`)."""
    if bn is None or type(bn) is Norm:
        return bn
    if type(bn) is nn.BatchNorm2d:  # at once: this runs at every call
        weight, bias, mean, var, eps = _attributes(bn, Norm._fields[:5])
        return Norm(weight, bias, mean, var, eps, (), bn.training)
    kind = _norm_kind(bn)
    if kind is None:
        return None
    called = (getattr(bn, name) for name in kind.then if hasattr(bn, name))
    then = tuple(module for module in called if not returns_its_input(module))
    eps = bn.eps if kind.eps is None else kind.eps
    vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return Norm(*vectors, eps, then, kind.has_modes and bn.training, not kind.has_modes)


def _attributes(module: nn.Module, names: tuple[str, ...]) -> list:
    """Attributes that a module's class has none of. nn.Module looks parameters and buffers up in a microsecond each."""
    if not torch.compiler.is_compiling():  # Dynamo reads them one by one
        own = module.__dict__
        found = own["_buffers"] | own["_parameters"] | own
        try:
            return [found[name] for name in names]
        except KeyError:
            pass
    return [getattr(module, name) for name in names]


def why_not_bn(bn: Any) -> Optional[str]:
    """None of a norm that has a value in eval mode, else the reason."""
    norm = norm_of(bn)
    if norm is None:
        return f"the norm is {type(bn).__name__}, not nn.BatchNorm2d"
    if norm.running_mean is None or norm.running_var is None:
        return f"the {type(bn).__name__} keeps no running statistics"
    return None


def is_norm(module: Any) -> bool:
    """Whether `norm_of` knows it: nn.BatchNorm2d, nn.SyncBatchNorm, subclasses with the same forward, other people's
    whose forward is the one they were written with, and a Norm."""
    return type(module) in (nn.BatchNorm2d, Norm) or _norm_kind(module) is not None


def may_be_norm(module: Any) -> bool:
    """Whether a module looks like a batch norm, whatever its forward does."""
    is_torchs = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return is_torchs or isinstance(module, nn.Module) and isinstance(getattr(module, "running_var", None), Tensor)


def _norm_kind(module: Any) -> Optional[_NormKind]:
    cls = type(module)
    return _kind_of_class(cls, getattr(cls, "forward", None))


def _kind_of_class(cls: Any, forward: Any) -> Optional[_NormKind]:
    return _kind_by_code(cls, forward)


# what torch.compiler.assume_constant_result sets, without the import of Dynamo, which cannot follow `_kind_by_code`
_kind_of_class._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=None)
def _kind_by_code(cls: Any, forward: Any) -> Optional[_NormKind]:
    """forward: the class's own now; a class that gets another one is looked at again."""
    is_called_plainly = issubclass(cls, nn.Module) and cls.__call__ is nn.Module.__call__
    # a property or constant in the place of what modules keep: a parametrization, say
    if not is_called_plainly or any(hasattr(cls, name) for name in Norm._fields[:5]):
        return None
    if forward is nn.SyncBatchNorm.forward:
        return _NormKind() if cls._check_input_dim is nn.SyncBatchNorm._check_input_dim else None
    if forward is nn.BatchNorm2d.forward:
        return _NormKind() if _takes_images(cls._check_input_dim) else None
    written: Any = next((base for base in cls.__mro__ if base.__dict__.get("forward") is forward), None)
    for name, reads, kind in _KNOWN_NORMS if written is not None else ():
        is_named = fnmatch.fnmatchcase(f"{written.__module__}.{written.__qualname__}", name)
        if is_named and has_stock_code(written, forward, frozenset(reads.split())):
            return kind if kind.eps in (None, *forward.__code__.co_consts) else None
    return None


def _takes_images(check: Any) -> bool:
    """Whether a norm's check of its input is BatchNorm2d's, or one that names nothing and so does nothing (mmcv's)."""
    code = getattr(check, "__code__", None)
    return check is nn.BatchNorm2d._check_input_dim or code is not None and not code.co_names + code.co_freevars


# ------------------------------------------------------------------------------------------------------- stepping aside


def why_not_fused(act: Optional[nn.Module], stages: list) -> Optional[str]:
    """None when this activation and these (conv, bn) pairs may be bypassed, else the reason. Cheap: runs every call."""
    if torch_module._has_any_global_hook():
        return "a global module hook is installed"
    for child in (act, *(child for stage in stages for child in stage)):
        reason = None if child is None or type(child) is Norm else why_called(child)
        if reason is not None:
            return reason
    if act is not None and type(act) not in _ACTIVATION_OF:
        return f"the activation is {type(act).__name__}, not nn.ReLU, nn.ReLU6 or nn.SiLU"
    for conv, bn in stages:
        reason = why_not_conv_bn(conv, bn)
        if reason is not None:
            return reason
        if act is not None and type(bn) is not nn.BatchNorm2d and bn is not None and cast(Norm, norm_of(bn)).then:
            return f"the {type(bn).__name__} has an activation of its own"
    return None


def why_not_conv_bn(conv: nn.Module, bn: Union[nn.Module, Norm, None]) -> Optional[str]:
    """None when conv and bn are plain ones whose parameters may be read instead of calling them."""
    if type(conv) is not nn.Conv2d:
        return f"the convolution is {type(conv).__name__}, not nn.Conv2d"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding_mode={conv.padding_mode!r} with padding={conv.padding!r}"
    reason = None if bn is None else why_not_bn(bn)
    if reason is not None:
        return reason
    if not _is_plain_tensor(conv.weight):
        return f"the weight is a {type(conv.weight).__name__}, not a plain parameter"
    return None


def has_stock_code(cls: Any, forward: Optional[Callable], reads: frozenset[str]) -> bool:
    """Whether `forward` is the one that this class was written with, by all that can be seen without its source.

    A patched forward may keep its name and module (functools.wraps). It does not keep both the attributes that its code
    reads and the file that its code comes from. The stock one comes from the constructor's file, or from the module's
    where the class has no constructor.
    """
    code, constructor = getattr(forward, "__code__", None), getattr(cls.__init__, "__code__", None)
    if forward is None or code is None or constructor is None or cls.__call__ is not nn.Module.__call__:
        return False
    has_own = "__init__" in cls.__dict__
    file = constructor.co_filename if has_own else getattr(sys.modules.get(cls.__module__), "__file__", None)
    return (
        forward.__module__ == cls.__module__
        and forward.__qualname__ == f"{cls.__qualname__}.forward"
        and code.co_filename == file
        and set(code.co_names) == reads
    )


def conv_bn_act(
    x: Tensor,
    conv: nn.Module,
    bn: Union[nn.Module, Norm, None] = None,
    act: Union[nn.Module, str, None] = None,
    residual: Optional[Tensor] = None,
    backend: str = "auto",
    sum: str = "out + residual",
) -> Tensor:
    """act(bn(conv(x)) + residual), in one call where these children may be bypassed, else by calling each of them.

    For forwards that are written or generated to replace a model's own: whatever a child has become since (hooked,
    replaced, parametrized), the result is the stock one. bn: a module, with the activation that it may have of its own,
    or a Norm. act: a module, the name of an activation, or None. residual: whatever may be added to bn(conv(x)). sum:
    how the stock forward adds it, which decides the dtype: "out + residual", "out += residual" or "residual += out".
    """
    module = act if isinstance(act, nn.Module) else None
    if not isinstance(x, fx.Proxy) and why_not_fused(module, [(conv, bn)]) is None:
        return _conv_bn_act(x, conv, bn, act, residual, backend, sum)
    out = conv(x) if bn is None else bn(conv(x))
    return _activated(out if residual is None else _SUMS[sum](out, residual), act)


def _conv_bn_act(
    x: Tensor,
    conv: Any,
    bn: Any,
    act: Union[nn.Module, str, None],
    residual: Optional[Tensor],
    backend: str,
    sum: str = "out + residual",
) -> Tensor:
    """conv_bn_act of children that may be bypassed, in the memory layout that they would give.

    They are called where the operator computes something else, and for what it refuses: they take it, or raise torch's
    own error.
    """
    norm, acts = norm_of(bn), act
    then: tuple[nn.Module, ...] = ()
    activation = act if isinstance(act, str) else "none" if act is None else _ACTIVATION_OF[type(act)]
    is_training = norm is not None and norm.training
    # of an empty batch only the strides are left, and ATen's have rules of their own
    fits = isinstance(x, Tensor) and x.dim() == 4 and x.shape[0] > 0 and not is_training
    if fits and norm is not None and norm.then:
        fits = activation == "none" and residual is None  # which come after the norm's own
        if fits:
            activation, then = norm.activation
            acts = norm.then[0] if len(then) < len(norm.then) else None
    if fits:
        weight, bias, cast_to = conv.weight, conv.bias, _autocast_dtype(x)
        operands = (x, weight, *((None,) * 4 if norm is None else norm[:4]))
        options = dict(
            eps=1e-5 if norm is None else norm.eps, bias=bias, residual=residual, stride=conv.stride,
            padding=conv.padding, dilation=conv.dilation, groups=conv.groups, activation=activation,
        )  # fmt: skip
        try:
            shape = _output_shape(x, weight, conv)
        except (TypeError, ValueError, ZeroDivisionError):
            fits = False
        fits = fits and _children_take(x, bias, norm, cast_to) and _fits(residual, x, shape, cast_to, sum)
        try:
            if fits:
                is_last = _gives_channels_last(x, weight, shape, norm, acts, residual, sum)
                out = functional.conv_bn_act(*operands, **options, backend=backend, channels_last=is_last)
        except (TypeError, ValueError):
            if functional.why_refused(*operands, **options) is None:
                raise  # not over what it was given
            fits = False
    if fits:
        for module in then:
            out = module(out)
        return out
    out = conv(x) if bn is None else bn(conv(x))
    if is_training and activation == "relu" and _is_alike(residual, out):
        return functional.add_relu(*((residual, out) if sum == "residual += out" else (out, residual)))
    return _activated(out if residual is None else _SUMS[sum](out, residual), act)


def _activated(out: Tensor, act: Union[nn.Module, str, None]) -> Tensor:
    return functional.activate(out, act) if isinstance(act, str) else out if act is None else act(out)


def _autocast_dtype(x: Tensor) -> Optional[torch.dtype]:
    """What autocast casts a convolution's operands to, or None where it does not."""
    device = x.device.type
    casts = device in AUTOCAST_DEVICES and x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else None


def _output_shape(x: Tensor, weight: Tensor, conv: Any) -> tuple[int, int, int, int]:
    """(N, K, P, Q). Raises TypeError or ValueError where a parameter of the convolution is no pair."""
    (N, _, H, W), (K, _, R, S) = x.shape, weight.shape
    (u, v), (pad_h, pad_w), (dilation_h, dilation_w) = conv.stride, conv.padding, conv.dilation
    P, Q = H + 2 * pad_h - dilation_h * (R - 1) - 1, W + 2 * pad_w - dilation_w * (S - 1) - 1
    return N, K, P // u + 1, Q // v + 1


def _children_take(x: Tensor, bias: Optional[Tensor], norm: Optional[Norm], cast_to: Optional[torch.dtype]) -> bool:
    """Whether torch's convolution and norm take parameters of these dtypes, and give the convolution's. The operator,
    which computes in fp32 whatever comes, takes more."""
    dtype = x.dtype
    if bias is not None and bias.dtype != dtype and (cast_to is None or bias.dtype == torch.float64):
        return False
    if cast_to not in (None, dtype) and 0 in x.stride():
        return False  # autocast's copy of an expanded tensor has a layout of its own
    if norm is None:
        return True
    dtype, (gamma, beta, mean, var) = cast_to or dtype, norm[:4]
    if (mean.requires_grad or var.requires_grad) and torch.is_grad_enabled():
        return False  # batch_norm refuses them, FrozenBatchNorm2d gives them a gradient
    own = mean.dtype
    # a frozen norm multiplies by its buffers as they are, so wider ones give a wider result
    is_taken = own == dtype or own == torch.float32 and dtype != torch.float64 and not norm.promotes
    is_affine_alike = (gamma is None or gamma.dtype == own) and (beta is None or beta.dtype == own)
    return is_taken and var.dtype == own and is_affine_alike


def _fits(residual: Any, x: Tensor, shape: tuple, cast_to: Optional[torch.dtype], sum: str) -> bool:
    """Whether the residual has the shape of the convolution's output, and the sum its dtype."""
    if residual is None:
        return True
    if not isinstance(residual, Tensor):
        return False
    if residual.dtype != (cast_to or x.dtype):
        # autocast casts the residual, which shows in the dtype of a sum that is a new tensor
        is_castable = residual.is_floating_point() and residual.dtype != torch.float64
        if not (cast_to is not None and is_castable and sum == "out += residual"):
            return False
    return residual.shape == shape


def _is_alike(residual: Any, out: Tensor) -> bool:
    """Whether an addition to out neither broadcasts nor converts, under autocast either."""
    if not isinstance(residual, Tensor) or residual.shape != out.shape or residual.device != out.device:
        return False
    return residual.dtype == out.dtype == (_autocast_dtype(out) or out.dtype)


def _gives_channels_last(
    x: Tensor, weight: Tensor, shape: tuple, norm: Any, act: Any, residual: Optional[Tensor], sum: str
) -> bool:
    """Whether the children's result would lie in channels_last memory, else it would in NCHW: ATen's rules.

    A new sum of two layouts may give a dimension of size 1 yet another stride.
    """
    _, K, P, Q = shape
    is_new = norm is not None or residual is not None and sum == "out + residual"
    if residual is not None and sum == "residual += out":
        is_asked, is_new = _has_channels_last_strides(residual), False
    else:
        is_asked = _has_channels_last_strides(x) or _has_channels_last_strides(weight)
        if is_asked and x.dtype == torch.float64 and x.is_cuda:
            return False  # cuDNN has no such kernel in channels_last
    if not is_asked or K > 1 and (P > 1 or Q > 1):
        return is_asked
    # Both are the same memory: of ATen's functions that make new tensors only hardtanh keeps channels_last's strides.
    in_place = act in (None, "relu6") or type(act) in (nn.Identity, nn.ReLU6) or getattr(act, "inplace", False)
    return in_place and not is_new


def _has_channels_last_strides(tensor: Tensor) -> bool:
    """Whether ATen takes a tensor of 4 dimensions for channels_last, by its strides alone
    (c10::is_channels_last_strides_2d: of what is both, a new tensor is NCHW)."""
    (_, C, H, W), (n, c, h, w) = tensor.shape, tensor.stride()
    return 0 < c and c * C <= w and w * W <= h and h * H <= n and h * H != c


def fused_shortcut(downsample: Optional[nn.Module]) -> Optional[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """conv and bn of a projection that is exactly Sequential(conv, bn) and may be bypassed; None of any other."""
    if type(downsample) is not nn.Sequential or len(downsample) != 2 or why_called(downsample) is not None:
        return None
    conv, bn = cast(tuple[nn.Conv2d, nn.BatchNorm2d], tuple(downsample))
    return (conv, bn) if is_norm(bn) and why_not_fused(None, [(conv, bn)]) is None else None


def why_called(module: nn.Module) -> Optional[str]:
    """Why calling this module may do more than the forward of its class, or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{type(module).__name__} has hooks"
    replaced = replaced_call(module)
    return None if replaced is None else f"the {replaced} of {type(module).__name__} was replaced"


def has_stock_call(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else: no hooks, no forward of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or torch_module._has_any_global_hook()
    return not hooks and replaced_call(module) is None


def returns_its_input(module: Optional[nn.Module]) -> bool:
    """Whether calling this module, as it is now, does nothing."""
    if module is None or type(module) not in _IDENTITIES or not has_stock_call(module):
        return False
    return type(module) is nn.Identity or not module.training


def replaced_call(module: nn.Module) -> Optional[str]:
    """The method that calling a module runs, of its own instead of its class's, or None."""
    for name in _CALLED:  # a loop, since torch 2.11's Dynamo can ask __dict__ for one name only
        if name in module.__dict__:
            return name
    return None


def _is_plain_tensor(value) -> bool:
    return type(value) in (nn.Parameter, torch.Tensor, FakeTensor)  # torch.export shows parameters as fake tensors


assert set(_ACTIVATION_OF.values()) == set(ACTIVATIONS)
