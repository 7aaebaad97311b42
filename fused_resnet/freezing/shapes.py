"""What torch's commonest functions return for tensors without memory: rules for shape, dtype and layout.

Torch knows it of every operator, but in Python: the first ReLU on a meta tensor imports sympy, torch._dynamo and 800
other modules. That took 2.6 s (EPYC, one thread, 2026-11). What has no rule here is left to torch, and so are arguments
that its rule does not know.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, Callable, Iterator, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# All of them take what they return, and numbers beside it.
_ACTIVATIONS = (
    "relu relu6 silu sigmoid tanh gelu hardswish hardsigmoid hardtanh leaky_relu elu selu celu mish softplus "
    "logsigmoid clamp"
).split()
_SUMS = "add sub mul div __add__ __radd__ __iadd__ __sub__ __isub__ __mul__ __rmul__ __imul__ __truediv__".split()
_NUMBERS = (bool, int, float, str, type(None))


class Refused(RuntimeError):
    """Torch does not take this, and says so in these words."""


class Rules(TorchFunctionMode):
    """Answers by rules while it is entered, for this thread."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        kwargs = kwargs or {}
        rule, out = _RULES.get(func), None
        if rule is not None:
            try:
                out = rule(*args, **kwargs)
            except TypeError:
                pass  # arguments that it does not know
        return func(*args, **kwargs) if out is None else out


def like(x: Tensor) -> Optional[Tensor]:
    """A new tensor that lies as x does. None for what is in neither NCHW nor NHWC."""
    is_known = x.is_contiguous() or x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return _new(x.shape, x) if is_known else None


def _new(shape: Sequence[int], x: Tensor) -> Tensor:
    """In x's dtype, and channels_last where x is alone that."""
    is_last = len(shape) == x.dim() == 4 and not x.is_contiguous()
    is_last = is_last and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _are_plain(*tensors: Any) -> bool:
    """Whether they are floating-point meta tensors of one dtype."""
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_meta
        and tensor.is_floating_point()
        and tensor.dtype == tensors[0].dtype
        for tensor in tensors
    )


def _activation(input: Any, *numbers: Any, inplace: bool = False, **named: Any) -> Optional[Tensor]:
    if not _are_plain(input) or not all(type(value) in _NUMBERS for value in (*numbers, *named.values())):
        return None
    return input if inplace else like(input)


def _softmax(input: Any, dim: Any, *numbers: Any, **named: Any) -> Optional[Tensor]:
    """In NCHW memory, whatever x's."""
    is_there = type(dim) is int and _are_plain(input) and -input.dim() <= dim < input.dim()
    ruled = _activation(input, *numbers, **named) if is_there else None
    return None if ruled is None else ruled.contiguous()


def _sum(input: Any, other: Any, *, alpha: Any = 1, inplace: bool = False) -> Optional[Tensor]:
    """input + other, and all that broadcasts alike."""
    if not _are_plain(input):
        return None
    shape: Optional[tuple] = tuple(input.shape)
    if type(other) not in (int, float):
        shape = _broadcast(input.shape, other.shape) if _are_plain(input, other) else None
    whole = next((each for each in (input, other) if isinstance(each, Tensor) and tuple(each.shape) == shape), None)
    if whole is None or inplace:
        return whole if whole is input else None
    return like(whole)


def _broadcast(one: Sequence[int], other: Sequence[int]) -> Optional[tuple[int, ...]]:
    pairs = list(itertools.zip_longest(reversed(one), reversed(other), fillvalue=1))
    if any(m != n and 1 not in (m, n) for m, n in pairs):
        return None
    return tuple(n if m == 1 else m for m, n in reversed(pairs))


def _batch_norm(
    input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: Any = 0.1, eps: Any = 1e-5,
) -> Optional[Tensor]:  # fmt: skip
    vectors = [vector for vector in (running_mean, running_var, weight, bias) if vector is not None]
    if training or running_mean is None or not _are_plain(input, *vectors) or input.dim() < 2:
        return None
    return like(input) if all(tuple(vector.shape) == (input.shape[1],) for vector in vectors) else None


def _linear(input: Any, weight: Any, bias: Any = None) -> Optional[Tensor]:
    if not _are_plain(*_given(input, weight, bias)) or weight.dim() != 2 or not input.dim():
        return None
    *rows, width = input.shape
    K, C = weight.shape
    if width != C:
        raise Refused(f"a and b must have same reduction dim, but got [{math.prod(rows)}, {width}] X [{C}, {K}].")
    return _new((*rows, K), input) if bias is None or tuple(bias.shape) == (K,) else None


def _given(*tensors: Any) -> Iterator[Any]:
    return (tensor for tensor in tensors if tensor is not None)


def _convolution(
    dims: int, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Optional[Tensor]:  # fmt: skip
    if not _are_plain(*_given(input, weight, bias)) or weight.dim() != dims + 2 or isinstance(padding, str):
        return None
    if input.dim() == dims + 1:
        out = _convolution(dims, input.unsqueeze(0), weight, bias, stride, padding, dilation, groups)
        return None if out is None else out.squeeze(0)
    if input.dim() != dims + 2:
        wanted = f"Expected {dims + 1}D (unbatched) or {dims + 2}D (batched) input to conv{dims}d"
        raise Refused(f"{wanted}, but got input of size: {list(input.shape)}")
    strides, paddings, dilations = (_spread(value, dims) for value in (stride, padding, dilation))
    try:  # torch's own check, in C++
        torch._C._select_conv_backend(input, weight, bias, strides, paddings, dilations, False, [0] * dims, groups)
    except RuntimeError as error:
        raise Refused(str(error)) from error
    windows = zip(input.shape[2:], weight.shape[2:], strides, paddings, dilations)
    shape = (input.shape[0], weight.shape[0], *(_steps(*each, False) for each in windows))
    return input.new_empty(shape)  # in NCHW, as torch's own on meta tensors


def _spread(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _steps(size: int, window: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """How often a window fits. In ceil_mode the last one may overlap the end, but must begin before the padding."""
    rest = size + 2 * padding - dilation * (window - 1) - 1
    steps = (rest + (stride - 1 if ceil_mode else 0)) // stride + 1
    return steps - 1 if ceil_mode and (steps - 1) * stride >= size + padding else steps


def _max_pool(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Optional[Tensor]:  # fmt: skip
    return None if return_indices else _pool(input, kernel_size, stride, padding, dilation, ceil_mode)


def _average_pool(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: Any = None,
) -> Optional[Tensor]:  # fmt: skip
    return None if divisor_override == 0 else _pool(input, kernel_size, stride, padding, 1, ceil_mode)


def _pool(input: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Optional[Tensor]:
    if not _are_plain(input) or input.dim() != 4 or not all(input.shape[1:]):
        return None
    stride = kernel_size if stride in (None, (), []) else stride
    kernels, strides, paddings, dilations = (_spread(each, 2) for each in (kernel_size, stride, padding, dilation))
    if min(*kernels, *strides, *dilations) < 1 or not all(0 <= 2 * p <= k for p, k in zip(paddings, kernels)):
        return None
    windows = zip(input.shape[2:], kernels, strides, paddings, dilations)
    sides = [_steps(*window, ceil_mode) for window in windows]
    if min(sides) < 1:
        came, left = ("x".join(map(str, (input.shape[1], *pair))) for pair in (input.shape[2:], sides))
        raise Refused(f"Given input size: ({came}). Calculated output size: ({left}). Output size is too small")
    return _new((*input.shape[:2], *sides), input)


def _adaptive_pool(input: Any, output_size: Any) -> Optional[Tensor]:
    if not _are_plain(input) or input.dim() not in (3, 4) or not all(input.shape[1:]):
        return None
    sides = [given if wanted is None else wanted for wanted, given in zip(_spread_size(output_size), input.shape[-2:])]
    return _new((*input.shape[:-2], *sides), input) if min(sides) >= 0 else None


def _spread_size(size: Any) -> Sequence[Optional[int]]:
    return (size, size) if isinstance(size, int) else size


def _mean(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: None = None) -> Optional[Tensor]:
    if not _are_plain(input) or dtype is not None:
        return None
    rank = input.dim()
    dims = list(range(rank)) if dim is None or dim == () else [dim] if isinstance(dim, int) else list(dim)
    gone = {each % rank for each in dims if -rank <= each < rank}
    if len(gone) != len(dims) or not gone:
        return None
    kept = [1 if index in gone else size for index, size in enumerate(input.shape) if keepdim or index not in gone]
    return torch.empty(kept, dtype=input.dtype, device=input.device)  # in NCHW memory, whatever x's


def _cat(tensors: Any, dim: int = 0) -> Optional[Tensor]:
    if not tensors or not _are_plain(*tensors):
        return None
    rank, first = tensors[0].dim(), tensors[0]
    if not -rank <= dim < rank or any(tensor.dim() != rank for tensor in tensors):
        return None
    dim %= rank
    others = {tuple(tensor.shape[:dim]) + tuple(tensor.shape[dim + 1 :]) for tensor in tensors}
    if len(others) != 1:
        return None
    return _new((*first.shape[:dim], sum(tensor.shape[dim] for tensor in tensors), *first.shape[dim + 1 :]), first)


def _rules() -> dict[Any, Callable[..., Optional[Tensor]]]:
    """By the function as a mode gets it: those of torch, of torch.nn.functional, and methods."""
    found: dict[Any, Callable[..., Optional[Tensor]]] = {
        F.batch_norm: _batch_norm,
        F.linear: _linear,
        F.max_pool2d: _max_pool,
        torch.max_pool2d: _max_pool,
        F.avg_pool2d: _average_pool,
        F.adaptive_avg_pool2d: _adaptive_pool,
        torch.mean: _mean,
        Tensor.mean: _mean,
        torch.cat: _cat,
        **{function: _softmax for function in (torch.softmax, Tensor.softmax, F.softmax)},
        **{getattr(torch, f"conv{dims}d"): functools.partial(_convolution, dims) for dims in (1, 2, 3)},
    }
    for name in (*_ACTIVATIONS, *_SUMS):
        rule = _activation if name in _ACTIVATIONS else _sum
        found.update((function, rule) for function in _spellings(name))
        in_place = functools.partial(rule, inplace=True)
        if name.startswith("__i"):
            found.update((function, in_place) for function in _spellings(name))
        elif not name.startswith("__"):
            found.update((function, in_place) for function in _spellings(f"{name}_"))
    return found


def _spellings(name: str) -> Iterator[Any]:
    return (getattr(room, name) for room in (torch, F, Tensor) if hasattr(room, name))


_RULES = _rules()
