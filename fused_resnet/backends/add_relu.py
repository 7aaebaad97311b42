"""max(a + b, 0) and its gradient: C++ on a CPU, CUDA and Triton on GPUs, ATen anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional

import torch
from torch import Tensor

from fused_resnet.backends import cuda
from fused_resnet.backends.record import Auto, Backend, why_not_cpu
from fused_resnet.kernels import compiled, sources
from fused_resnet.kernels.triton import is_interpreted
from fused_resnet.operators.describe import add_relu_problem
from fused_resnet.operators.problem import AddReluProblem


@dataclass(frozen=True)
class AddRelu:
    """The kernels of an addition, and itself the first of them: what `Backend.run` is here.

    forward: (problem, a, b) -> output. backward: (the output's gradient, the output) -> that of a and of b.
    """

    forward: Callable[[AddReluProblem, Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, problem: AddReluProblem, a: Tensor, b: Tensor) -> Tensor:
        return self.forward(problem, a, b)


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
    return why_not_cpu(problem) or compiled.load("cpu")


def _triton_why_not(problem: AddReluProblem) -> Optional[str]:
    from fused_resnet.kernels.triton import add_relu  # Triton itself

    return add_relu.why_not(problem)


def settled() -> Callable[[Tensor, Tensor], Tensor]:
    """The first of ADD_RELU for tensors that lie in memory alike, as a function of them."""
    kernel, empty_like = torch.ops.fused_resnet.cpu_add_relu.default, torch.empty_like

    def run(a: Tensor, b: Tensor) -> Tensor:
        out = empty_like(a)
        kernel(a, b, out)
        return out

    return run


def _triton_backward(grad: Tensor, out: Tensor) -> Tensor:
    from fused_resnet.kernels.triton import add_relu

    grad_input = torch.empty_like(out)
    problem = add_relu_problem(out, grad)
    add_relu.launch_backward(problem, _laid_out_as(grad, out), out, grad_input)
    return grad_input


def _cuda_backward(grad: Tensor, out: Tensor) -> Tensor:
    grad_input = torch.empty_like(out)
    torch.ops.fused_resnet.cuda_add_relu_backward(_laid_out_as(grad, out), out, grad_input)
    return grad_input


def _on_cpu(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.ops.fused_resnet.cpu_add_relu.default(a, b, out)


def _on_cuda(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.ops.fused_resnet.cuda_add_relu.default(a, b, out)


def _in_triton(a: Tensor, b: Tensor, out: Tensor) -> None:
    from fused_resnet.kernels.triton import add_relu

    add_relu.launch(add_relu_problem(a, b), a, b, out)


# In the order in which auto tries them.
ADD_RELU = (
    Backend("cpu", _cpu_why_not, AddRelu(_flat_kernel(_on_cpu), _eager_add_relu_backward), auto=Auto(("cpu",))),
    Backend("cuda", cuda.why_not_here, AddRelu(_flat_kernel(_on_cuda), _cuda_backward), sources=sources.CUDA),
    Backend(
        "triton",
        _triton_why_not,
        AddRelu(_flat_kernel(_in_triton), _triton_backward),
        origin="interpreted" if is_interpreted() else "ours",
        sources=sources.TRITON,
    ),
    Backend(
        "eager",
        lambda problem: None,
        AddRelu(_eager_add_relu, _eager_add_relu_backward),
        auto=Auto(("cpu", "cuda")),
        origin="torch",
    ),
)
