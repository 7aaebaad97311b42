"""csrc/cuda's kernels: nvcc makes PTX of them, the emulator runs it on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from fused_resnet.emulation import library
from fused_resnet.emulation.interface import PtxConv, PtxConvLaunch, PtxTensorMap, PtxTile
from fused_resnet.emulation.kernel import Kernel, Outcome
from fused_resnet.emulation.parser import kernel_names
from fused_resnet.emulation.tensor_map import TensorMap
from fused_resnet.kernels.resources import MANGLED
from fused_resnet.kernels.sources import ROOT
from fused_resnet.operators.operands import VECTORS, ConvOperands, Int8Operands
from fused_resnet.operators.problem import BYTE_DTYPES, ConvProblem

NUM_TILES, ANY_ALIGNMENT = 5, (1, 3)  # csrc/cuda/sm80/tiles.h
FIRST_GROUPED_TILE, GROUPED_TILES = 60, tuple(range(60, 63))  # csrc/cuda/sm80/grouped_tiles.h
FIRST_SM90_TILE, SM90_TILES = 90, tuple(range(90, 96))  # csrc/cuda/sm90/tiles.h
CSRC = ROOT / "csrc"
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/common/dtype.h
_ACTIVATIONS = ("none", "relu", "relu6", "silu")  # csrc/common/activation.h
# (tile, bytes of a copy) of every instance that csrc/cuda/sm80/conv_bn_act.cu compiles
INSTANCES = (*((tile, 16) for tile in range(NUM_TILES)), *((tile, copy) for tile in ANY_ALIGNMENT for copy in (8, 0)))
_ELEMENTS = {
    torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16",
    torch.uint8: "uint8_t", torch.int8: "int8_t",
}  # fmt: skip
_SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # a block's, CUDA C++ programming guide
_NUM_SMS = 132  # of an H100
_MOST_POINTWISE_BLOCKS, _POINTWISE_THREADS = 1 << 14, 256  # csrc/cuda/add_relu.cu and .cuh


def why_not() -> Optional[str]:
    """Why none of csrc's CUDA kernels can be compiled here, or None."""
    if nvcc() is None:
        return "nvcc was not found, neither in PATH nor in /usr/local/cuda/bin"
    if not (CSRC / "cuda").exists():
        return f"{CSRC / 'cuda'} does not exist; a checkout has it"
    return None


def nvcc() -> Optional[str]:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_version() -> Optional[str]:
    """Its release, or None where there is no nvcc."""
    compiler = nvcc()
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout if compiler else ""
    found = re.search(r"release ([\d.]+)", said)
    return found[1] if found else None


@functools.cache
def folder() -> Path:
    """Where compiled PTX lies while this process lives."""
    made = tempfile.TemporaryDirectory(prefix="fused_resnet_ptx_")
    folder.made = made  # type: ignore[attr-defined]
    return Path(made.name)


def compile_cuda(source: str, arch: str, *, include: tuple[Path, ...] = (), cache: Optional[Path] = None) -> str:
    """The PTX that nvcc makes of a source's text. arch: "sm_80", "sm_90a" and so on.

    cache: a folder, by default one of this process's own, where the same text is compiled once.
    """
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("emulation: nvcc was not found, neither in PATH nor in /usr/local/cuda/bin.")
    options = ["-ptx", "-std=c++17", "-O3", f"-arch={arch}", *[f"-I{path}" for path in include]]
    key = hashlib.sha256("\n".join([source, *options]).encode()).hexdigest()[:16]
    path = (cache or folder()) / f"{key}.ptx"
    if not path.exists():
        written = path.with_suffix(".cu")
        written.write_text(source)
        part = path.with_suffix(f".{os.getpid()}")
        done = subprocess.run([compiler, *options, str(written), "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"emulation: nvcc failed: {done.stderr.strip()[-2000:]}")
        part.rename(path)
    return path.read_text()


def _project(source: str, arch: int, csrc: Path = CSRC) -> str:
    include = (csrc, Path(torch.__file__).parent / "include")
    return compile_cuda(source, f"sm_{arch}", include=include)


@functools.cache
def conv_text(dtype: torch.dtype, arch: int, instances: tuple[tuple[int, int], ...], csrc: Path = CSRC) -> str:
    """The PTX of the convolution, of each (tile, bytes of a copy), and of the kernel that adds split sums up.

    csrc: where the headers are. What a folder's headers make is remembered.
    """
    element = _ELEMENTS[dtype]
    kernels = [f"conv_bn_act_kernel<{element}, {tile}, {copy}>" for tile, copy in instances]
    kernels.append(f"sum_splits_kernel<{element}>")
    declared = [f"{kernel}(const __grid_constant__ ConvArguments)" for kernel in kernels]
    return _project(_instances("cuda/sm80/conv_bn_act.cuh", declared), arch, csrc)


@functools.cache
def grouped_conv_text(dtype: torch.dtype, arch: int, instances: tuple[tuple[int, int], ...], csrc: Path = CSRC) -> str:
    """The PTX of the grouped 3x3 convolution, of each (tile, width)."""
    element = _ELEMENTS[dtype]
    kernels = [f"grouped_conv_kernel<{element}, {tile - FIRST_GROUPED_TILE}, {width}>" for tile, width in instances]
    declared = [f"{kernel}(const __grid_constant__ ConvArguments)" for kernel in kernels]
    return _project(_instances("cuda/sm80/grouped.cuh", declared, "fused_resnet::grouped"), arch, csrc)


@functools.cache
def sm90_conv_text(dtype: torch.dtype, tiles: tuple[int, ...], csrc: Path = CSRC) -> str:
    """The PTX of the convolution for sm_90a, of each tile."""
    kernels = [f"conv_bn_act_kernel<{_ELEMENTS[dtype]}, {tile - FIRST_SM90_TILE}>" for tile in tiles]
    parameters = ("ConvArguments", *["TensorMap"] * 4)
    declared = [f"{kernel}({', '.join(f'const __grid_constant__ {p}' for p in parameters)})" for kernel in kernels]
    source = _instances("cuda/sm90/conv_bn_act.cuh", declared, "fused_resnet::sm90")
    include = (csrc, Path(torch.__file__).parent / "include")
    return compile_cuda(source, "sm_90a", include=include)


@functools.cache
def add_relu_text(arch: int) -> str:
    """The PTX of the addition and of its gradient, for every dtype."""
    elements = [_ELEMENTS[dtype] for dtype in _DTYPES]
    pairs = [(element, op) for element in elements for op in ("AddRelu", "AddReluBackward")]
    kernels = [f"pointwise_kernel<{e}, {op}>(const {e}*, const {e}*, {e}*, int64_t)" for e, op in pairs]
    return _project(_instances("cuda/add_relu.cuh", kernels), arch)


def _instances(header: str, kernels: Sequence[str], namespace: str = "fused_resnet") -> str:
    lines = "\n".join(f"template __global__ void {kernel};" for kernel in kernels)
    return f'#include "{header}"\nnamespace {namespace} {{\n{lines}\n}}\n'


@functools.lru_cache(maxsize=16)
def _kernel(text: str, part: str = "") -> Kernel:
    """The kernel whose mangled name has this part."""
    return Kernel(text, next(name for name in kernel_names(text) if part in name))


# -------------------------------------------------------------------------------------------------------- convolution


def prepare(
    problem: ConvProblem, operands: Union[ConvOperands, Int8Operands], out: Tensor, partials: Optional[Tensor],
    tile: int, splits: int, arch: int, num_sms: int = _NUM_SMS,
) -> PtxConvLaunch:  # fmt: skip
    """How csrc's launcher would start this. Raises ValueError with its reason where it would refuse."""
    p, o = problem, operands
    conv = _described(p, tile, arch)
    conv.x, conv.weight, conv.residual = o.x.data_ptr(), o.weight.data_ptr(), _pointer(o.residual)
    conv.out, conv.partials = out.data_ptr(), _pointer(partials)
    conv.splits, conv.num_sms = splits, num_sms
    if isinstance(o, Int8Operands):  # as csrc/cuda/operators.cpp names them
        vectors = dict(bn_weight=o.epilogue.multiplier, bn_bias=o.epilogue.bias)
        conv.residual_scale, conv.low, conv.high = o.epilogue.residual, o.epilogue.low, o.epilogue.high
        conv.residual_sign = 0x80 if o.residual is not None and o.residual.dtype == torch.int8 else 0
    else:
        vectors = o._asdict()
        conv.eps, conv.activation = o.eps, _ACTIVATIONS.index(p.activation)
    for i, name in enumerate(VECTORS):
        vector = vectors.get(name)
        conv.vectors[i] = _pointer(vector)
        conv.vector_dtypes[i] = 0 if vector is None else _DTYPES[vector.dtype]
    launch = PtxConvLaunch()
    if reason := _why_not_launched(conv, launch):
        raise ValueError(f"cuda_conv_bn_act: {reason}.")
    return launch


class Tile(NamedTuple):
    """What a tile takes of a GPU. cluster: blocks that share what they read."""

    block_m: int
    block_n: int
    stages: int
    cluster: int
    threads: int
    shared_bytes: int


def tile_of(index: int, element_bytes: int) -> Tile:
    """As csrc's tables have it. Raises IndexError where they have no such tile."""
    tile = PtxTile()
    if not library.library().ptx_tile(index, element_bytes, ctypes.byref(tile)):
        raise IndexError(f"there is no tile {index}")
    return Tile(*(getattr(tile, name) for name in Tile._fields))


def tiles_for(problem: ConvProblem, arch: int) -> list[int]:
    """The tiles that this GPU can run of it, where x and the weight are 16-byte aligned."""
    tiles = [*range(NUM_TILES), *GROUPED_TILES, *SM90_TILES]
    return [tile for tile in tiles if _why_not_launched(_described(problem, tile, arch), PtxConvLaunch()) is None]


def _described(p: ConvProblem, tile: int, arch: int) -> PtxConv:
    """The launch of a problem whose tensors are nowhere yet."""
    conv = PtxConv(
        element_bytes=p.dtype.itemsize, tile=tile, splits=1, capability=arch, num_sms=_NUM_SMS,
        smem_per_block=1024 * _SHARED_KIB.get(arch, 99),
    )  # fmt: skip
    conv.sizes[:] = [p.N, p.C, p.H, p.W, p.K, p.R, p.S, *p.stride, *p.padding, *p.dilation, p.groups]
    return conv


def _why_not_launched(conv: PtxConv, launch: PtxConvLaunch) -> Optional[str]:
    reason = library.library().ptx_conv_launch(ctypes.byref(conv), ctypes.byref(launch))
    return reason and reason.decode()


def _pointer(tensor: Optional[Tensor]) -> Optional[int]:
    return None if tensor is None else tensor.data_ptr()


def conv_bn_act(
    problem: ConvProblem, operands: Union[ConvOperands, Int8Operands], arch: int, tile: int, splits: int = 1, *,
    out: Optional[Tensor] = None, instances: tuple[tuple[int, int], ...] = (), text: str = "",
    num_sms: int = _NUM_SMS, **how,
) -> tuple[Tensor, list[Outcome]]:  # fmt: skip
    """The output and the outcomes: of the convolution, and of what adds split sums up.

    out: by default a new tensor of NaN. Bytes have none: give one whose bytes all have to change.

    The operands are as csrc's operator wants them: channels_last, vectors contiguous. how: as `Kernel.run` takes it.
    instances: those to compile together, which takes a second each; by default all. text: PTX instead of theirs.
    num_sms: of the GPU, as many blocks of sm_90a's kernel run at a time.
    """
    p = problem
    if out is None:
        out = torch.full(p.output_shape, torch.nan, dtype=p.dtype).contiguous(memory_format=torch.channels_last)
    # NaN, or an integer that no sum reaches
    poison = torch.tensor(-(2**31), dtype=torch.int32) if p.dtype in BYTE_DTYPES else torch.tensor(torch.nan)
    partials = poison.repeat(splits, out.numel()) if splits > 1 else None
    launch = prepare(p, operands, out, partials, tile, splits, arch, num_sms)
    memory: dict[str, Any] = {name: t for name, t in operands._asdict().items() if isinstance(t, Tensor)}
    if isinstance(operands, Int8Operands):
        memory |= dict(multiplier=operands.epilogue.multiplier, bias=operands.epilogue.bias)
    memory["out"] = out
    if partials is not None:
        memory["partials"] = partials
    given: list[Any] = [bytes(launch.arguments[: launch.argument_bytes])]
    if tile >= FIRST_SM90_TILE:
        mapped = (operands.x, operands.weight, operands.residual, out)
        given += [_tensor_map(launch.maps[i], array) for i, array in enumerate(mapped)]
        text = text or sm90_conv_text(p.dtype, (tile,))
        kernel = _kernel(text, f"conv_bn_act_kernelI{MANGLED[p.dtype]}Li{tile - FIRST_SM90_TILE}E")
    elif tile in GROUPED_TILES:
        text = text or grouped_conv_text(p.dtype, arch, ((tile, launch.width),))
        kernel = _kernel(text, f"grouped_conv_kernelI{MANGLED[p.dtype]}Li{tile - FIRST_GROUPED_TILE}ELi{launch.width}E")
    else:
        text = text or conv_text(p.dtype, arch, instances or INSTANCES)
        kernel = _kernel(text, f"conv_bn_act_kernelI{MANGLED[p.dtype]}Li{tile}ELi{launch.copy_bytes}E")
    written = out if partials is None else partials
    outcomes = [kernel.run(launch.blocks, launch.threads, given, shared_bytes=launch.shared_bytes, memory=memory,
                           cluster=launch.cluster, writable=[written], **how)]  # fmt: skip
    if launch.sum_blocks and not outcomes[0].faulted:
        kernel = _kernel(text, "sum_splits_kernel")
        outcomes.append(kernel.run(launch.sum_blocks, launch.sum_threads, given, memory=memory, writable=[out], **how))
    return out, outcomes


def _tensor_map(plan: PtxTensorMap, array: Optional[Tensor]) -> Optional[TensorMap]:
    """The map that csrc plans, with the driver's limits checked; None where it plans none."""
    rank = plan.rank
    if rank == 0:
        return None
    assert array is not None
    described = dict(swizzle=plan.swizzle, element_strides=plan.element_strides[:rank])
    sizes, strides = plan.sizes[:rank], plan.strides[: rank - 1]
    if not plan.is_im2col:
        return TensorMap(array, sizes, strides, plan.box[:rank], **described)
    return TensorMap.im2col(
        array, sizes, strides, lower=plan.lower[: rank - 2], upper=plan.upper[: rank - 2], pixels=plan.pixels,
        channels=plan.channels, **described,
    )  # fmt: skip


def run_add_relu(first: Tensor, second: Tensor, out: Tensor, arch: int, *, backward: bool = False, **how) -> Outcome:
    """As csrc/cuda/add_relu.cu launches it, over flat memory."""
    chunk = 16 // out.element_size()
    chunks = -(-out.numel() // chunk)
    blocks = min(-(-chunks // _POINTWISE_THREADS), _MOST_POINTWISE_BLOCKS)
    op = "NS_15AddReluBackwardE" if backward else "NS_7AddReluE"
    kernel = _kernel(add_relu_text(arch), f"pointwise_kernelI{MANGLED[out.dtype]}{op}")
    return kernel.run(blocks, _POINTWISE_THREADS, [first, second, out, out.numel()], writable=[out], **how)
