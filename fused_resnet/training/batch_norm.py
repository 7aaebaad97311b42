"""A batch norm, and the addition and activation behind it, where that is faster as one operator."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fused_resnet import choosing, functional
from fused_resnet.backends import bn_act as backends_of_bn_act
from fused_resnet.backends import record
from fused_resnet.operators import composites, layout
from fused_resnet.operators.describe import bn_act_problem
from fused_resnet.operators.operands import BnActOperands
from fused_resnet.operators.problem import BnActProblem
from fused_resnet.training import across_processes

_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # torch.export shows parameters as fake tensors


def bn_act(bn: Any, x: Tensor, residual: Optional[Tensor], activation: str, backend: str = "auto") -> Optional[Tensor]:
    """act(bn(x) + residual) by `functional.bn_act`, in training mode with the norm's running statistics updated. None
    where PyTorch's layers are to be called instead, and nothing has been done by then.

    bn: to be bypassed. It normalises and keeps statistics as nn.BatchNorm2d does. x, residual: of one dtype, shape and
    layout. backend: a name of bn_act's, or one of another operator's, which stands for "auto".
    PyTorch's layers are called where `choosing.select` takes ATen, and for whatever bn_act refuses: they take it, or
    raise torch's own error. They are also called under torch.func's transforms and in traces. An nn.SyncBatchNorm of
    several processes is computed here in any case on a CPU, where torch has none.
    """
    mean, var = (bn.running_mean, bn.running_var) if bn.track_running_stats or not bn.training else (None, None)
    constant = (None, None) if bn.training else (mean, var)
    operands = BnActOperands(x, constant[0], constant[1], bn.weight, bn.bias, residual, bn.eps)
    group = across_processes.group_of(bn)
    if not _is_taken(bn, operands, (mean, var), group):
        return None
    if not _is_faster(operands, activation, backend) and (group is None or x.is_cuda):
        return None
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    if group is not None:
        y, batch_mean, batch_var, values = across_processes.bn_act(group, operands, activation, _named(backend))
        functional.move_running(mean, var, batch_mean, batch_var, momentum, values)
        return y
    return functional.bn_act(
        x, mean, var, bn.weight, bn.bias, training=bn.training, momentum=momentum, eps=bn.eps, residual=residual,
        activation=activation, backend=_named(backend),
    )  # fmt: skip


def _is_taken(bn: Any, o: BnActOperands, running: tuple, group: Any) -> bool:
    """Whether these are operands that `functional.bn_act` takes as F.batch_norm does."""
    if group is not None and torch.compiler.is_compiling():
        return False
    if composites.is_transformed() or torch._C._get_tracing_state() is not None:
        return False
    if bn.momentum is None and torch.compiler.is_compiling():
        return False  # which reads the counter, and breaks the graph in nn.BatchNorm2d as well
    if type(o.x) not in _PLAIN or o.x.dim() != 4 or not _are_numbers(bn.eps, bn.momentum):
        return False
    _, C, H, W = o.x.shape
    if group is None and (C == 1 or H * W == 1):  # whose layouts are ambiguous
        return False
    vectors = [vector for vector in (*running, o.weight, o.bias) if vector is not None]
    if any(type(vector) not in _PLAIN or vector.shape != o.x.shape[1:2] for vector in vectors):
        return False
    if any(vector is not None and vector.requires_grad for vector in running):
        return False
    dtypes = {vector.dtype for vector in vectors}
    return len(dtypes) <= 1 and dtypes <= {o.x.dtype, torch.promote_types(torch.float32, o.x.dtype)}


def _are_numbers(eps: Any, momentum: Any) -> bool:
    return type(eps) is float and (momentum is None or type(momentum) in (int, float))


def _named(backend: str) -> str:
    """The backend of bn_act that one of a convolution's stands for."""
    return backend if backend in record.REGISTRY["bn_act"] else "auto"


def _is_faster(o: BnActOperands, activation: str, backend: str) -> bool:
    """Whether a kernel of ours is chosen, and not ATen."""
    if torch.compiler.is_compiling():  # a graph is for one choice; a size may be symbolic
        N, C, H, W = o.x.shape
        kind = (o.mean is None, o.residual is not None, o.x.dtype, o.x.device.type)
        return _is_computed(activation, *kind, backend) and backends_of_bn_act.pays(
            N * C * H * W, H * W, layout.is_nhwc(o.x)
        )
    try:
        return _is_chosen(bn_act_problem(o, activation), backend)
    except (TypeError, ValueError):
        return False


def _is_computed(
    activation: str, is_training: bool, has_residual: bool, dtype: torch.dtype, device: str, backend: str
) -> bool:
    """Whether there is a kernel of ours for such maps, where they are large."""
    problem = BnActProblem(64, 64, 64, 64, activation, is_training, has_residual, True, dtype, device)
    return _is_chosen(problem, backend)


_is_computed._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result


def _is_chosen(problem: BnActProblem, backend: str) -> bool:
    try:
        return choosing.select(problem, _named(backend)).backend.origin != "torch"
    except record.BackendError:  # which was asked for by name, and cannot
        return False
