"""The tensors of one call, in the order of the operator's schema."""

from __future__ import annotations

from typing import NamedTuple, Optional

from torch import Tensor

from fused_resnet.operators.quantized import Epilogue

VECTORS = ("bn_weight", "bn_bias", "bn_mean", "bn_var", "bias")


class ConvOperands(NamedTuple):
    """The tensors of one conv_bn_act call. Vectors have length K; a None vector drops out of the formula."""

    x: Tensor
    weight: Tensor
    bn_weight: Optional[Tensor] = None
    bn_bias: Optional[Tensor] = None
    bn_mean: Optional[Tensor] = None
    bn_var: Optional[Tensor] = None
    eps: float = 1e-5
    bias: Optional[Tensor] = None
    residual: Optional[Tensor] = None

    @property
    def bn_vectors(self) -> dict[str, Optional[Tensor]]:
        return {name: getattr(self, name) for name in VECTORS[:4]}

    def map(self, fn) -> "ConvOperands":
        """The same operands with `fn` applied to every tensor among them."""
        return ConvOperands(*(fn(value) if isinstance(value, Tensor) else value for value in self))


class BnActOperands(NamedTuple):
    """The tensors of one bn_act call. Without mean and var the batch's are computed: training. eps is one more."""

    x: Tensor
    mean: Optional[Tensor] = None
    var: Optional[Tensor] = None
    weight: Optional[Tensor] = None
    bias: Optional[Tensor] = None
    residual: Optional[Tensor] = None
    eps: float = 1e-5

    @property
    def vectors(self) -> dict[str, Optional[Tensor]]:
        return {name: getattr(self, name) for name in BnActOperands._fields[1:5]}

    def map(self, fn) -> "BnActOperands":
        """The same operands with `fn` applied to every tensor among them."""
        return BnActOperands(*(fn(value) if isinstance(value, Tensor) else value for value in self))


class ChainOperands(NamedTuple):
    """The tensors of one bottleneck_chain call: folded weights, each with its bias. The last two come together."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor
    reduce_weight: Optional[Tensor] = None
    reduce_bias: Optional[Tensor] = None

    def map(self, fn) -> "ChainOperands":
        """The same operands with `fn` applied to every tensor among them."""
        return ChainOperands(*(fn(value) if isinstance(value, Tensor) else value for value in self))

    def of_filter(self) -> ConvOperands:
        """The 3x3's."""
        return ConvOperands(self.x, self.weight, bias=self.bias)

    def of_expansion(self, t: Tensor) -> ConvOperands:
        """The 1x1's behind it, t being its result."""
        return ConvOperands(t, self.expand_weight, bias=self.expand_bias, residual=self.residual)

    def of_reduction(self, y: Tensor) -> ConvOperands:
        """The next block's 1x1's, where there is one."""
        assert self.reduce_weight is not None
        return ConvOperands(y, self.reduce_weight, bias=self.reduce_bias)


class Int8Operands(NamedTuple):
    """The tensors of one convolution of bytes, `quantized.conv_act`'s: u8 or s8 activations, s8 weights. Or all e4m3.

    filter_sums: (K,) int32, the sum of each filter, for kernels that need it with u8 activations. Without it they
    compute it in each call.
    """

    x: Tensor
    weight: Tensor
    epilogue: Epilogue
    residual: Optional[Tensor] = None
    filter_sums: Optional[Tensor] = None

    def map(self, fn) -> "Int8Operands":
        """The same operands with `fn` applied to every tensor among them, and to the epilogue's."""
        multiplier, bias, *rest = self.epilogue
        x, weight, _, residual, filter_sums = (fn(one) if isinstance(one, Tensor) else one for one in self)
        return Int8Operands(x, weight, Epilogue(fn(multiplier), fn(bias), *rest), residual, filter_sums)


NUM_OPERANDS = len(ConvOperands._fields)


def split_arguments(args) -> tuple:
    """conv_bn_act's arguments in a row as (ConvOperands, stride, padding, dilation, groups, activation)."""
    stride, padding, dilation, groups, activation, _ = args[NUM_OPERANDS:]
    pairs = (tuple(stride), tuple(padding), tuple(dilation))
    return ConvOperands(*args[:NUM_OPERANDS]), *pairs, groups, activation
