"""Launches of Triton kernels: which are refused before anything is compiled, and what reports call their arrays."""

from typing import NamedTuple

import pytest
import torch

from fused_resnet.emulation import launches

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def scale(out, x, n, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out + columns, 2 * tl.load(x + columns, mask=columns < n), mask=columns < n)


X = torch.zeros(32)
OPTIONS = dict(BLOCK=32, num_warps=1)
autotuned = triton.autotune(configs=[triton.Config(dict(BLOCK=32))], key=["n"])(scale)


@pytest.mark.parametrize("kernel, grid, arguments, options, arch, reason", (
    (scale, 1, (X, X, 32), dict(BLOCK=32, warps=4), 80,
     "scale: unknown option 'warps'; known are out, x, n, BLOCK, num_warps, .*num_stages"),
    (scale, lambda options: (1,), (X, X, 32), OPTIONS, 80, "scale: pass the grid as numbers"),
    (autotuned, 1, (X, X, 32), OPTIONS, 80, "pass the autotuned kernel's .fn"),
    (scale, 1, (X, X), OPTIONS, 80, "scale: no value for n$"),
    (scale, 1, (X, X, 32), dict(num_warps=1), 80, "scale: no value for BLOCK$"),
    (scale, 1, (X, X, 32, 32, 1), {}, 80, "scale: 5 arguments for out, x, n, BLOCK$"),
    (scale, 1, (X, X, 32), OPTIONS, 75, "75 is no compute capability times ten; known are 80, 86, 87, 89, 90, 100,"),
    (scale, 1, (X, X, 32), OPTIONS, "sm_90", "'sm_90' is no compute capability"),
))  # fmt: skip
def test_launches_that_are_refused(kernel, grid, arguments, options, arch, reason):
    with pytest.raises(ValueError, match=reason):
        launches.run(launches.Launch(kernel, grid, arguments, options), arch, [X])


class Pair(NamedTuple):
    first: torch.Tensor
    second: None


def test_arrays_are_named_by_the_parameters():
    launch = launches.Launch(scale, 1, (X, Pair(X, None), 3), OPTIONS)
    assert list(launches._named_arrays(launch)) == ["out", "x.first"]
