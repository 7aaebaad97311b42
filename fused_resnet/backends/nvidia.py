"""NVIDIA GPUs: cuDNN's and cuBLASLt's fused calls, and our kernels in CUDA and Triton."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple, Optional, Sequence, cast

import torch
from torch import Tensor

from fused_resnet.backends.record import NEEDS_FOLDED_BN, Backend, Problem
from fused_resnet.kernels import compiled
from fused_resnet.kernels.triton import runtime
from fused_resnet.kernels.triton.conv import configs, cost
from fused_resnet.kernels.triton.conv import launch as triton_conv_bn_act
from fused_resnet.kernels.triton.conv.configs import TritonConfig
from fused_resnet.operators import layout
from fused_resnet.operators.layout import all_channels_last
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem, dtype_name


def _cudnn_why_not(problem: ConvProblem) -> Optional[str]:
    reason = _nvidia_why_not(problem)
    if reason is not None:
        return reason
    if not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    if problem.dtype == torch.float64:
        return "float64 is not supported (float32, float16, bfloat16 are)"
    if problem.has_bn:
        return NEEDS_FOLDED_BN
    if problem.activation != "relu":
        return f"it fuses only ReLU, not {problem.activation}"
    return None


def _cudnn_pays(problem: ConvProblem) -> bool:
    """Dense windows over channels in eights. For the others cuDNN may have no fused engine, and raise.

    Fused stems, with three channels in channels_last, were reported to take 17 times as long (pytorch issue 68506).
    """
    return problem.groups == 1 and problem.dilation == (1, 1) and problem.C % 8 == 0 and problem.K % 8 == 0


def _cudnn_conv_bn_act(problem: ConvProblem, operands: ConvOperands) -> Tensor:
    o = all_channels_last(operands)
    bias = None if o.bias is None else o.bias.to(o.x.dtype)
    window = (problem.stride, problem.padding, problem.dilation, problem.groups)
    if o.residual is None:
        return torch.cudnn_convolution_relu(o.x, o.weight, bias, *window)
    return torch.cudnn_convolution_add_relu(o.x, o.weight, o.residual, 1.0, bias, *window)


def _nvidia_why_not(problem: Problem) -> Optional[str]:
    if problem.device != "cuda":
        return f"it runs on NVIDIA GPUs, the tensors are on {problem.device}"
    return "it does not run on ROCm" if torch.version.hip else None


def _cublaslt_why_not(problem: ConvProblem) -> Optional[str]:
    """None where torch takes cuBLASLt's bias epilogue, else why it does not.

    It takes it for a dense bias vector and more than one channel on either side. Otherwise it would run a plain GEMM,
    and the bias and the ReLU after it.
    """
    reason = _nvidia_why_not(problem)
    if reason is not None:
        return reason
    if os.environ.get("DISABLE_ADDMM_CUDA_LT", "0") not in ("", "0"):
        return "DISABLE_ADDMM_CUDA_LT is set"
    if problem.has_bn:
        return NEEDS_FOLDED_BN
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype_name(problem.dtype)} is not supported (float16, bfloat16 are)"
    if not problem.is_pointwise or problem.groups > 1:
        return "it is a matrix product: 1x1 convolutions with stride 1, no padding and one group"
    if not problem.has_bias or problem.has_residual or problem.activation != "relu":
        return "its epilogue is a bias and a ReLU, no more and no less"
    return "it needs more than one channel on either side" if min(problem.C, problem.K) == 1 else None


def _cublaslt_conv_bn_act(problem: ConvProblem, operands: ConvOperands) -> Tensor:
    p, o = problem, all_channels_last(operands)
    rows = o.x.permute(0, 2, 3, 1).view(-1, p.C)
    y = torch._addmm_activation(cast(Tensor, o.bias).to(p.dtype), rows, o.weight.view(p.K, p.C).t())
    return y.view(p.N, p.P, p.Q, p.K).permute(0, 3, 1, 2)


def _triton_conv_bn_act(problem: ConvProblem, operands: ConvOperands, config: Optional[TritonConfig] = None) -> Tensor:
    out = layout.empty_output(problem, operands.x)
    triton_conv_bn_act.launch(problem, all_channels_last(operands), out, config)
    return out


def _triton_configs(problem: ConvProblem) -> Sequence[TritonConfig]:
    return () if runtime.INTERPRETED else configs.configs(problem, *_triton_target())


def _triton_legal(problem: ConvProblem) -> Sequence[TritonConfig]:
    """Also those not worth measuring: what is tuned for one batch is used for others."""
    arch, num_sms = _triton_target()
    considered = (config for config, _ in configs.search_space(problem, arch, num_sms))
    return [config for config in considered if configs.why_illegal(problem, config, arch) is None]


def _triton_estimated_us(problem: ConvProblem, config: TritonConfig) -> float:
    return cost.estimated_us(problem, config, *_triton_target())


def _triton_launch_us(config: Optional[TritonConfig]) -> float:
    """Triton encodes every tensor descriptor anew at each launch: 38 us reported for an H100 (Triton PR 7987). A plan's
    launches are replayed from a CUDA graph."""
    return 0.0 if config is None or config.form == "pointer" else 38.0


def _triton_target() -> tuple[int, int]:
    """(compute capability times ten, multiprocessors) of the current GPU; those of an H200 without one."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return runtime.arch(device), runtime.num_sms(device)


def _cuda_conv_why_not(problem: ConvProblem) -> Optional[str]:
    reason = cuda_why_not(problem)
    if reason is not None:
        return reason
    if problem.dtype == torch.float32 and not triton_conv_bn_act.allows_tf32():
        return "in float32 it multiplies in TF32, which torch.backends.cudnn does not allow"
    return _cuda_limits(problem)


@functools.lru_cache(maxsize=1024)  # it is asked at every call
def _cuda_limits(problem: ConvProblem) -> Optional[str]:
    """Why csrc's kernel cannot index this problem, or None. Asked of the library itself, which must be loaded.

    It assumes that x and the weight are 16-byte aligned, as tensors are that are not views into the middle of others.
    """
    question = torch.ops.fused_resnet.cuda_conv_why_not.default
    # past tracers, transforms and modes: they would record the question, or refuse its answer
    past_them = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return question.redispatch(past_them, *_cuda_sizes(problem), problem.dtype.itemsize) or None


def _cuda_sizes(p: ConvProblem) -> tuple:
    """The first arguments of csrc's questions about a convolution: x, weight, stride, padding, dilation, groups."""
    return (p.N, p.C, p.H, p.W), (p.K, p.C // p.groups, p.R, p.S), p.stride, p.padding, p.dilation, p.groups


def cuda_why_not(problem: Problem) -> Optional[str]:
    reason = _nvidia_why_not(problem) or compiled.load("cuda")
    if reason is not None:
        return reason
    if problem.dtype == torch.float64:
        return "float64 is not supported (float32, float16, bfloat16 are)"
    return runtime.why_too_old()


class CudaConfig(NamedTuple):
    """How csrc's kernel computes a convolution.

    tile: one of csrc/cuda/sm80/tiles.h's, by index. splits: in how many parts the reduction is summed, before a second
    kernel adds them up.
    """

    tile: int
    splits: int


def _cuda_conv_bn_act(problem: ConvProblem, operands: ConvOperands, config: Optional[CudaConfig] = None) -> Tensor:
    """config: by default the likeliest, which also takes the place of one that needs better aligned operands."""
    p, o = problem, all_channels_last(operands)
    out = layout.empty_output(p, o.x)
    is_aligned = (o.x.data_ptr() | o.weight.data_ptr()) % 16 == 0
    tile, splits = _cuda_choice(p, config, is_aligned, out.device.index)
    partials = None if splits == 1 else torch.empty(splits, out.numel(), dtype=torch.float32, device=out.device)
    torch.ops.fused_resnet.cuda_conv_bn_act.default(
        *o, p.stride, p.padding, p.dilation, p.groups, p.activation, triton_conv_bn_act.allows_tf32(), tile, partials,
        out,
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=4096)
def _cuda_choice(problem: ConvProblem, config: Optional[CudaConfig], is_aligned: bool, device: int) -> CudaConfig:
    legal = _cuda_legal_on(problem, is_aligned, device)
    return config if config is not None and config in legal else legal[0]


@functools.lru_cache(maxsize=4096)
def _cuda_legal_on(problem: ConvProblem, is_aligned: bool, device: int) -> tuple[CudaConfig, ...]:
    """What this GPU can run, the likeliest first: more splits where a small batch would not fill it."""
    flat = torch.ops.fused_resnet.cuda_conv_configs.default(
        *_cuda_sizes(problem), problem.dtype.itemsize, is_aligned, device
    )
    return tuple(map(CudaConfig, flat[::2], flat[1::2]))


def _cuda_legal(problem: ConvProblem) -> Sequence[CudaConfig]:
    return _cuda_legal_on(problem, True, torch.cuda.current_device())


def _cuda_configs(problem: ConvProblem) -> Sequence[CudaConfig]:
    """Each tile in one part and in as many as should suit it best; not the default, which is the first of all."""
    default, *others = _cuda_legal(problem)
    seen, found = {default.tile}, []
    for config in others:
        if config.splits == 1 or config.tile not in seen:
            found.append(config)
        seen.add(config.tile)
    return found


CUDNN = Backend("cudnn", _cudnn_why_not, _cudnn_conv_bn_act, auto=("cuda",), takes_bn=False, pays=_cudnn_pays)
CUBLASLT = Backend("cublaslt", _cublaslt_why_not, _cublaslt_conv_bn_act, takes_bn=False)
CUDA = Backend("cuda", _cuda_conv_why_not, _cuda_conv_bn_act, configs=_cuda_configs, legal=_cuda_legal)
TRITON = Backend(
    "triton",
    triton_conv_bn_act.why_not,
    _triton_conv_bn_act,
    configs=_triton_configs,
    legal=_triton_legal,
    default_config=configs.default_config,
    estimated_us=_triton_estimated_us,
    launch_us=_triton_launch_us,
    reads_row_space=lambda config: config is not None and config.form == "rows_tma",
)
