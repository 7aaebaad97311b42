"""Modules that compute their plain class's forward in fused calls.

A fused module holds exactly what a plain one holds: the same children, parameters, buffers and hooks. Only `forward`
differs. So a module becomes fused by changing its class (`convert`), and plain again by changing it back.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional, cast

import torch
from torch import Tensor, fx, nn

from fused_resnet.nn.blocks import BasicBlock, Bottleneck
from fused_resnet.nn.bypass import why_not_fused
from fused_resnet.nn.call import fused_conv_bn_act
from fused_resnet.nn.norms import is_norm
from fused_resnet.nn.scripting import NotScriptable
from fused_resnet.nn.stock import why_called


def set_class(module: nn.Module, cls: type) -> None:
    """Past the module's own __setattr__, which may do anything."""
    object.__setattr__(module, "__class__", cls)


class Fusion(NamedTuple):
    """What `fuse` keeps of a module, all in the `_fused_resnet` of its __dict__.

    stock_class: the class that it had, where that is not the `plain_class` of the class that it has now.
    """

    backend: str = "auto"
    stock_class: Optional[type[nn.Module]] = None
    calls_downsample: bool = False
    programs: dict[bool, Any] = {}  # by `training`

    def __reduce__(self) -> tuple:
        """Without the programs, which no pickle holds: a copy makes its own (`rewriting`)."""
        return Fusion, self[:3]


class Fused(NotScriptable):
    """A module that computes its plain class's forward another way.

    There are three kinds. `FusedBlock` knows the block, `adapters.Adapted` has a forward registered for it, and
    `rewriting.Rewritten` has one made from its own. A kind adds `fused_forward` and `fused_convs`.
    """

    plain_class: type[nn.Module]
    _fused_resnet = Fusion()

    @property
    def backend(self) -> str:
        """Asked for by every convolution that it computes."""
        return self._fused_resnet.backend

    @backend.setter
    def backend(self, backend: str) -> None:
        self.__dict__["_fused_resnet"] = self._fused_resnet._replace(backend=backend)

    def fused_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the plain forward computes, or NotImplemented to have that called."""
        raise NotImplementedError

    def fused_convs(self) -> list[str]:
        """Names, within this module, of the convolutions that it computes together with what follows them."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.fused_forward(*args, **kwargs)
        return plain_class_of(self).forward(self, *args, **kwargs) if out is NotImplemented else out


def plain_class_of(module: Any) -> type[nn.Module]:
    """The class that a module has when it is not fused."""
    cls: Any = type(module)
    return (module._fused_resnet.stock_class or cls.plain_class) if issubclass(cls, Fused) else cls


class FusedBlock(Fused):
    """A residual block that is known: forward through `functional`, or the plain class's where that is unsafe.

    In eval mode each conv+BN(+add)+ReLU is one call that reads the live parameters, so weights never go stale. A BN
    in training mode runs as it is, and the residual add and ReLU are one call. Whenever a child was replaced, hooked
    or parametrized since, the block runs as its plain class. A projection shortcut is computed in the same way, or is
    called where `Fusion.calls_downsample` says so.
    """

    stage_names: tuple[tuple[str, str], ...]
    relu: nn.ReLU
    downsample: Optional[nn.Module]

    def forward(self, x: Tensor) -> Tensor:  # exporters read the signature
        return super().forward(x)

    def fused_forward(self, x: Tensor) -> Any:
        if isinstance(x, fx.Proxy):  # a symbolic trace is the plain block's; reading a parameter here would be in it
            return NotImplemented
        stages, relu = [(self._child(conv), self._child(bn)) for conv, bn in self.stage_names], self._child("relu")
        if why_not_fused(relu, stages) is not None:
            return NotImplemented
        out = x
        for conv, bn in stages[:-1]:
            out = fused_conv_bn_act(out, conv, bn, relu, None, self.backend)
        # after the main path has read x, as in the plain block: a shortcut of somebody's own may write to it
        identity = x if self.downsample is None else self._shortcut(self.downsample, x)
        return fused_conv_bn_act(out, *stages[-1], relu, identity, self.backend, "out += residual")

    def _child(self, name: str) -> Any:
        """getattr, which in an nn.Module looks a child up where all else was looked up in vain."""
        child = None if torch.compiler.is_compiling() else self.__dict__["_modules"].get(name)
        return getattr(self, name) if child is None else child

    def fused_convs(self) -> list[str]:
        return [conv for conv, _ in self.stage_names] + (["downsample.0"] if self.fused_shortcut() else [])

    def fused_shortcut(self) -> Optional[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """conv and bn of the projection, where the block computes it."""
        return None if self._fused_resnet.calls_downsample else fused_shortcut(self.downsample)

    def _shortcut(self, downsample: nn.Module, x: Tensor) -> Tensor:
        pair = self.fused_shortcut()
        return downsample(x) if pair is None else fused_conv_bn_act(x, *pair, None, None, self.backend)


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

    @property
    def backend(self) -> str:
        """What `fuse` was asked for, until `unfuse`; else what was set, or "auto"."""
        own = self.__dict__
        return own["_fused_resnet"].backend if "_fused_resnet" in own else own.get("backend", "auto")

    @backend.setter
    def backend(self, backend: str) -> None:
        own = self.__dict__
        if "_fused_resnet" in own:
            own["_fused_resnet"] = own["_fused_resnet"]._replace(backend=backend)
        else:
            own["backend"] = backend

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        conv, *rest = self
        bn = rest.pop(0) if rest and self.has_norm else None
        act = rest.pop(0) if rest else None
        if isinstance(x, fx.Proxy) or rest or why_not_fused(act, [(conv, bn)]) is not None:
            return self._plain_forward(x, residual, act)
        return fused_conv_bn_act(x, conv, bn, act, residual, self.backend)

    def fused_convs(self) -> list[str]:
        """As `Fused.fused_convs`; a convolution alone is not fused."""
        return ["0"] if len(self) > 1 else []

    def _plain_forward(self, x: Tensor, residual: Optional[Tensor], act: Optional[nn.Module]) -> Tensor:
        for layer in self:
            if layer is act and residual is not None:
                x = x + residual
            x = layer(x)
        return x + residual if act is None and residual is not None else x


def fused_shortcut(downsample: Optional[nn.Module]) -> Optional[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """conv and bn of a projection that is exactly Sequential(conv, bn) and may be bypassed; None of any other."""
    if type(downsample) is not nn.Sequential or len(downsample) != 2 or why_called(downsample) is not None:
        return None
    conv, bn = cast(tuple[nn.Conv2d, nn.BatchNorm2d], tuple(downsample))
    return (conv, bn) if is_norm(bn) and why_not_fused(None, [(conv, bn)]) is None else None
