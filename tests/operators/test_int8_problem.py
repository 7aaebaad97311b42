"""A convolution of bytes as a problem: what it is, and every refusal, by its message."""

import pytest
import torch

from fused_resnet.choosing.quantized import quantized_operands
from fused_resnet.operators.describe import conv_int8_problem
from fused_resnet.operators.problem import parsed_problem

TEXT = "2x6x5x7 -> 8, 3x3 p1 g2 uint8 bias+add relu"
WINDOW = ((1, 1), (1, 1), (1, 1), 2, "relu")


def operands():
    return quantized_operands(parsed_problem(TEXT, "cpu"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("activation, output", [("none", torch.int8), ("relu", torch.uint8), ("relu6", torch.uint8)])
def test_the_problem_is_what_its_text_says(dtype, activation, output):
    text = TEXT.replace("uint8", str(dtype)[6:]).replace("relu", activation)
    p = parsed_problem(text, "cpu")
    assert str(p) == text and (p.op, p.dtype, p.output_dtype) == ("conv_int8", dtype, output)
    assert conv_int8_problem(quantized_operands(p), *WINDOW[:4], activation) == p
    assert p._replace(dtype=torch.float16).op == "conv_bn_act"


def test_operands_are_mapped_with_their_epilogue():
    o = operands()
    o = o._replace(filter_sums=torch.zeros(8, dtype=torch.int32))
    on_meta = o.map(lambda tensor: tensor.to("meta"))
    tensors = [*on_meta[:2], *on_meta[3:], *on_meta.epilogue[:2]]
    assert all(tensor.is_meta for tensor in tensors) and on_meta.epilogue[2:] == o.epilogue[2:]


@pytest.mark.parametrize(
    "spoilt, error, message",
    [
        (dict(x=torch.zeros(2, 6, 5, 7)), TypeError, "x has dtype float32; it may be uint8, int8"),
        (dict(weight=torch.zeros(8, 3, 3, 3, dtype=torch.uint8)), TypeError, "weight has dtype uint8; it may be int8"),
        (dict(residual=torch.zeros(2, 8, 5, 7)), TypeError, "residual has dtype float32; it may be uint8, int8"),
        (dict(filter_sums=torch.zeros(8)), TypeError, "filter_sums has dtype float32; it may be int32"),
        (dict(multiplier=torch.zeros(8).double()), TypeError, "multiplier has dtype float64; it may be float32"),
        (dict(bias=torch.zeros(8, device="meta")), TypeError, "bias is on meta but x is on cpu"),
        (dict(bias=torch.zeros(7)), ValueError, "bias must have shape (8,), one value per output channel, got (7,)"),
        (dict(x=torch.zeros(6, 5, 7, dtype=torch.uint8)), ValueError, "x must have 4 dimensions"),
        (dict(weight=torch.zeros(8, 4, 3, 3, dtype=torch.int8)), ValueError, "x needs 8 channels"),
        (dict(residual=torch.zeros(2, 8, 5, 6, dtype=torch.int8)), ValueError, "residual must have the output's shape"),
        (dict(dtype=torch.int8), ValueError, "activation 'relu' gives uint8, the epilogue is for int8"),
        (dict(x=torch.zeros(1, 2 * 7369, 3, 3, dtype=torch.int8), weight=torch.zeros(8, 7369, 3, 3, dtype=torch.int8),
              residual=None), ValueError, "sums of 66,321 products may leave int32"),
    ],
)  # fmt: skip
def test_refusals(spoilt, error, message):
    o = operands()
    of_epilogue = {name: value for name, value in spoilt.items() if name in o.epilogue._fields and name != "residual"}
    o = o._replace(epilogue=o.epilogue._replace(**of_epilogue))
    o = o._replace(**{name: value for name, value in spoilt.items() if name not in of_epilogue})
    with pytest.raises(error) as refused:
        conv_int8_problem(o, *WINDOW)
    assert str(refused.value).startswith("conv_int8: ") and message in str(refused.value)


def test_an_unknown_activation():
    with pytest.raises(ValueError, match="conv_int8: unknown activation 'silu'; known ones are none, relu, relu6"):
        conv_int8_problem(operands(), *WINDOW[:4], "silu")
