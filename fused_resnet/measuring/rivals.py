"""Networks as others run them: torch.compile, cuDNN stitched in, TensorRT, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from torch import Tensor, nn

from fused_resnet import backends, choosing
from fused_resnet.choosing.timing import interleaved
from fused_resnet.freezing import modules
from fused_resnet.freezing.frozen import FrozenModel
from fused_resnet.machine.cuda_graphs import captured
from fused_resnet.operators.problem import dtype_name

_ROUNDS_OF_A_CHOICE = 7
_CALIBRATION_IMAGES = 16


def calibration_images(x: Tensor) -> list[Tensor]:
    """What everyone calibrates int8 with: random images of x's size, one a batch."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, *x.shape[1:], generator=generator) for _ in range(_CALIBRATION_IMAGES)]


def plain(model: Callable[..., Any], x: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return model(x)

    return run


def nhwc(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compiled_nhwc(model: nn.Module, x: Tensor, options: dict[str, Any], dtype: torch.dtype) -> Callable[[], Any]:
    return compiled(nhwc(model, dtype), x.to(dtype), **options)


def compiled(model: nn.Module, x: Tensor, **options: Any) -> Callable[[], Any]:
    """torch.compile with Inductor's freezing, already compiled for x."""
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True), torch.no_grad():
        fast = torch.compile(model, **options)
        fast(x)
    return plain(fast, x)


def stitched_cudnn(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    """A plan whose convolutions are cuDNN's where that fits, else ATen's; its poolings are every plan's."""
    if x.device.type != "cuda":
        raise RuntimeError("it needs an NVIDIA GPU")
    folded = FrozenModel(model, x, dtype, "eager").plan(x)
    stitch(folded, "cudnn")
    return captured(plain(folded, x.to(dtype)))


def stitch(folded: torch.fx.GraphModule, backend: str) -> tuple[int, int]:
    """Give a plan made with backend="eager" this backend wherever it fits: (convolutions that changed, that did not).

    `freeze` refuses a backend that cannot run every convolution, and cuDNN's fused ones always end in a ReLU.
    """
    why_not = backends.known("conv_bn_act")[backend].why_not
    convs = {name: module for name, module in folded.named_modules() if isinstance(module, modules.FrozenConv)}
    fitting = {name: conv for name, conv in convs.items() if why_not(conv.problem) is None}
    for name, conv in fitting.items():
        chosen = choosing.select(conv.problem, backend, in_plan=True)
        folded.set_submodule(name, modules.FrozenConv(conv.problem, chosen, conv.weight, conv.bias))
    return len(fitting), len(convs) - len(fitting)


def in_tensorrt(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
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


def _onnx_of(model: nn.Module, x: Tensor, any_batch: bool = False) -> bytes:
    axes = {"x": {0: "N"}, "y": {0: "N"}} if any_batch else None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), str(path), dynamo=False, input_names=["x"], output_names=["y"],
                          dynamic_axes=axes)  # fmt: skip
        return path.read_bytes()


def in_onnxruntime(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    import onnxruntime

    _only_on_cpu("onnxruntime", x, dtype, torch.float32, torch.int8)
    network = _onnx_of(model, x) if dtype == torch.float32 else _quantized_onnx_of(model, x)

    def made(**entries: str) -> Callable[[], Any]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        for name, value in entries.items():
            options.add_session_config_entry(f"session.{name.replace('__', '.')}", value)
        session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
        inputs = {session.get_inputs()[0].name: x.numpy()}
        return lambda: torch.from_numpy(session.run(None, inputs)[0])

    # its threads would spin on into the call of whoever is timed next
    spinning = made(force_spinning_stop="1")
    if torch.get_num_threads() == 1:
        return spinning
    # whether they should spin within a call, the machine decides: on one with other work it halves the speed
    both = {"spinning": spinning, "waiting": made(intra_op__allow_spinning="0")}
    stats = interleaved(both, rounds=_ROUNDS_OF_A_CHOICE)
    return both[min(stats, key=lambda name: stats[name].median_us)]


def _quantized_onnx_of(model: nn.Module, x: Tensor) -> bytes:
    """In u8 and s8, weights per channel, which is what its documentation advises where the CPU has VNNI."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.left = iter([{name: image.numpy()} for image in calibration_images(x)])

        def get_next(self) -> Any:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        plain_file, ready, quantized = (Path(folder) / f"{name}.onnx" for name in ("plain", "ready", "quantized"))
        plain_file.write_bytes(_onnx_of(model, x, any_batch=True))
        quant_pre_process(str(plain_file), str(ready), skip_symbolic_shape=True)
        kinds = quantization.QuantType
        quantization.quantize_static(
            str(ready), str(quantized), Images("x"), per_channel=True, activation_type=kinds.QUInt8,
            weight_type=kinds.QInt8,
        )  # fmt: skip
        return quantized.read_bytes()


def in_openvino(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    """In int8 as NNCF quantises by default. What that leaves in floating point, OpenVINO computes as it likes."""
    import openvino

    _only_on_cpu("openvino", x, dtype, torch.float32, torch.bfloat16, torch.int8)
    if dtype == torch.int8:
        return quantized_in_openvino(model, x, calibration_images(x))
    hint = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    return _by_openvino(openvino.convert_model(model, example_input=x, input=[tuple(x.shape)]), x, hint)


def quantized_in_openvino(
    model: nn.Module, x: Tensor, images: list[Tensor], rest: Optional[str] = None
) -> Callable[[], Any]:
    """As NNCF quantises by default, with these images, for what x holds at each call. rest: what OpenVINO computes in
    where that leaves floats, "f32" or "bf16"; default, as it likes."""
    import nncf
    import openvino

    converted = openvino.convert_model(model, example_input=x, input=[(-1, *x.shape[1:])])
    converted = nncf.quantize(converted, nncf.Dataset([image.numpy() for image in images]))
    converted.reshape(list(x.shape))
    return _by_openvino(converted, x, rest)


def _by_openvino(converted: Any, x: Tensor, hint: Optional[str]) -> Callable[[], Any]:
    import openvino

    # latency, one stream and pinned threads are what it takes by itself for one request at a time
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if hint is not None:
        settings["INFERENCE_PRECISION_HINT"] = hint
    network = openvino.Core().compile_model(converted, "CPU", settings)
    used = network.get_property("INFERENCE_PRECISION_HINT").to_string()
    if hint is not None and used != hint:
        raise RuntimeError(f"openvino computes in {used} on this CPU, not in {hint}")
    request, array = network.create_infer_request(), x.numpy()
    # the caller's memory in, its own out: no copies but those that it needs itself
    return lambda: torch.from_numpy(request.infer([array], share_inputs=True, share_outputs=True)[0])


def _only_on_cpu(name: str, x: Tensor, dtype: torch.dtype, *dtypes: torch.dtype) -> None:
    if x.device.type != "cpu" or dtype not in dtypes:
        raise RuntimeError(f"{name} is compared on the CPU in {' and '.join(map(dtype_name, dtypes))} only")
