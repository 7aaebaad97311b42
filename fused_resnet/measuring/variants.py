"""Ways to run a whole network or block: eager, ours, and what else people can have. One name, one callable."""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn

from fused_resnet import backends
from fused_resnet.backends import winners
from fused_resnet.freezing import plan
from fused_resnet.freezing.freeze import FrozenModel, freeze
from fused_resnet.fusing import convert
from fused_resnet.measuring.timing import Progress, Variants, captured, silent
from fused_resnet.operators.problem import dtype_name

SHORT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BASELINES = ("eager", "folded", "compile", "autotune", "cudnn", "tensorrt", "onnxruntime", "openvino")
# What someone who wants speed would take instead of us; eager and folded are where everyone starts.
COMPETITORS = BASELINES[2:]

UNTUNED = "untuned"  # in place of a backend's name

BASE = "eager NCHW fp32"

Builder = Callable[[], Callable[[], Any]]


def variant_builders(
    model: nn.Module,
    x: Tensor,
    *,
    dtypes: Sequence[torch.dtype],
    baselines: Sequence[str] = ("eager", "folded", "compile"),
    frozen_backends: Sequence[str] = ("auto",),
    with_fused: bool = False,
) -> dict[str, Builder]:
    """Ways to run `model` on x (both fp32), by name: calling one makes the callable, which may raise or take a while.

    "eager NCHW fp32" is always there. Per dtype, as asked for:

    | name | what it is |
    | --- | --- |
    | eager NHWC | the model as it is, in channels_last memory |
    | folded | freeze with backend="eager" |
    | compile | torch.compile with freezing, on CUDA as a CUDA graph |
    | autotune | the same with max-autotune |
    | cudnn | cuDNN's fused convolutions stitched by hand into one CUDA graph |
    | tensorrt, onnxruntime, openvino | the model in these |
    | fused | `fuse` |
    | frozen | `freeze`; with UNTUNED as if nothing had been measured by `fused-resnet tune` |

    Frozen variants get x and convert it themselves; the others get it in their own dtype.
    """
    wide = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    is_on_cuda = x.device.type == "cuda"
    made_of: dict[str, Callable[[torch.dtype], Callable[[], Any]]] = {
        "eager": functools.partial(_eager_nhwc, model, wide),
        "fused": functools.partial(_fused, model, wide),
        "folded": functools.partial(_frozen, model, wide, "eager"),
        "cudnn": functools.partial(_stitched_cudnn, model, wide),
        "compile": functools.partial(_compiled_nhwc, model, wide, {"mode": "reduce-overhead"} if is_on_cuda else {}),
        "autotune": functools.partial(_compiled_nhwc, model, wide, {"mode": "max-autotune"}),
        "tensorrt": functools.partial(_tensorrt, model, x),
        "onnxruntime": functools.partial(_onnxruntime, model, x),
        "openvino": functools.partial(_openvino, model, x),
    }
    wanted = [name for name in made_of if name in baselines or (name == "fused" and with_fused)]
    builders: dict[str, Builder] = {BASE: lambda: _plain(model, x)}
    for dtype in dtypes:
        short = short_name(dtype)
        for name in wanted:
            shown = "eager NHWC" if name == "eager" else name
            builders[f"{shown} {short}"] = functools.partial(made_of[name], dtype)
        for backend in frozen_backends:
            name = f"frozen {short}" if backend == "auto" else f"frozen {short} {backend}"
            builders[name] = functools.partial(_frozen, model, wide, backend, dtype)
    return builders


def build_variants(builders: dict[str, Builder], progress: Progress = silent) -> tuple[Variants, dict[str, str]]:
    """(callables, why the others are missing). One foreign compiler's failure does not cost the other variants."""
    found: Variants = {}
    skipped: dict[str, str] = {}
    torch._dynamo.reset()  # so that each shape is compiled as a static one
    for index, (name, build) in enumerate(builders.items()):
        progress(index / len(builders), f"preparing {name}")
        try:
            found[name] = build()
        except Exception as error:  # whatever a compiler that is not ours raises
            skipped[name] = missing_reason(error)
    return found, skipped


def short_name(dtype: torch.dtype) -> str:
    return {value: name for name, value in SHORT_DTYPES.items()}[dtype]


def missing_reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _plain(model: Callable[..., Any], x: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return model(x)

    return run


def _nhwc(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _eager_nhwc(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    return _plain(_nhwc(model, dtype), x.to(dtype))


def _fused(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    return _plain(convert.fuse(_nhwc(model, dtype)), x.to(dtype))


def _frozen(model: nn.Module, x: Tensor, backend: str, dtype: torch.dtype) -> Callable[[], Any]:
    with winners.ignored() if backend == UNTUNED else contextlib.nullcontext():
        frozen = freeze(model, x, dtype=dtype, backend="auto" if backend == UNTUNED else backend)
    is_nvidia = x.is_cuda and torch.version.hip is None
    if is_nvidia and isinstance(frozen, FrozenModel) and not frozen.is_graphed(x):
        raise RuntimeError("it cannot be captured as a CUDA graph")  # as `freeze` has just warned, with the reason
    return lambda: frozen(x)


# ------------------------------------------------------------------------------------------------------ torch.compile


def _compiled_nhwc(model: nn.Module, x: Tensor, options: dict[str, Any], dtype: torch.dtype) -> Callable[[], Any]:
    return compiled(_nhwc(model, dtype), x.to(dtype), **options)


def compiled(model: nn.Module, x: Tensor, **options: Any) -> Callable[[], Any]:
    """torch.compile with Inductor's freezing, already compiled for x."""
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True), torch.no_grad():
        fast = torch.compile(model, **options)
        fast(x)
    return _plain(fast, x)


# ------------------------------------------------------------------------------------------------------------- NVIDIA


def _stitched_cudnn(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    if x.device.type != "cuda":
        raise RuntimeError("it needs an NVIDIA GPU")
    folded = FrozenModel(model, x, dtype, "eager").plan(x)
    stitch(folded, "cudnn")
    return captured(_plain(folded, x.to(dtype)))


def stitch(folded: torch.fx.GraphModule, backend: str) -> tuple[int, int]:
    """Give a plan made with backend="eager" this backend wherever it fits: (convolutions that changed, that did not).

    `freeze` refuses a backend that cannot run every convolution, and cuDNN's fused ones always end in a ReLU.
    """
    why_not = backends.known("conv_bn_act")[backend].why_not
    convs = {name: module for name, module in folded.named_modules() if isinstance(module, plan.FrozenConv)}
    fitting = {name: conv for name, conv in convs.items() if why_not(conv.problem) is None}
    for name, conv in fitting.items():
        chosen = backends.select(conv.problem, backend, in_plan=True)
        folded.set_submodule(name, plan.FrozenConv(conv.problem, chosen, conv.weight, conv.bias))
    return len(fitting), len(convs) - len(fitting)


def _tensorrt(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    """The network built by TensorRT in this dtype from ONNX, replayed as a CUDA graph."""
    import tensorrt

    if x.device.type != "cuda":
        raise RuntimeError("it needs an NVIDIA GPU")
    x = x.to(dtype).contiguous()
    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    # strongly typed: the layers run in the dtype that the ONNX file gives them
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(_onnx_of(copy.deepcopy(model).to(dtype), x)):
        raise RuntimeError(f"its ONNX parser says: {parser.get_error(0)}")
    engine_bytes = builder.build_serialized_network(network, builder.create_builder_config())
    if engine_bytes is None:
        raise RuntimeError("it could not build an engine")
    engine = tensorrt.Runtime(logger).deserialize_cuda_engine(engine_bytes)
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    if len(names) != 2:
        raise RuntimeError(f"compared on networks with one input and one output only, this one has {len(names)} in all")
    out = torch.empty(tuple(context.get_tensor_shape(names[1])), dtype=dtype, device=x.device)
    for name, tensor in zip(names, (x, out)):
        context.set_tensor_address(name, tensor.data_ptr())

    def run() -> Tensor:
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return out

    run.engine = engine  # type: ignore[attr-defined]  # a context does not keep its engine alive
    return captured(run)


# ----------------------------------------------------------------------------------------------------- other runtimes


def _onnx_of(model: nn.Module, x: Tensor) -> bytes:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), str(path), dynamo=False)
        return path.read_bytes()


def _onnxruntime(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    import onnxruntime

    _only_on_cpu("onnxruntime", x, dtype, torch.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_onnx_of(model, x), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def _openvino(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    import openvino

    _only_on_cpu("openvino", x, dtype, torch.float32, torch.bfloat16)
    hint = "f32" if dtype == torch.float32 else "bf16"
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    converted = openvino.convert_model(model, example_input=x, input=[tuple(x.shape)])
    network, array = openvino.Core().compile_model(converted, "CPU", settings), x.numpy()
    return lambda: torch.from_numpy(network(array)[0])


def _only_on_cpu(name: str, x: Tensor, dtype: torch.dtype, *dtypes: torch.dtype) -> None:
    if x.device.type != "cpu" or dtype not in dtypes:
        raise RuntimeError(f"{name} is compared on the CPU in {' and '.join(map(dtype_name, dtypes))} only")
