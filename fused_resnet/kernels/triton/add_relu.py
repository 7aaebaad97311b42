"""max(a + b, 0) and its gradient, one pass over memory each. The tensors are walked as flat memory."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from fused_resnet.kernels.triton import runtime
from fused_resnet.kernels.triton.runtime import jit, tl
from fused_resnet.operators.problem import AddReluProblem

BLOCK = 1024  # 16 bytes per thread, operand and load in 16-bit types with 4 warps
NUM_WARPS = 4


@jit
def _add_relu_kernel(a_ptr, b_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    a = tl.load(a_ptr + offsets, mask=inside).to(tl.float32)
    b = tl.load(b_ptr + offsets, mask=inside).to(tl.float32)
    out = tl.maximum(a + b, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _add_relu_backward_kernel(grad_ptr, out_ptr, grad_input_ptr, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    grad = tl.load(grad_ptr + offsets, mask=inside)
    out = tl.load(out_ptr + offsets, mask=inside).to(tl.float32)
    # not grad * (out > 0): a NaN output lets the gradient through, and an infinite gradient is stopped, as in torch
    grad_input = tl.where(out <= 0.0, tl.zeros_like(grad), grad)
    tl.store(grad_input_ptr + offsets, grad_input, mask=inside)


def why_not(problem: AddReluProblem) -> Optional[str]:
    """Why this machine cannot run the problem, or None."""
    return runtime.why_not(problem.device, problem.dtype)


def launch(problem: AddReluProblem, a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = max(a + b, 0), computed in fp32. NaN stays NaN.

    a, b, out: dense, with the same shape, strides and dtype; the caller has seen to it. out may be a or b.
    """
    _launch_flat(_add_relu_kernel, problem, a, b, out)


def launch_backward(problem: AddReluProblem, grad: Tensor, out: Tensor, grad_input: Tensor) -> None:
    """grad_input = grad where out is positive or NaN, else 0: torch's threshold_backward, to the last bit.

    grad, out, grad_input: dense, with the same shape, strides and dtype. grad_input may be grad.
    """
    _launch_flat(_add_relu_backward_kernel, problem, grad, out, grad_input)


def flat_arguments(problem: AddReluProblem, first: Tensor, second: Tensor, result: Tensor) -> tuple[int, tuple, dict]:
    """How many programs to start, their arguments, and the options. The same for both kernels."""
    num_programs = -(-problem.numel // BLOCK)
    return num_programs, (first, second, result, problem.numel), dict(BLOCK=BLOCK, num_warps=NUM_WARPS)


def _launch_flat(kernel, problem: AddReluProblem, *tensors: Tensor) -> None:
    if problem.numel:
        num_programs, arguments, options = flat_arguments(problem, *tensors)
        runtime.start(kernel, num_programs, arguments, options, like=tensors[0])
