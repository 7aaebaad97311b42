"""act(scale * conv(x, w) + shift + residual), BN live in the fp32 epilogue: which kernel runs it, and how.

    scale = bn_weight / sqrt(bn_var + eps),  shift = (bias - bn_mean) * scale + bn_bias

The kernels are in `pointer`, `gemm_tma`, `rows_tma` and `lines_tma`; a config names one.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from fused_resnet.kernels.triton import runtime
from fused_resnet.kernels.triton.conv import gemm_tma, lines_tma, pointer, row_space, rows_tma
from fused_resnet.kernels.triton.conv.configs import (
    MAX_PITCH,
    MAX_ROWS,
    TritonConfig,
    default_config,
    is_gemm,
    num_rows,
    num_tiles,
    rows_of,
    why_illegal,
)
from fused_resnet.kernels.triton.conv.epilogue import Epilogue, Int8Epilogue, sum_parts_kernel
from fused_resnet.machine import devices
from fused_resnet.operators.operands import ConvOperands, Int8Operands
from fused_resnet.operators.problem import BYTE_DTYPES, FLOAT8, ConvProblem
from fused_resnet.operators.quantized import Epilogue as Requantization

Operands = Union[ConvOperands, Int8Operands]
_SUM_TILE = dict(BLOCK_M=32, BLOCK_N=64, num_warps=4)  # of the kernel that adds up the parts of a reduction


class Launch(NamedTuple):
    """A kernel, how many programs of it, its arguments in order, and its constants and compiler options."""

    kernel: Any
    num_programs: int
    arguments: tuple
    options: dict[str, Any]


def why_not(problem: ConvProblem) -> Optional[str]:
    """Why this machine cannot run the problem, or None."""
    rows, channels = problem.N * problem.P * problem.Q, max(problem.C, problem.K)
    if rows > MAX_ROWS:
        return f"{rows} output pixels are too many (at most {MAX_ROWS})"
    if channels > MAX_PITCH:
        return f"{channels} channels are too many (at most {MAX_PITCH})"
    if problem.dtype in BYTE_DTYPES:
        return runtime.why_not(problem.device, problem.dtype, BYTE_DTYPES)
    if problem.dtype == FLOAT8:
        return runtime.why_not(problem.device, FLOAT8, (FLOAT8,)) or why_no_float8(problem.device)
    return runtime.why_not(problem.device, problem.dtype)


def why_no_float8(device: str) -> Optional[str]:
    """Why the GPUs here cannot multiply e4m3, or None. The interpreter can."""
    return None if runtime.INTERPRETED else devices.why_no_float8()


def launch(problem: ConvProblem, operands: Operands, out: Tensor, config: Optional[TritonConfig] = None) -> None:
    """out = act(scale * conv(x, w) + shift + residual), accumulated in fp32; NaN stays NaN. Of bytes, `quantized`'s.

    x, residual and out are NHWC, the weight KRSC in memory, all dense, and the vectors are contiguous: the caller has
    seen to it. Strides are not read, since those of dimensions of size 1 may be anything. Each of x, residual and out
    may instead lie in row space, with two dimensions (`row_space`); the halo of out is then written as zero. In fp32
    the products are TF32 where torch's own convolution would use it (`devices.allows_tf32`), else fp32.

    config: by default `default_config`, which also takes the place of a TMA form where an operand does not start at a
    multiple of 16 bytes. Raises ValueError when the config cannot compute the problem, or not from x's layout.
    """
    if not out.numel():
        return
    config = config or default_config(problem)
    if reason := why_illegal(problem, config, runtime.arch(out.device)):
        raise ValueError(f"conv_bn_act: {config} cannot compute {problem}: {reason}.")
    if config.form != "pointer" and (operands.x.data_ptr() % 16 or operands.weight.data_ptr() % 16):
        config = default_config(problem)
    for each in prepare(problem, operands, out, config):
        runtime.start(*each, like=out)


def prepare(problem: ConvProblem, operands: Operands, out: Any, config: TritonConfig) -> list[Launch]:
    """What `launch` starts, in order: the convolution, and behind a split reduction the kernel that adds it up.

    With rows_tma an x that is not in row space yet is copied there first.
    """
    p, o = problem, operands  # type: ConvProblem, Any
    if config.form == "rows_tma" and o.x.dim() == 4:
        o = o._replace(x=row_space.pack(o.x))
    x_has_halo = o.x.dim() == 2
    if x_has_halo and config.form != "rows_tma" and not is_gemm(p):
        raise ValueError(f"conv_bn_act: {config.form} cannot read x in row space for {p}: unpack it first.")
    rows = rows_of(p, config.form, x_has_halo)
    M = num_rows(p, rows)
    partial = None
    if config.split_k > 1:
        columns, dtype = p.Q if rows == "lines" else 1, torch.int32 if p.dtype in BYTE_DTYPES else torch.float32
        partial = torch.empty(config.split_k, M * columns, p.K, dtype=dtype, device=o.x.device)
    epilogue = _epilogue(o, out, partial)
    spaces = dict(
        ACTIVATION=p.activation,
        RESIDUAL="halo" if o.residual is not None and o.residual.dim() == 2 else "compact",
        OUT="halo" if out.dim() == 2 else "compact",
    )
    options = dict(
        spaces,
        ROWS=rows,
        INPUT_PRECISION="tf32" if p.dtype == torch.float32 and devices.allows_tf32() else "ieee",
        **{name: getattr(config, name) for name in TritonConfig._fields[:6]},
    )
    first = (_pointer if config.form == "pointer" else _tma)(p, o, config, epilogue, M, options)
    return [first] if partial is None else [first, _sum(p, tuple(partial.shape), epilogue, rows, spaces)]


def _epilogue(o: Operands, out: Any, partial: Optional[Tensor]) -> Union[Epilogue, Int8Epilogue]:
    if isinstance(o, ConvOperands):
        vectors = (o.bn_weight, o.bn_bias, o.bn_mean, o.bn_var, float(o.eps), o.bias)
        return Epilogue(*vectors, o.residual, out, partial)
    e, filter_sums = o.epilogue, o.filter_sums
    if o.x.dtype != torch.uint8:
        filter_sums = None  # of use with u8 alone
    elif filter_sums is None:
        filter_sums = o.weight.sum((1, 2, 3), dtype=torch.int32)
    constants = (e.multiplier, e.bias, float(e.residual), float(e.low), float(e.high))
    return Int8Epilogue(*constants, filter_sums, o.residual, out, partial)


def launches(
    problem: ConvProblem, config: TritonConfig, bias_dtype: torch.dtype, *, row_space_output: bool = False
) -> list[Launch]:
    """What `launch` would start with aligned tensors, none of which is there. Live BN is in fp32.

    row_space_output: the output, and a residual, lie in row space, as between two convolutions of a plan.
    """
    p = problem

    def empty(*shape: int, dtype: torch.dtype = p.output_dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    out = empty(row_space.num_rows(p.N, p.P, p.Q), p.K) if row_space_output else empty(*p.output_shape)
    x, weight_shape = empty(p.N, p.C, p.H, p.W, dtype=p.dtype), (p.K, p.C // p.groups, p.R, p.S)
    residual = out if p.has_residual else None
    if p.dtype in (*BYTE_DTYPES, FLOAT8):
        constants = Requantization(*(empty(p.K, dtype=torch.float32),) * 2, 1.0, 0.0, 255.0, p.output_dtype)
        weight = empty(*weight_shape, dtype=FLOAT8 if p.dtype == FLOAT8 else torch.int8)
        return prepare(p, Int8Operands(x, weight, constants, residual), out, config)
    vector = empty(p.K, dtype=torch.float32) if p.has_bn else None
    bias = empty(p.K, dtype=bias_dtype) if p.has_bias else None
    operands = ConvOperands(x, empty(*weight_shape), *(vector,) * 4, bias=bias, residual=residual)
    return prepare(p, operands, out, config)


def _pointer(
    p: ConvProblem, o: Operands, config: TritonConfig, epilogue: Any, M: int, options: dict[str, Any]
) -> Launch:
    options.update(SPLIT_K=config.split_k, WHOLE_STEPS=p.C // p.groups % config.BLOCK_K == 0)
    num_programs = num_tiles(p, config, options["ROWS"])
    arguments = (o.x, o.weight, epilogue, M, p.K, p.P, p.Q, p.C)
    if is_gemm(p):
        return Launch(pointer._pointwise_bn_act_kernel, num_programs, arguments, options)
    window = (p.H, p.W, p.S, p.K // p.groups, p.C // p.groups, p.reduction, *p.stride, *p.padding, *p.dilation)
    return Launch(pointer._conv_bn_act_kernel, num_programs, (*arguments, *window), options)


def _tma(p: ConvProblem, o: Operands, config: TritonConfig, epilogue: Any, M: int, options: dict[str, Any]) -> Launch:
    c = config
    width = p.C if options["ROWS"] != "lines" else p.stride[0] * p.W * p.C
    # M: in every form a row of x for a row of the output
    x = runtime.descriptor(o.x, (M, width), (c.BLOCK_M, c.BLOCK_K))
    weight = runtime.descriptor(o.weight, (p.K, p.reduction), (c.BLOCK_N, c.BLOCK_K))
    tiles = num_tiles(p, c, options["ROWS"])
    arguments = (x, weight, epilogue, M, p.K, p.P, p.Q)
    if c.form == "lines_tma":
        options.update(STRIDE=p.stride[0], STEPS_PER_TAP=p.C // c.BLOCK_K)
        return Launch(lines_tma._lines_tma_kernel, tiles, (*arguments, p.C), options)
    options.update(SPLIT_K=c.split_k, PERSISTENT=c.persistent)
    num_programs = min(tiles, runtime.num_sms(o.x.device)) if c.persistent else tiles
    if c.form == "rows_tma":
        options["STEPS_PER_TAP"] = p.C // c.BLOCK_K
        return Launch(rows_tma._rows_tma_kernel, num_programs, (*arguments, tiles), options)
    return Launch(gemm_tma._gemm_tma_kernel, num_programs, (*arguments, p.C, tiles), options)


def _sum(p: ConvProblem, shape: tuple[int, ...], epilogue: Any, rows: str, spaces: dict) -> Launch:
    """shape: of epilogue.partial."""
    split_k, M, K = shape
    options = dict(spaces, ROWS="halo" if rows == "halo" else "compact", SPLIT_K=split_k, **_SUM_TILE)
    num_programs = -(-M // _SUM_TILE["BLOCK_M"]) * -(-K // _SUM_TILE["BLOCK_N"])
    return Launch(sum_parts_kernel, num_programs, (epilogue, M, K, p.P, p.Q), options)
