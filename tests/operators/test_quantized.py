"""The int8 contract's reference: against exact rational arithmetic, and cases by hand."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from fused_resnet.operators import quantized
from fused_resnet.operators.quantized import Epilogue, Quantized, epilogue_of, quantized_over
from tests.support.exact import rounded

U8, S8 = Quantized(1.0, False), Quantized(1.0, True)


def exact_fma(a, b, c):
    """a * b + c of Python floats, rounded once to fp32 (an infinity is a float)."""
    return rounded(Fraction(a) * Fraction(b) + Fraction(c), "f32")


def exact_byte(total, M, B, R=0.0, skip=None, low=0.0, high=255.0):
    """The formula of the contract, in rational numbers."""
    y = exact_fma(rounded(Fraction(total), "f32"), M, B)
    if skip is not None:
        y = exact_fma(skip, R, y)
    return round(min(max(y, Fraction(low)), Fraction(high)))  # of a Fraction: half to even


def bytes_of(totals, M, B, R=0.0, skips=None, low=0.0, high=255.0):
    """The same by the reference: one channel for each case."""
    rows = torch.tensor(totals, dtype=torch.int32).view(1, -1, 1, 1)
    skips = None if skips is None else torch.tensor(skips, dtype=torch.uint8).view(1, -1, 1, 1)
    epilogue = Epilogue(torch.tensor(M), torch.tensor(B), R, low, high, torch.int8 if low < 0 else torch.uint8)
    return quantized.requantize(rows, epilogue, skips).flatten().tolist()


def test_fma_is_rounded_once():
    """fp32 of all sizes; sums that nearly cancel; and ties of fp32 that a sum in fp64 would make or miss."""
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (3, 400), generator=g).to(torch.int32)
    a, b, c = bits.view(torch.float32).nan_to_num(1.0, 2.0, 3.0)
    near = -(a.double() * b.double()).float()  # what is left is the product's own rounding error
    ulp = torch.ldexp(torch.ones(400), torch.randint(-60, 60, (400,), generator=g))
    tie = ulp * (1 + 2.0**-24 * 2 ** torch.randint(0, 3, (400,), generator=g))  # in fp32: half a step, one, two
    tiny = ulp * 2.0**-70
    operands = (
        (a, b, c),
        (a, b, torch.where(near.isfinite(), near, c)),
        (tie, torch.ones(400), tiny),
        (ulp, torch.full((400,), 1 + 2.0**-23), (ulp.double() * 2.0**-24).float()),
        (tiny, torch.ones(400), ulp * (1 + 3 * 2.0**-23)),
        (-tiny, torch.ones(400), ulp),
    )
    for x, y, z in operands:
        got = quantized.fma(x, y, z)
        for values, result in zip(zip(x.tolist(), y.tolist(), z.tolist()), got.tolist()):
            assert result == float(exact_fma(*values)), values


def test_an_fma_that_rounds_twice_errs():
    """1 + 2**-24 + 2**-70: in fp64 the last term is lost, and the tie goes to even, down."""
    a, b, c = torch.tensor(1 + 2.0**-12), torch.tensor(1 + 2.0**-12), torch.tensor(2.0**-80)
    exact = Fraction(1 + 2.0**-12) ** 2 + Fraction(2.0**-80)
    assert exact == 1 + Fraction(1, 2**11) + Fraction(1, 2**24) + Fraction(1, 2**80)  # just above a tie
    twice = (a.double() * b.double() + c.double()).float()
    assert twice.item() == 1 + 2.0**-11
    assert quantized.fma(a, b, c).item() == 1 + 2.0**-11 + 2.0**-23


def test_fma_keeps_what_is_not_finite():
    inf, nan = math.inf, math.nan
    got = quantized.fma(*torch.tensor([[inf, -inf, nan, inf, 1.0, 3e38], [1, 1, 1, 0, 2, 2], [1, 1, 1, 1, inf, 0]]))
    assert str(got.tolist()) == str([inf, -inf, nan, nan, inf, inf])


@pytest.mark.parametrize("total, byte", ((47, 24), (117, 58), (1, 0), (3, 2), (509, 254), (511, 255), (-1, 0)))
def test_ties_go_to_even(total, byte):
    assert bytes_of([total], [0.5], [0.0]) == [byte]


def test_bytes_equal_rational_arithmetic():
    """Random sums; sums that lie within a few steps of fp32 of a tie; and the extremes of int32."""
    g = torch.Generator().manual_seed(1)
    count = 700
    totals = torch.randint(-(2**20), 2**20, (count,), generator=g)
    totals[::7] = torch.randint(-(2**31), 2**31, (len(totals[::7]),), generator=g)
    totals[:6] = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 2**24 + 1])
    M = (torch.rand(count, generator=g) * 4e-4 + 1e-6).float()
    B = torch.randn(count, generator=g) * 50
    ties = torch.randint(0, 255, (count,), generator=g) + 0.5
    B[1::2] = (ties - totals * M.double())[1::2].float()  # so that the result is a tie, up to the rounding of B
    skips = torch.randint(0, 256, (count,), generator=g)
    R = 0.7310585975646973
    arguments = totals.tolist(), M.tolist(), B.tolist()
    for low, high in ((0.0, 255.0), (0.0, 101.25), (-128.0, 127.0)):
        assert bytes_of(*arguments, low=low, high=high) == [
            exact_byte(*case, low=low, high=high) for case in zip(*arguments)
        ]
        assert bytes_of(*arguments, R, skips.tolist(), low, high) == [
            exact_byte(*case, R, skip, low, high) for *case, skip in zip(*arguments, skips.tolist())
        ]


def test_what_is_no_number_gives_low():
    assert bytes_of([1, 1, 1], [math.nan, math.inf, -math.inf], [0.0] * 3) == [0, 255, 0]
    assert bytes_of([1, 1, 1], [math.nan, math.inf, -math.inf], [0.0] * 3, low=-128.0, high=127.0) == [-128, 127, -128]


def test_sums_are_exact_at_the_longest_reduction():
    K = quantized.LARGEST_REDUCTION
    x = torch.full((1, K, 1, 1), 255, dtype=torch.uint8)
    weight = torch.stack([torch.full((K, 1, 1), w, dtype=torch.int8) for w in (127, -127)])
    assert quantized.sums(x, weight).flatten().tolist() == [255 * 127 * K, -255 * 127 * K]
    assert 255 * 127 * K < 2**31 <= 255 * 127 * (K + 2)
    with pytest.raises(ValueError, match="66,311 products may leave int32"):
        quantized.sums(*(torch.zeros(1, K + 1, 1, 1, dtype=dtype) for dtype in (torch.uint8, torch.int8)))


@pytest.mark.parametrize("how, dtype", ((U8, torch.uint8), (S8, torch.int8)))
def test_convolution_by_integers(how, dtype):
    g = torch.Generator().manual_seed(2)
    x = torch.randint(int(how.low), int(how.high) + 1, (2, 6, 7, 9), generator=g).to(dtype)
    weight = torch.randint(-127, 128, (4, 3, 3, 2), generator=g).to(torch.int8)
    got = quantized.sums(x, weight, (2, 1), (1, 2), (1, 2), 2)
    padded = torch.zeros(2, 6, 9, 13, dtype=torch.int64)
    padded[:, :, 1:8, 2:11] = x
    for k in range(4):
        for p in range(got.shape[2]):
            for q in range(got.shape[3]):
                window = padded[:, 3 * (k // 2) : 3 * (k // 2) + 3, 2 * p : 2 * p + 3, q : q + 3 : 2]
                assert torch.equal(got[:, k, p, q].long(), (window * weight[k].long()).sum((1, 2, 3)))


def test_a_layer_by_hand():
    """One pixel, two channels: every number was worked out on paper."""
    x, out = Quantized(0.5, False), Quantized(0.25, False)
    w, scales = quantized.quantized_weight(torch.tensor([[2.54, -1.27], [0.0, 0.0]]).view(2, 2, 1, 1))
    assert w.flatten().tolist() == [127, -64, 0, 0]  # 63.5 is a tie
    torch.testing.assert_close(scales, torch.tensor([0.02, 1.0], dtype=torch.float64))
    epilogue = epilogue_of(x, scales, out, torch.tensor([1.0, -1.0]), Quantized(2.0, True), "relu")
    torch.testing.assert_close(epilogue.multiplier, torch.tensor([0.04, 2.0]))
    assert (epilogue.bias.tolist(), epilogue.residual, epilogue.low, epilogue.high) == ([4.0, -4.0], 8.0, 0, 255)
    q = torch.tensor([10, 5], dtype=torch.uint8).view(1, 2, 1, 1)
    residual = torch.tensor([3, -1], dtype=torch.int8).view(1, 2, 1, 1)
    # 0.04 * (1270 - 320) + 4 + 24 = 66; -4 - 8 < 0
    assert quantized.conv_act(q, w, epilogue, residual_q=residual).flatten().tolist() == [66, 0]


def test_relu6_ends_at_six():
    out = quantized_over(0.0, 8.0)
    epilogue = epilogue_of(U8, torch.ones(1), out, activation="relu6")
    assert epilogue.high == torch.tensor(6 / out.scale).item() < 255
    assert epilogue_of(U8, torch.ones(1), quantized_over(0.0, 3.0), activation="relu6").high == 255


def test_scales():
    assert quantized_over(0.0, 5.1) == (5.1 / 255, False)
    assert quantized_over(-2.0, 1.0) == (2 / 127, True) and quantized_over(-1.0, 2.0) == (2 / 127, True)
    assert quantized_over(0.0, 0.0) == (1.0, False)
    for small in (1e-320, 1e-40, 2.9e-36):  # whose scales are subnormal in fp32, or 0
        assert quantized_over(0.0, small) == (1.0, False) and quantized_over(-small, 0.0) == (1.0, True)
    for found in (3.1e-36, 1e30, 3.4e38):
        assert quantized_over(0.0, found) == (found / 255, False)
    for least, largest in ((0.0, math.nan), (-math.inf, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="have no scale"):
            quantized_over(least, largest)


def test_quantize_and_back():
    how = quantized_over(-1.0, 1.0)
    x = torch.tensor([0.0, 1.0, -1.0, 9.0, -9.0, math.nan, math.inf, -math.inf])
    q = quantized.quantize(x, how)
    assert q.tolist() == [0, 127, -127, 127, -128, -128, 127, -128]
    back = quantized.dequantize(q, how)
    assert back[1].item() == (torch.tensor(127.0) * torch.tensor(how.scale)).item()
    assert quantized.dequantize(q, how, torch.bfloat16).dtype == torch.bfloat16
    ties = torch.tensor([0.5, 1.5, 2.5, 254.5])
    assert quantized.quantize(ties, U8).tolist() == [0, 2, 2, 254]


def test_floats_are_multiplied_by_the_reciprocal():
    """Values at the middle between two bytes, where a division would often round the other way."""
    g = torch.Generator().manual_seed(3)
    differing = 0
    for scale in (torch.rand(40, generator=g, dtype=torch.float64) + 0.01).tolist():
        x = ((torch.randint(0, 255, (20,), generator=g) + 0.5) * scale).float()
        factor = rounded(Fraction(1 / scale), "f32")
        expected = [round(min(rounded(Fraction(value) * factor, "f32"), Fraction(255))) for value in x.tolist()]
        assert quantized.quantize(x, Quantized(scale, False)).tolist() == expected
        differing += expected != (x / scale).round().clamp(0, 255).tolist()
    assert differing


def test_pooling():
    q = torch.tensor([[-5, -7], [-128, -3]], dtype=torch.int8).view(1, 1, 2, 2)
    assert quantized.max_pool(q, (3, 3), (2, 2), (1, 1)).flatten().tolist() == [-3]
    assert quantized.max_pool(q, (1, 2), (1, 2), (0, 0)).flatten().tolist() == [-5, -3]
    mean = quantized.average_pool(q, Quantized(0.1, True))
    assert mean.shape == (1, 1, 1, 1) and mean.dtype == torch.float32
    assert mean.item() == float(exact_fma(-143.0, torch.tensor(0.1 / 4).item(), 0.0))
    whole = torch.randint(0, 256, (1, 50, 7, 7), dtype=torch.uint8)
    factor = rounded(Fraction(0.1 / 49), "f32")
    expected = [float(rounded(total * factor, "f32")) for total in whole.long().sum((2, 3)).flatten().tolist()]
    assert quantized.average_pool(whole, Quantized(0.1, False)).flatten().tolist() == expected


def test_a_linear_layer_of_means_is_near_floats_and_by_integers():
    """With maps of the largest size, one of them full."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 256, (3, 40, 1, 257), generator=generator).to(torch.uint8)
    q[1] = 255
    weight, bias, how = (
        torch.randn(7, 40, generator=generator),
        torch.randn(7, generator=generator),
        Quantized(0.01, False),
    )
    w, scales = quantized.quantized_weight(weight[:, :, None, None])
    epilogue = quantized.epilogue_of_linear(how, 257, scales, bias)
    y = quantized.linear_of_means(q, w, epilogue)
    for n, k in itertools.product(range(3), range(7)):
        total, column = q[n].long().sum((1, 2)), w[k, :, 0, 0].long()
        low, high = (rounded(Fraction(int((part * column).sum())), "f32") for part in (total % 256, total // 256))
        M, B = (vector[k].item() for vector in epilogue[:2])
        assert y[n, k, 0, 0].item() == float(exact_fma(high, 256 * M, exact_fma(low, M, B)))
    floats = (q.double() * 0.01).mean((2, 3)) @ weight.double().T + bias
    assert (y[..., 0, 0] - floats).square().sum() < 1e-4 * floats.square().sum()
    with pytest.raises(TypeError, match="q must be uint8, not torch.int8"):
        quantized.linear_of_means(q.to(torch.int8), w, epilogue)
    with pytest.raises(ValueError, match="sums of 514 bytes may leave two bytes .at most 257 stay."):
        quantized.linear_of_means(torch.cat([q, q], 2), w, epilogue)
    with pytest.raises(ValueError, match="epilogue_of_linear: a linear layer in int8 is of means of u8 maps"):
        quantized.epilogue_of_linear(Quantized(1.0, True), 4, scales)
    with pytest.raises(ValueError, match="of scale 1e.38 has constants beyond fp32"):
        quantized.epilogue_of_linear(Quantized(1e38, False), 1, scales * 10)


def test_weights_of_a_channel_have_its_own_scale():
    factors = torch.tensor([1e-6, 1.0, 1e6, 0.0, 1e-300], dtype=torch.float64)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64) * factors.view(5, 1, 1, 1)
    q, scales = quantized.quantized_weight(weight)
    assert q.abs().flatten(1).amax(1).tolist() == [127, 127, 127, 0, 127]
    assert ((q * scales.view(5, 1, 1, 1) - weight).abs() <= scales.view(5, 1, 1, 1) * 0.5000001).all()


def test_refusals():
    with pytest.raises(ValueError, match="not silu"):
        epilogue_of(U8, torch.ones(1), U8, activation="silu")
    for out, activation in ((S8, "relu"), (U8, "none")):
        with pytest.raises(ValueError, match=f"activation {activation} does not give"):
            epilogue_of(U8, torch.ones(1), out, activation=activation)
    with pytest.raises(ValueError, match="beyond fp32"):
        epilogue_of(U8, torch.ones(1), Quantized(1e-38, False), torch.tensor([1e10]), activation="relu")
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantized.quantized_weight(torch.full((1, 1, 1, 1), math.nan))
    with pytest.raises(TypeError, match="x must be uint8, int8 or float8_e4m3fn"):
        quantized.sums(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.int8))
    with pytest.raises(TypeError, match="weight must be int8"):
        quantized.sums(torch.zeros(1, 1, 1, 1, dtype=torch.int8), torch.zeros(1, 1, 1, 1))
