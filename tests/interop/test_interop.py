"""Fused and frozen models under what else torch does with models: export, ONNX, DDP, FSDP, averages, compilers."""

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.ao.quantization.fx.tracer import QuantizationTracer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fused_resnet
from fused_resnet.fusing import adapters, convert
from fused_resnet.nn import BasicBlock, Bottleneck, ConvBNAct
from tests.support import networks

ROOT = Path(__file__).parents[2]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # fp32, ten layers, two orders of summation


def pair(block=Bottleneck):
    """A plain model, the same one fused, and an input."""
    plain = networks.small(block)
    fused = fused_resnet.fuse(copy.deepcopy(plain))
    assert len(convert.fused_convs(fused)) >= 11  # else the tests would compare a model with itself
    return plain, fused, torch.randn(2, 3, 20, 20)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def fused_calls(graph):
    return [node.target._opname for node in graph.nodes if getattr(node.target, "namespace", "") == "fused_resnet"]


# ------------------------------------------------------------------------------------------------ copies of a model


def test_copies_pickles_and_averages_stay_fused():
    plain, fused, x = pair()
    saved = io.BytesIO()
    torch.save(fused, saved)
    saved.seek(0)
    ema = AveragedModel(fused, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ema.update_parameters(fused)
    copies = {
        "deepcopy": copy.deepcopy(fused),
        "pickle": pickle.loads(pickle.dumps(fused)),
        "torch.save": torch.load(saved, weights_only=False),
        "EMA": ema.module,
    }
    for name, model in copies.items():
        assert convert.fused_convs(model) == convert.fused_convs(fused), name
        assert_same(model(x), plain(x))
        assert type(fused_resnet.unfuse(model)) is type(plain), name
    assert convert.fused_convs(fused)  # and the copies are copies


def test_state_dict_goes_both_ways():
    plain, fused, x = pair()
    other = networks.small(Bottleneck)
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(other.state_dict())
    assert_same(fused(x), other(x))
    plain.load_state_dict(fused.state_dict())
    assert_same(plain(x), other(x))


def test_an_average_follows_the_model_through_training():
    plain, fused, x = pair(BasicBlock)
    averages = []
    for model in (plain, fused):
        model.train()
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            ema.update_parameters(model)
        averages.append(ema.eval()(x))
        assert not torch.equal(averages[-1], model.eval()(x))
    assert_same(averages[1], averages[0])


# ------------------------------------------------------------------------------------------------- calls and gradients


def test_functional_call_reads_the_given_parameters():
    plain, fused, x = pair()
    other = {name: value * 1.1 for name, value in plain.state_dict().items() if value.is_floating_point()}
    expected = torch.func.functional_call(plain, other, (x,))
    assert_same(torch.func.functional_call(fused, other, (x,)), expected)
    assert not torch.allclose(expected, plain(x), **TOLERANCE)


@pytest.mark.parametrize("mode", ("eval", "train"))
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_gradient_checkpointing(mode, use_reentrant):
    plain, fused, x = pair(BasicBlock)
    gradients = []
    for model in (plain, fused):
        model.train(mode == "train")
        own = x.clone().requires_grad_()
        out = model.relu(model.bn1(model.conv1(own)))
        for stage in (model.layer1, model.layer2, model.layer3):
            out = checkpoint(stage, out, use_reentrant=use_reentrant)
        out.square().mean().backward()
        gradients.append([own.grad, *(p.grad for name, p in model.named_parameters() if "fc" not in name)])
    for actual, expected in zip(*reversed(gradients)):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_pruning_and_parametrizing_a_child_is_seen():
    """The block runs that child, so masks and norms count; removing the mask fuses it again."""
    plain, fused, x = pair()
    for model in (plain, fused):
        prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.5)
        parametrizations.weight_norm(model.layer2[0].conv2)
        with torch.no_grad():
            model.layer2[0].conv2.parametrizations.weight.original0 *= 1.5
    assert_same(fused(x), plain(x))
    for model in (plain, fused):
        prune.remove(model.layer1[0].conv1, "weight")
    assert_same(fused(x), plain(x))


# ------------------------------------------------------------------------------------------- symbolic traces


class Adapts(nn.Module):
    """A block that has an adapter, called with one tensor or several."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        x = x if isinstance(x, (torch.fx.Proxy, torch.Tensor)) else torch.cat(x, 1)
        return self.relu(self.bn(self.conv(x)))


@adapters.register(f"{__name__}.Adapts", reads=" ".join(Adapts.forward.__code__.co_names), convs="conv")
def _adapts(block, x):
    x = x if isinstance(x, torch.Tensor) else torch.cat(x, 1)
    return fused_resnet.nn.conv_bn_act(x, block.conv, block.bn, block.relu, backend=block.backend)


class Gives(nn.Module):
    """Calls a module with several tensors."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module([x[:, :1], x[:, 1:]])


class ByHand(nn.Module):
    """A forward that was written for us."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        return fused_resnet.nn.conv_bn_act(x, self.conv, self.bn, self.relu)


TRACED = {
    "our blocks": lambda: networks.small(BasicBlock), "our bottlenecks": lambda: networks.small(Bottleneck),
    "sequences": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
    "a root of our own": lambda: networks.single(Bottleneck), "adapted": Adapts, "adapted, of a list": lambda: Gives(
        Adapts()), "ConvBNAct": lambda: nn.Sequential(ConvBNAct(3, 8), ConvBNAct(8, 8, norm_layer=None)),
}  # fmt: skip


class Deep(torch.fx.Tracer):
    """Follows torch's own modules too, but for norms, which ask for the number of dimensions."""

    def is_leaf_module(self, module, qualified_name):
        return isinstance(module, nn.BatchNorm2d)


class Shallow(torch.fx.Tracer):
    """One node for what is written in these files."""

    def is_leaf_module(self, module, qualified_name):
        return type(module).__module__ in (__name__, "networks") or super().is_leaf_module(module, qualified_name)


def nodes_of(graph):
    return [(node.name, node.op, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


@pytest.mark.parametrize("tracer", (torch.fx.Tracer, Shallow, QuantizationTracer, Deep))
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("make", TRACED.values(), ids=TRACED)
def test_a_symbolic_trace_is_that_of_the_plain_model(make, training, tracer):
    plain = networks.randomize(make()).train(training)
    fused = fused_resnet.fuse(copy.deepcopy(plain))
    assert convert.fused_convs(fused)
    tracers = [tracer([], []) if tracer is QuantizationTracer else tracer() for _ in range(2)]
    ours, theirs = (nodes_of(one.trace(model)) for one, model in zip(tracers, (fused, plain)))
    assert ours == theirs


def test_a_symbolic_trace_of_a_forward_by_hand_holds_calls():
    graph = torch.fx.symbolic_trace(ByHand().eval()).graph
    assert [node.op for node in graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]


def test_a_torchvision_like_block_is_traced_by_its_own_forward(tmp_path, monkeypatch):
    plain = networks.single(networks.torchvision_like(tmp_path, monkeypatch).BasicBlock)
    fused = fused_resnet.fuse(copy.deepcopy(plain))
    assert nodes_of(torch.fx.symbolic_trace(fused).graph) == nodes_of(torch.fx.symbolic_trace(plain).graph)


# ------------------------------------------------------------------------------------------- quantization


class Quantizable(nn.Module):
    """What torch.ao.quantization.fuse_modules has something to do with."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.rest = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.conv3, self.relu3 = nn.Conv2d(8, 8, 1), nn.ReLU()

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(self.quant(x))))
        x = self.rest(self.bn2(self.conv2(x)))
        return self.dequant(self.relu3(self.conv3(x)))


GROUPS = [["conv1", "bn1", "relu1"], ["conv2", "bn2"], ["rest.0", "rest.1", "rest.2"], ["conv3", "relu3"]]


def quantized(steps, training):
    """The result of a model that goes through these steps, and its convolutions' classes."""
    torch.manual_seed(0)
    model, x = networks.randomize(Quantizable()).train(training), torch.randn(4, 3, 12, 12)
    for step in steps:
        if step == "fuse":
            fused_resnet.fuse(model)
        elif step == "fuse_modules":
            (quantization.fuse_modules_qat if training else quantization.fuse_modules)(model, GROUPS, inplace=True)
        elif step == "prepare":
            default = quantization.get_default_qat_qconfig if training else quantization.get_default_qconfig
            model.qconfig = default(torch.backends.quantized.engine)
            model = (quantization.prepare_qat if training else quantization.prepare)(model)
        elif step == "calibrate":
            model(x)
        else:
            model = quantization.convert(model.eval())
    return model(x), {name: type(module) for name, module in model.named_modules() if "Conv" in type(module).__name__}


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("at", range(5))
def test_eager_mode_quantization(at, training):
    """Wherever in the flow the model is fused."""
    flow = ["fuse_modules", "prepare", "calibrate", "convert"]
    expected, classes = quantized(flow, training)
    actual, ours = quantized([*flow[:at], "fuse", *flow[at:]], training)
    assert ours == classes and any("quantized" in kind.__module__ for kind in classes.values())
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("make", (lambda: networks.Network(BasicBlock), lambda: nn.Sequential(ConvBNAct(3, 8))))
def test_fx_graph_mode_quantization(make, at, training):
    def result(*steps):
        torch.manual_seed(0)
        model, x = networks.randomize(make()).train(training), torch.randn(4, 3, 12, 12)
        for step in steps:
            if step == "fuse":
                fused_resnet.fuse(model)
            elif step == "prepare":
                prepare = quantize_fx.prepare_qat_fx if training else quantize_fx.prepare_fx
                model = prepare(model, quantization.get_default_qconfig_mapping(), (x,))
            elif step == "calibrate":
                model(x)
            else:
                model = quantize_fx.convert_fx(model.eval())
        return model(x)

    flow = ["prepare", "calibrate", "convert"]
    assert torch.equal(result(*flow[:at], "fuse", *flow[at:]), result(*flow))


def test_the_modules_of_torch_ao_are_left_alone_with_a_reason():
    model = quantization.fuse_modules(networks.randomize(Quantizable()), GROUPS)
    kinds = [type(module) for module in model.modules()]
    fused_resnet.fuse(model)
    assert [type(module) for module in model.modules()] == kinds
    reasons = {name: reason for name, reason in convert.left_alone(model) if name != "the model"}
    assert list(reasons) == ["conv1", "rest.0", "conv3"]
    assert set(reasons.values()) == {"quantization knows a ConvReLU2d of torch.ao by its class"}


# ------------------------------------------------------------------------------------------- other forms of a model


def test_export_round_trip_with_a_dynamic_batch():
    plain, fused, x = pair()
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    assert fused_calls(program.graph).count("conv_bn_act") == len(convert.fused_convs(fused))
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    larger = torch.randn(5, 3, 20, 20)
    assert_same(torch.export.load(saved).module()(larger), plain(larger))


_RELOAD = """
import sys, torch, fused_resnet
kind, file, tensors = sys.argv[1:]
x, expected = torch.load(tensors)
if kind == "aoti":
    model = torch._inductor.aoti_load_package(file)
else:
    model = torch.jit.load(file) if kind == "jit" else torch.export.load(file).module()
torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
print("agrees")
"""


def reload_elsewhere(kind, file, x, expected):
    """Load a file in a fresh process and run it there."""
    tensors = file.with_suffix(".tensors")
    torch.save((x, expected.detach()), tensors)
    command = (sys.executable, "-c", _RELOAD, kind, str(file), str(tensors))
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "agrees", result.stdout + result.stderr


@pytest.mark.full
def test_export_reloads_in_a_fresh_process(tmp_path):
    plain, fused, x = pair(BasicBlock)
    torch.export.save(torch.export.export(fused, (x,)), tmp_path / "model.pt2")
    reload_elsewhere("export", tmp_path / "model.pt2", x, plain(x))


@pytest.mark.full
def test_aotinductor_package_reloads_in_a_fresh_process(tmp_path):
    plain, fused, x = pair()
    with torch.no_grad():
        program = torch.export.export(fused, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    reload_elsewhere("aoti", Path(package), x, plain(x))


@pytest.mark.full
def test_jit_trace_reloads_in_a_fresh_process(tmp_path):
    plain, fused, x = pair(BasicBlock)
    traced = torch.jit.trace(fused, x)
    assert "fused_resnet::conv_bn_act" in str(traced.inlined_graph)
    traced.save(str(tmp_path / "model.pt"))
    reload_elsewhere("jit", tmp_path / "model.pt", x, plain(x))


def test_jit_script_says_what_to_do():
    plain, fused, x = pair(BasicBlock)
    for model in (fused, fused.layer1[0], fused_resnet.freeze(plain, x)):
        with pytest.raises(RuntimeError, match="cannot compile .*: unfuse or unfreeze the model first"):
            torch.jit.script(model)
    assert_same(torch.jit.script(fused_resnet.unfuse(fused))(x), plain(x))


@pytest.mark.full
@pytest.mark.parametrize("form", ("unfused", "fused"))
@pytest.mark.parametrize("dynamo", (True, False))
def test_onnx_export(form, dynamo, tmp_path):
    """A fused model is exported as ATen's operators, so ONNX Runtime needs nothing of ours."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    plain, fused, x = pair()
    model = fused_resnet.unfuse(copy.deepcopy(fused)) if form == "unfused" else fused
    torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_same(torch.from_numpy(out), plain(x).detach())


def test_a_frozen_model_says_that_it_is_not_for_export():
    plain, _, x = pair(BasicBlock)
    frozen = fused_resnet.freeze(plain, x)
    for export in (torch.export.export, torch.jit.trace):
        with pytest.raises(RuntimeError, match=r"cannot be exported: .* Export frozen.unfreeze\(\)"):
            export(frozen, (x,))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"export frozen.unfreeze\(\)"):
        torch.export.export(frozen, (x,), strict=True)


@pytest.mark.full
def test_onnx_export_of_a_frozen_model_says_what_to_export():
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    plain, _, x = pair(BasicBlock)
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"Export frozen.unfreeze\(\)"):
        torch.onnx.export(fused_resnet.freeze(plain, x), (x,), dynamo=True, verbose=False)


class Around(nn.Module):
    """Something to compile before a model and something after it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(torch.relu(x)).softmax(1)


def test_compiled_around_a_frozen_model():
    """The plan runs as it is; what surrounds it is compiled, and nothing is compiled twice."""
    plain, _, x = pair(BasicBlock)
    frozen = fused_resnet.freeze(plain, x)
    around = Around(frozen)
    graphs = []

    def backend(graph, example):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    compiled = torch.compile(around, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            assert_same(compiled(x), around(x))
    assert len(graphs) == 2 and "relu" in graphs[0][0] and graphs[1] == ["softmax"]


@pytest.mark.full
def test_compiled_frozen_model():
    plain, _, x = pair(BasicBlock)
    frozen = fused_resnet.freeze(plain, x)
    assert_same(torch.compile(frozen)(x), frozen(x))


# --------------------------------------------------------------------------------------------------- several processes


def _train_step(model, x):
    model.train()
    model(x).square().mean().backward()


def _gradients(model):
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def _distributed(rank, size, kind, folder):
    """One of two processes: a fused model under DDP or FSDP2, trained and evaluated on its half of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = fused_resnet.fuse(networks.small(BasicBlock))
    x = torch.randn(4, 3, 20, 20).chunk(size)[rank]
    if kind == "DDP":
        model = nn.parallel.DistributedDataParallel(model)
        _train_step(model, x)
        gradients = _gradients(model)
    else:
        mesh = init_device_mesh("cpu", (size,))
        for stage in (model.layer1, model.layer2, model.layer3):
            fully_shard(stage, mesh=mesh)
        fully_shard(model, mesh=mesh)
        _train_step(model, x)
        gradients = {name: grad.full_tensor() for name, grad in _gradients(model).items()}
    with torch.no_grad():
        out = model.eval()(x)
    if rank == 0:
        torch.save((gradients, out), f"{folder}/results")
    torch.distributed.destroy_process_group()


@pytest.mark.full
@pytest.mark.parametrize("kind", ("DDP", "FSDP"))
def test_two_processes_average_the_gradients(kind, tmp_path):
    """Against the plain model in one process: the mean of both halves' gradients (BN sees each half alone)."""
    processes = [
        multiprocessing.get_context("spawn").Process(target=_distributed, args=(rank, 2, kind, str(tmp_path)))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    gradients, out = torch.load(tmp_path / "results")

    torch.manual_seed(0)
    plain = networks.small(BasicBlock)
    halves, outputs = [], []
    for half in torch.randn(4, 3, 20, 20).chunk(2):
        model = copy.deepcopy(plain)
        _train_step(model, half)
        halves.append(_gradients(model))
        outputs.append(model.eval()(half))
    assert_same(out, outputs[0])
    assert list(gradients) == list(halves[0])
    for name, actual in gradients.items():
        expected = (halves[0][name] + halves[1][name]) / 2
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item(), msg=name)


# ----------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and a CUDA build of torch")
def test_cuda_graph_capture_of_a_fused_model():
    plain, fused, x = (value.cuda() for value in pair())
    static, stream = x.clone(), torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            fused(static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = fused(static)
    other = torch.randn_like(x)
    static.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, plain(other), rtol=1e-3, atol=1e-3)
