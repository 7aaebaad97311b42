"""Who computes an operator: one record per backend, one sentence when it cannot.

`why_not(problem)` selects (in `auto`) and explains: it is what BackendError says when the backend was asked for by
name, and what `fused-resnet bench` and `verify` print beside a backend that did not run, so they cannot disagree.
Adding a backend is one `register` call.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple, Optional, Union, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import extension, ops, reference
from fused_resnet.problem import (
    AddReluProblem,
    ConvOperands,
    ConvProblem,
    add_relu_problem,
    conv_problem,
    dtype_name,
)
from fused_resnet.triton_kernels import add_relu as triton_add_relu
from fused_resnet.triton_kernels import conv_bn_act as triton_conv_bn_act

Problem = Union[ConvProblem, AddReluProblem]
Backward = Callable[[Tensor, Tensor], Tensor]


class BackendError(RuntimeError):
    """A backend that is unknown, or that was asked for by name and cannot run this problem."""


class Backend(NamedTuple):
    """One way to compute one operator.

    why_not: None, or why it cannot run a problem of its operator. run: (problem, *operands) -> output. backward:
    add_relu only. auto: the devices on which `auto` may choose it. A kernel of ours gets a CUDA device there only once
    it has been verified against the reference on that kind of device. takes_bn: False where no problem with live BN can
    ever run, on any device.
    """

    name: str
    why_not: Callable[[Any], Optional[str]]
    run: Callable[..., Tensor]
    auto: tuple[str, ...] = ()
    backward: Optional[Backward] = None
    takes_bn: bool = True


_REGISTRY: dict[str, dict[str, Backend]] = {"conv_bn_act": {}, "add_relu": {}}
_NEEDS_FOLDED_BN = "it takes only a bias, so it needs folded BN: use fused_resnet.freeze"


def register(op: str, backend: Backend) -> None:
    """Add a backend for an operator. `auto` tries backends in the order of registration."""
    _REGISTRY[op][backend.name] = backend


def known(op: str) -> dict[str, Backend]:
    """The backends of an operator by name, in the order in which `auto` tries them."""
    return dict(_REGISTRY[op])


def check_name(caller: str, backend: str) -> None:
    """BackendError, in the name of `caller`, unless conv_bn_act has a backend of this name or it is "auto"."""
    names = ("auto", *_REGISTRY["conv_bn_act"])
    if backend not in names:
        raise BackendError(f"{caller}: unknown backend {backend!r}; known ones are {', '.join(names)}.")


def why_never_live(backend: str) -> Optional[str]:
    """Why this backend of conv_bn_act can run no problem with live BN, whatever the device, or None."""
    return None if backend == "auto" or _REGISTRY["conv_bn_act"][backend].takes_bn else _NEEDS_FOLDED_BN


def select(problem: Problem, backend: str = "auto") -> Backend:
    """The backend that runs this problem. BackendError when it was asked for by name and is unknown or cannot."""
    candidates = _REGISTRY[problem.op]
    if backend == "auto":
        for candidate in candidates.values():
            if problem.device in candidate.auto and candidate.why_not(problem) is None:
                return candidate
        return candidates["eager"]
    if backend not in candidates:
        raise BackendError(
            f"unknown backend {backend!r} for {problem.op}; known ones are auto, {', '.join(candidates)}."
        )
    reason = candidates[backend].why_not(problem)
    if reason is not None:
        raise BackendError(
            f"backend {backend!r} cannot run this: {reason}. Use backend='eager' or 'auto'. The problem: {problem}."
        )
    return candidates[backend]


# --------------------------------------------------------------------------------------------------- conv_bn_act


def _conv_bn_act(*args) -> Tensor:
    """The operator's implementation on every device: check, select, run."""
    operands = ConvOperands(*args[: len(ConvOperands._fields)])
    stride, padding, dilation, groups, activation, backend = args[len(ConvOperands._fields) :]
    problem = conv_problem(operands, tuple(stride), tuple(padding), tuple(dilation), groups, activation)
    chosen = select(problem, backend)
    if problem.N == 0:
        return ops.empty_output(problem, operands.x)
    return chosen.run(problem, operands)


def _eager_conv_bn_act(problem: ConvProblem, operands: ConvOperands) -> Tensor:
    """The operator as ATen calls, one per step: the specification at speed, and the fallback."""
    o = operands
    bias = o.bias if o.bias is not None and o.bias.dtype == o.x.dtype else None
    x = o.x.contiguous() if _weight_is_dearer_to_convert(problem, o) else o.x
    y = F.conv2d(x, o.weight, bias, problem.stride, problem.padding, problem.dilation, problem.groups)
    y = channels_last(y)  # before the residual is read, which as a rule is channels_last
    vectors = [*o.bn_vectors.values(), None if bias is not None else o.bias]
    if _is_stock_batch_norm(o, vectors):
        y = F.batch_norm(y, o.bn_mean, o.bn_var, o.bn_weight, o.bn_bias, False, 0.0, o.eps)
    elif any(vector is not None for vector in vectors):
        wide = torch.promote_types(torch.float32, o.x.dtype)
        scale, shift = reference.scale_and_shift(o._replace(bias=vectors[-1]), wide)
        y = (y * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(o.x.dtype)
    if o.residual is not None:
        y = y.add_(o.residual)
    return channels_last(activate_(y, problem.activation))


def _weight_is_dearer_to_convert(problem: ConvProblem, operands: ConvOperands) -> bool:
    """Whether it costs less to convert x and the output than to let ATen convert the weight at every call.

    On the CPU ATen brings both operands of a convolution into channels_last when one of them is. One thread,
    AVX-512, torch 2.13, 512 -> 512 channels 3x3 at 7x7: 8.8 ms that way, 4.8 ms in NCHW with both conversions.
    """
    if problem.device != "cpu" or operands.weight.is_contiguous(memory_format=torch.channels_last):
        return False
    return operands.weight.numel() > operands.x.numel() + problem.N * problem.K * problem.P * problem.Q


def activate_(y: Tensor, activation: str) -> Tensor:
    """One of the epilogue's activations alone, in place, through ATen."""
    if activation == "relu":
        return torch.relu_(y)
    if activation == "relu6":
        return F.hardtanh_(y, 0.0, 6.0)
    return F.silu(y, inplace=True) if activation == "silu" else y


def _is_stock_batch_norm(operands: ConvOperands, vectors: list) -> bool:
    """Whether ATen's batch_norm does the same: statistics present, vectors of one dtype it accepts, no late bias."""
    if operands.bn_mean is None or operands.bn_var is None or vectors[-1] is not None:
        return False
    dtypes = {vector.dtype for vector in vectors if vector is not None}
    return dtypes == {operands.x.dtype} or (dtypes == {torch.float32} and operands.x.dtype != torch.float64)


def _channels_last(operands: ConvOperands) -> ConvOperands:
    return operands.map(lambda tensor: channels_last(tensor) if tensor.dim() == 4 else tensor.contiguous())


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor in channels_last memory, with the strides of a new one in dimensions of size 1 too.

    torch takes (N, 1, H, W) and (N, C, 1, 1) for channels_last whatever their strides, but Inductor counts on those
    of the fake tensor, and oneDNN's binding leaves its fused path for others.
    """
    tensor = tensor.contiguous(memory_format=torch.channels_last)
    _, C, H, W = tensor.shape
    strides = (C * H * W, 1, C * W, C)
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


_MKLDNN_ACTIVATION = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
}


def _onednn_why_not(problem: ConvProblem) -> Optional[str]:
    if problem.device != "cpu":
        return f"it runs on the CPU, the tensors are on {problem.device}"
    reason = onednn_missing(problem.dtype)
    if reason is not None:
        return reason
    if problem.has_bn:
        return _NEEDS_FOLDED_BN
    return None


@functools.lru_cache(maxsize=None)
def onednn_missing(dtype: torch.dtype) -> Optional[str]:
    """Why oneDNN's fused convolutions are not to be had for this dtype on this machine, or None."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return "this torch has no oneDNN fused convolutions"
    supported: dict[torch.dtype, Callable[[], bool]] = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype not in supported:
        return f"{dtype_name(dtype)} is not supported (float32, bfloat16, float16 are)"
    if not supported[dtype]():
        return f"this CPU has no {dtype_name(dtype)} instructions that oneDNN can use"
    return None


def _onednn_conv_bn_act(problem: ConvProblem, operands: ConvOperands) -> Tensor:
    o = _channels_last(operands)
    bias = None if o.bias is None else o.bias.to(o.x.dtype)
    return channels_last(onednn_convolution(problem, o.x, o.weight, bias, o.residual))


def onednn_convolution(problem: ConvProblem, x, weight, bias, residual, *, into_residual: bool = False) -> Tensor:
    """oneDNN's convolution with bias, add and activation as post-ops. `weight` may be packed for this input size.

    into_residual: the sum replaces the residual's memory, and the residual is returned.
    """
    window = (problem.padding, problem.stride, problem.dilation, problem.groups)
    act, scalars = _MKLDNN_ACTIVATION[problem.activation]
    if residual is None:
        return torch.ops.mkldnn._convolution_pointwise.default(x, weight, bias, *window, act, scalars, "")
    if problem.groups > 1 or problem.C * problem.H * problem.W == 1:
        # The binding does not fuse these sums: it rounds first, its add_relu turns Inf into the largest number and
        # raises in bf16 (torch 2.13). So the sum is ATen's.
        y = torch.ops.mkldnn._convolution_pointwise.default(x, weight, bias, *window, "none", [], "")
        return activate_(residual.add_(y) if into_residual else y.add_(residual), problem.activation)
    x = channels_last(x)
    # after a sum oneDNN's binding knows only ReLU; the others follow in place
    unary = "relu" if act == "relu" else None
    if into_residual:
        op, first = torch.ops.mkldnn._convolution_pointwise_.binary, (residual, x)
    else:
        op, first = torch.ops.mkldnn._convolution_pointwise.binary, (x, residual)
    return activate_(op(*first, weight, bias, *window, "add", 1.0, unary, [], ""), problem.activation)


def _cudnn_why_not(problem: ConvProblem) -> Optional[str]:
    reason = _nvidia_why_not(problem)
    if reason is not None:
        return reason
    if not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    if problem.dtype == torch.float64:
        return "float64 is not supported (float32, float16, bfloat16 are)"
    if problem.has_bn:
        return _NEEDS_FOLDED_BN
    if problem.activation != "relu":
        return f"it fuses only ReLU, not {problem.activation}"
    return None


def _cudnn_conv_bn_act(problem: ConvProblem, operands: ConvOperands) -> Tensor:
    o = _channels_last(operands)
    bias = None if o.bias is None else o.bias.to(o.x.dtype)
    window = (problem.stride, problem.padding, problem.dilation, problem.groups)
    if o.residual is None:
        return torch.cudnn_convolution_relu(o.x, o.weight, bias, *window)
    return torch.cudnn_convolution_add_relu(o.x, o.weight, o.residual, 1.0, bias, *window)


def _nvidia_why_not(problem: Problem) -> Optional[str]:
    if problem.device != "cuda":
        return f"it runs on NVIDIA GPUs, the tensors are on {problem.device}"
    return "it does not run on ROCm" if torch.version.hip else None


def _triton_conv_bn_act(problem: ConvProblem, operands: ConvOperands) -> Tensor:
    out = ops.empty_output(problem, operands.x)
    triton_conv_bn_act.launch(problem, _channels_last(operands), out)
    return out


def _cuda_conv_why_not(problem: ConvProblem) -> Optional[str]:
    reason = _cuda_why_not(problem)
    if reason is not None:
        return reason
    if problem.dtype == torch.float32 and not triton_conv_bn_act.allows_tf32():
        return "in float32 it multiplies in TF32, which torch.backends.cudnn does not allow"
    return _cuda_limits(problem)


# As in csrc/problem.h, where it says why.
_CUDA_EXTENT = 2**28
_CUDA_DIVIDEND = 2**31 - 1025
_CUDA_TILE_ROWS = 256
_CUDA_CHUNK_BYTES = 16


@functools.lru_cache(maxsize=1024)  # it is asked at every call
def _cuda_limits(problem: ConvProblem) -> Optional[str]:
    """Why csrc's kernel cannot index this problem, or None.

    Of x and the weight it assumes 16-byte alignment, as tensors have it that are not views into the middle of others.
    """
    p = problem
    if max(p.C, p.K, p.R, p.S, p.groups, *p.stride, *p.dilation) >= 2**31:
        return "channels, filter sizes, groups, strides and dilations must be below 2^31"
    if max(p.H, p.W) >= _CUDA_EXTENT:
        return f"an input of {p.H}x{p.W} is too large (height and width must be below 2^28)"
    if max(p.padding) >= _CUDA_EXTENT:
        return f"padding {max(p.padding)} is too large (it must be below 2^28)"
    window = max(p.dilation[0] * (p.R - 1), p.dilation[1] * (p.S - 1))
    if window >= _CUDA_EXTENT:
        return f"a window of {window + 1} pixels is too large (dilation * (filter size - 1) must be below 2^28)"
    pixels = p.P * p.Q
    if pixels >= _CUDA_DIVIDEND:
        return f"an output of {p.P}x{p.Q} is too large (P * Q must be below 2^31 - 1025)"
    if p.reduction >= _CUDA_DIVIDEND:
        return f"a sum of {p.reduction} products is too long (R * S * C/groups must be below 2^31 - 1025)"
    images = _CUDA_TILE_ROWS // pixels + 2
    span = ((images * p.H + 2 * p.padding[0] + 2) * p.W + 2 * p.padding[1]) * p.C
    chunk = _CUDA_CHUNK_BYTES // p.dtype.itemsize
    reach = 2**31 * (chunk if p.C // p.groups % chunk == 0 else 1)
    if span >= reach:
        return f"one tile may span {span} elements of x, too many for its 32-bit offsets (they reach {reach})"
    return None


def _cuda_why_not(problem: Problem) -> Optional[str]:
    reason = _nvidia_why_not(problem) or extension.load("cuda")
    if reason is not None:
        return reason
    if problem.dtype == torch.float64:
        return "float64 is not supported (float32, float16, bfloat16 are)"
    major, minor = _least_capability()
    if major >= 8:
        return None
    return f"it needs compute capability 8.0 or later on every visible GPU, one has {major}.{minor}"


@functools.lru_cache(maxsize=None)  # the visible GPUs stay what they are
def _least_capability() -> tuple[int, int]:
    """Of all visible GPUs: a problem names the kind of its device, not which one of that kind."""
    return min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))


def _cuda_conv_bn_act(problem: ConvProblem, operands: ConvOperands) -> Tensor:
    out = ops.empty_output(problem, operands.x)
    torch.ops.fused_resnet.cuda_conv_bn_act(
        *_channels_last(operands), problem.stride, problem.padding, problem.dilation, problem.groups,
        problem.activation, triton_conv_bn_act.allows_tf32(), out,
    )  # fmt: skip
    return out


# In the order in which auto tries them. On CUDA no kernel of ours is there yet: none has been verified on a GPU.
for _backend in (
    Backend("onednn", _onednn_why_not, _onednn_conv_bn_act, auto=("cpu",), takes_bn=False),
    Backend("cudnn", _cudnn_why_not, _cudnn_conv_bn_act, auto=("cuda",), takes_bn=False),
    Backend("cuda", _cuda_conv_why_not, _cuda_conv_bn_act),
    Backend("triton", triton_conv_bn_act.why_not, _triton_conv_bn_act),
    Backend("eager", lambda problem: None, _eager_conv_bn_act, auto=("cpu", "cuda")),
):
    register("conv_bn_act", _backend)


# ------------------------------------------------------------------------------------------------------ add_relu


def _add_relu(a: Tensor, b: Tensor, backend: str) -> Tensor:
    problem = add_relu_problem(a, b)
    return select(problem, backend).run(problem, a, b)


def _add_relu_backward(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    problem = add_relu_problem(out, grad)
    return cast(Backward, select(problem, backend).backward)(grad, out)


def _eager_add_relu(problem: AddReluProblem, a: Tensor, b: Tensor) -> Tensor:
    return torch.relu_(torch.add(a, b, out=torch.empty_like(a)))


def _eager_add_relu_backward(grad: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, out, 0)


def _flat_kernel(kernel: Callable[[Tensor, Tensor, Tensor], None]) -> Callable[..., Tensor]:
    """Around a kernel that walks memory, so that all three tensors lie in memory alike: the layout of the output."""

    def run(problem: AddReluProblem, a: Tensor, b: Tensor) -> Tensor:
        out = torch.empty_like(a)
        kernel(_laid_out_as(a, out), _laid_out_as(b, out), out)
        return out

    return run


def _laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def _cpu_why_not(problem: AddReluProblem) -> Optional[str]:
    if problem.device != "cpu":
        return f"it runs on the CPU, the tensors are on {problem.device}"
    return extension.load("cpu")


def _triton_backward(grad: Tensor, out: Tensor) -> Tensor:
    grad_input = torch.empty_like(out)
    problem = add_relu_problem(out, grad)
    triton_add_relu.launch_backward(problem, _laid_out_as(grad, out), out, grad_input)
    return grad_input


def _cuda_backward(grad: Tensor, out: Tensor) -> Tensor:
    grad_input = torch.empty_like(out)
    torch.ops.fused_resnet.cuda_add_relu_backward(_laid_out_as(grad, out), out, grad_input)
    return grad_input


for _backend in (
    Backend(
        "cpu",
        _cpu_why_not,
        _flat_kernel(lambda a, b, out: torch.ops.fused_resnet.cpu_add_relu(a, b, out)),
        auto=("cpu",),
        backward=_eager_add_relu_backward,
    ),
    Backend(
        "cuda",
        _cuda_why_not,
        _flat_kernel(lambda a, b, out: torch.ops.fused_resnet.cuda_add_relu(a, b, out)),
        backward=_cuda_backward,
    ),
    Backend(
        "triton",
        triton_add_relu.why_not,
        _flat_kernel(lambda a, b, out: triton_add_relu.launch(add_relu_problem(a, b), a, b, out)),
        backward=_triton_backward,
    ),
    Backend(
        "eager", lambda problem: None, _eager_add_relu, auto=("cpu", "cuda"), backward=_eager_add_relu_backward
    ),
):
    register("add_relu", _backend)


ops.LIBRARY.impl("conv_bn_act", _conv_bn_act, "CompositeExplicitAutograd")
ops.LIBRARY.impl("add_relu", _add_relu, "CompositeExplicitAutograd")
ops.LIBRARY.impl("add_relu_backward", _add_relu_backward, "CompositeExplicitAutograd")
