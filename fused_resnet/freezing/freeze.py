"""freeze: a model as an inference plan for each input shape, or in parts where it cannot be one as a whole."""

from __future__ import annotations

import itertools
import logging
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_resnet import backends
from fused_resnet.choosing.decide import Tune, Tuning, check_tune
from fused_resnet.choosing.timing import Progress, never_back, silent
from fused_resnet.freezing.calibration import QUANTIZED_DTYPES, Keep, Source, checked
from fused_resnet.freezing.copies import unwrapped
from fused_resnet.freezing.dtypes import is_floating
from fused_resnet.freezing.frozen import Frozen, FrozenModel, FrozenParts, NothingToFreeze
from fused_resnet.freezing.trace import Untraceable, in_training_mode, reads_mode, refuse_hooks
from fused_resnet.operators.problem import dtype_name

_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
# In torch.ao.nn.quantized, but of models yet to be quantized, or inside a module that quantizes its own input.
_SERVES_FLOATS = ("FloatFunctional", "FXFloatFunctional", "LinearPackedParams")

log = logging.getLogger("fused_resnet")


def freeze(
    model: nn.Module,
    example_input: Any,
    *,
    dtype: Optional[torch.dtype] = None,
    calibrate: Optional[Source] = None,
    keep: Keep = 0,
    backend: str = "auto",
    tune: Tune = "auto",
    progress: Optional[Progress] = None,
) -> Union["FrozenModel", "FrozenParts"]:
    """An inference-only copy of `model`: BN folded, weights packed, one plan per input shape, a CUDA graph on GPUs.

    model: in eval mode; it is not changed, and later changes to it do not reach the frozen copy. example_input: what
    the model takes, a tensor or a list or dict of them; its plan is made now, others when their shape is first seen.
    dtype: what the arithmetic runs in (fp32, bf16, fp16, fp64, int8, float8_e4m3fn); default, as the model computes.
    backend: "auto", or the one that every convolution must use. In int8 that is "onednn", whose bytes may be a step off
    the contract's.

    calibrate: for int8 and e4m3, batches of 16 or more images as the model takes them, or (images, labels) pairs. Or
    `Scales`, or the path of a file of them. In int8 a model with FakeQuantize modules, or with PT2E's quantize and
    dequantize nodes, brings its own, which come first: calibrate may then be left out. keep: the convolutions and
    linear layers to leave in floats, by name or by the name of a module that holds them. A number keeps so many of the
    most sensitive convolutions. In int8, convolutions with their ReLU or ReLU6 and residual, max-poolings, global
    averages and, on a CPU, the classifier compute by docs/int8.md's contract: all kernels of ours give the same
    bytes. What else there is computes in bf16 where that is fast, as on GPUs, and in fp32 elsewhere. e4m3 is for GPUs
    from sm_89 on. Its kernels give values within a bound, and the first convolution is in bf16.

    tune: what to do about convolutions that nobody has measured on this machine. "auto" checks every backend that can
    run them against the reference. It times the right ones as a plan runs them. What it finds is kept in the user's
    cache. It takes 3 s of timing on a CPU or 10 to 30 calls, 60 s on a GPU, and the checks beside. On a CPU, runs of
    convolutions are also compared with one call for all of them, which takes 2 s or 5 to 20 calls. With AMX in bf16
    that comes first. Where one call is clearly faster than they could be, they are not measured. A number allows so
    many seconds instead, for either, and has all measured. False measures nothing, and neither does
    FUSED_RESNET_TUNE=0: then rules decide. The next freeze of the model on this machine measures nothing. Shapes that
    are first seen in a call are checked alone.
    progress: while measuring, is told which fraction is done, and what is being done.

    With a dtype, the input and what most of the model is in are converted, as by `model.to(dtype)`, and the rest is as
    under autocast: products (convolutions, linear layers, matmul, attention) cast what arrives, a step with an explicit
    cast computes in what it was cast to, and sums promote. Weights in an fp32 step are not rounded. Parameters and
    buffers of another dtype than the model's main one keep theirs. Outputs have the dtypes that the model's have.
    Without one, an input that the model refuses for its dtype is cast to the model's, and the outputs back.

    Calls are safe from several threads, outputs are fresh tensors, and autocast around a call changes nothing. A frozen
    model reads its input: where the model writes into it (an in-place ReLU first, `x += y`), the copy does not. A
    frozen CPU plan may turn NaN into 0 where it meets a ReLU, as oneDNN does. On glibc, malloc is told to keep as much
    freed memory as a plan works in (`machine.malloc`).

    A model that torch.fx cannot trace, or that takes no single tensor (detectors, transformers' ResNet), is frozen in
    parts: a FrozenParts, in which the largest modules that can be are frozen and the rest runs as it is. In int8 and
    e4m3 each part is calibrated with what the model calls it with, for batches as the model takes them. What
    torch.compile, DataParallel and DistributedDataParallel wrap is frozen like the plain model.

    Raises RuntimeError where one of these is so:

    - a module to which that makes a difference is in training mode
    - the forward keeps state: a counter, the last features; a cache is none
    - it draws random numbers that depend on no input
    - it sets attributes of what was frozen in it

    TypeError when weights are quantized, sparse or otherwise no plain tensors. TypeError and ValueError when the
    example does not fit the model or no part of it can be traced. ValueError for int8 and e4m3 without calibrate,
    with no images or images unlike the example, and with scales of other weights or steps. Also for FakeQuantize
    modules in any dtype but the model's and int8, and in parts. Also for roundings that int8 cannot be. BackendError
    when `backend` cannot run one of its convolutions, and where int8 or e4m3 cannot run.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: expected an nn.Module, got {type(model).__name__}.")
    example = next((leaf for leaf in pytree.tree_leaves(example_input) if is_floating(leaf)), None)
    if example is None:
        is_tensor = isinstance(example_input, Tensor)
        got = f"a {dtype_name(example_input.dtype)} tensor" if is_tensor else type(example_input)
        raise TypeError(f"freeze: example_input must be a floating-point tensor as the model takes it, got {got}.")
    _refuse_other_weights(model)
    for name, module in model.named_modules():
        if module.training and reads_mode(module):
            raise in_training_mode(name, module)
        if unwrapped(module) is not module:
            refuse_hooks(name, module)
    device = next((p.device for p in model.parameters()), example.device)
    if example.device != device:
        raise TypeError(f"freeze: example_input is on {example.device} but the model is on {device}.")
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64, *QUANTIZED_DTYPES):
        names = "float32, bfloat16, float16, float64, int8 or float8_e4m3fn"
        raise TypeError(f"freeze: dtype must be {names}, got {dtype}.")
    backends.check_name("freeze", backend)
    calibration = checked(dtype, calibrate, keep, backend, device, model)
    check_tune("freeze", tune)
    tuning = Tuning(tune, silent if progress is None else never_back(progress))
    frozen = [name for name, module in model.named_modules() if isinstance(module, Frozen)]
    if frozen:
        raise ValueError(f"freeze: {frozen[0] or 'the model'} is frozen already. Freeze what it was made from.")
    with torch.inference_mode(False), torch.no_grad():  # copies made in inference mode could not be written to outside
        if not isinstance(example_input, Tensor):
            reason = f"it takes a {type(example_input).__name__}"
            return FrozenParts(model, example_input, dtype, backend, tuning, reason, calibration)
        try:
            return FrozenModel(model, example_input, dtype, backend, tuning, calibration=calibration)
        except Untraceable as error:
            try:
                return FrozenParts(model, example_input, dtype, backend, tuning, str(error), calibration)
            except NothingToFreeze:
                raise error from None


def _refuse_other_weights(model: nn.Module) -> None:
    """Raises TypeError for what is quantized, and for weights that cannot be folded and packed as plain tensors."""
    for name, module in model.named_modules():
        if _is_quantized(type(module)):
            raise TypeError(
                f"freeze: the model is quantized already ({name or 'it'} is a {type(module).__name__} of "
                "torch.ao.nn.quantized), and a plan computes in floats. Freeze the float model that it was made from."
            )
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise TypeError(f"freeze: {name} has no values yet. Call the model once, then freeze it.")
        is_dense = tensor.layout is torch.strided and not tensor.is_quantized
        is_adjacency = tensor.layout in _SPARSE and not isinstance(tensor, nn.Parameter)  # an operand, no weight
        if type(tensor) not in (Tensor, nn.Parameter) or not (is_dense or is_adjacency):
            layout = str(tensor.layout).removeprefix("torch.")
            raise TypeError(
                f"freeze: {name} is a {type(tensor).__name__} of layout {layout} and dtype {dtype_name(tensor.dtype)}, "
                "and a plan takes plain dense weights. Freeze the model as it was before they were converted."
            )


def _is_quantized(cls: type) -> bool:
    """A module between int8 activations. Not one that quantizes its own input, which serves between floats."""
    package, _, rest = cls.__module__.partition("quantized.")
    is_known = package.startswith(("torch.nn.", "torch.ao.nn.")) and rest.startswith("modules")
    return is_known and cls.__name__ not in _SERVES_FLOATS
