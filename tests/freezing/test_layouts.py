"""Frozen plans whose tensors lie in row space: the right ones, with the right answers.

In Triton's interpreter, or on a GPU.
"""

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import backends, choosing
from fused_resnet.backends import record
from fused_resnet.choosing import planned
from fused_resnet.freezing import layouts
from fused_resnet.freezing.modules import FrozenConv
from fused_resnet.kernels.triton import runtime
from fused_resnet.kernels.triton.conv.configs import TritonConfig, configs, why_illegal
from fused_resnet.nn import BasicBlock, Bottleneck
from fused_resnet.operators.problem import ConvProblem
from tests.support import networks
from tests.support.tuned_files import entry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_MISSING = runtime.why_not(DEVICE, torch.float32)
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=f"Triton kernels: {_MISSING}")


def tma(problem: ConvProblem):
    """A small tile of the first TMA form that can compute the problem, rows_tma first; None where there is none."""
    tiles = (TritonConfig(128, 32, 16, 2, 4, 2, form) for form in ("rows_tma", "gemm_tma", "lines_tma"))
    return next((tile for tile in tiles if why_illegal(problem, tile, 90) is None), None)


@pytest.fixture
def freeze(monkeypatch):
    """fused_resnet.freeze on Triton with a config of the test's choice for every convolution."""
    select = choosing.select

    def frozen(model, x, config=tma):
        def forced(problem, backend, **options):
            chosen = select(problem, backend, **options)
            return chosen if options.get("in_nhwc") else chosen._replace(config=config(problem))

        monkeypatch.setattr(choosing, "select", forced)
        return fused_resnet.freeze(model.to(DEVICE), x.to(DEVICE), backend="triton")

    return frozen


def placed(frozen, x) -> dict[str, tuple[str, bool]]:
    """(form, whether the output lies in row space) of each convolution by name, in order."""
    modules = dict(frozen.plan(x.to(DEVICE)).named_children())
    convs = {name: conv.placed for name, conv in modules.items() if isinstance(conv, FrozenConv)}
    return {
        name.removeprefix("fused_").removeprefix("model_"): (conv.config.form if conv.config else "default", is_written)
        for name, conv in convs.items()
        for is_written in [conv.writes_row_space]
    }


def check(frozen, model, x) -> None:
    """Within four times the error that the plain model makes against fp64: a mistake is a thousand times worse. On a
    GPU both multiply in TF32, which cuDNN may round to and Triton truncates to."""
    x, (factor, limit) = x.to(DEVICE), (4, 1e-3) if DEVICE == "cpu" else (8, 1e-2)
    exact = networks.in_fp64(model, x)
    with torch.no_grad():
        plain = max(networks.error(model(x), exact), networks.LUCK)
        for _ in range(2):  # a second call meets memory that the first one has written
            assert networks.error(frozen(x), exact) <= factor * plain < limit


def basic_blocks() -> nn.Module:
    return nn.Sequential(
        networks.single(stride=1, channels=16), networks.single(stride=1, channels=16), networks.single(channels=32)
    ).eval()


@pytest.mark.parametrize("size", [(8, 6), (7, 9)], ids=str)
def test_basic_blocks_stay_in_row_space(freeze, size):
    model, x = basic_blocks(), torch.randn(2, 16, *size)
    frozen = freeze(model, x)
    is_even = size == (8, 6)
    strided = ("lines_tma", "gemm_tma") if is_even else ("default", "default")
    assert placed(frozen, x) == {
        "0_conv1": ("default", True),  # reads the caller's tensor, which has no halo
        "0_conv2": ("rows_tma", True),  # the next block's input and its residual
        "1_conv1": ("rows_tma", True),
        "1_conv2": ("rows_tma", False),  # read with stride 2
        "2_conv1": (strided[0], True),
        "2_conv2": ("rows_tma", False),  # the caller's
        "2_downsample_0": (strided[1], False),
    }
    check(frozen, model, x)


@pytest.mark.parametrize("size", [(6, 8), (5, 7)], ids=str)
def test_bottlenecks_keep_the_middle_in_row_space(freeze, size):
    model = nn.Sequential(networks.single(Bottleneck, 1, 16), nn.ReLU()).eval()
    x = torch.randn(3, 16, *size)
    frozen = freeze(model, x)
    assert placed(frozen, x) == {
        "0_conv1": ("gemm_tma", True),
        "0_conv2": ("rows_tma", False),
        "0_conv3": ("gemm_tma", False),
        "0_downsample_0": ("gemm_tma", False),
    }
    check(frozen, model, x)


class Middle(nn.Module):
    """Two convolutions, the first of whose outputs goes elsewhere too."""

    def __init__(self, elsewhere) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.elsewhere = elsewhere

    def forward(self, x):
        y = self.conv1(x)
        return self.conv2(y) + self.elsewhere(y).mean()


@pytest.mark.parametrize(
    "elsewhere, is_in_row_space",
    [
        (nn.AvgPool2d(2), False),
        (nn.Conv2d(16, 16, 3, padding=2, dilation=2), False),
        (nn.Conv2d(16, 16, 3, stride=2, padding=1), False),
        (nn.Conv2d(16, 16, 3, padding=1), True),
        (nn.Conv2d(16, 16, 1), True),
    ],
    ids=["a pooling", "dilated", "with stride 2", "another 3x3", "a 1x1"],
)
def test_only_what_every_reader_understands_is_in_row_space(freeze, elsewhere, is_in_row_space):
    model, x = Middle(elsewhere).eval(), torch.randn(1, 16, 6, 6)
    frozen = freeze(model, x)
    assert placed(frozen, x)["conv1"] == ("gemm_tma", is_in_row_space)
    assert placed(frozen, x)["conv2"] == ("rows_tma" if is_in_row_space else "default", False)
    check(frozen, model, x)


def test_a_1x1_reads_row_space_whatever_its_form(freeze):
    """A 3x3 wants the tensor in row space, so the 1x1 beside it reads it there, with pointers and with TMA."""
    for form in ("pointer", "gemm_tma"):
        model, x = Middle(nn.Conv2d(16, 16, 1)).eval(), torch.randn(2, 16, 5, 6)
        pointwise = TritonConfig(16, 16, 16, 2, 4, 2, form)
        frozen = freeze(model, x, lambda problem, tile=pointwise: tile if problem.R == 1 else tma(problem))
        assert placed(frozen, x)["conv1"] == placed(frozen, x)["elsewhere"][:1] + (True,) == (form, True)
        check(frozen, model, x)


def test_nothing_moves_without_a_config_that_wants_it(freeze):
    model, x = networks.single(stride=1, channels=16), torch.randn(1, 16, 6, 6)
    frozen = freeze(model, x, lambda problem: None)
    assert set(placed(frozen, x).values()) == {("default", False)}
    check(frozen, model, x)


def test_the_plan_says_where_tensors_lie(freeze):
    model, x = networks.single(stride=1, channels=16), torch.randn(1, 16, 6, 6)
    lines = [line for line in str(freeze(model, x).plan(x.to(DEVICE))).splitlines() if "fused_" in line]
    assert [line.endswith("into row space)") or "into row space" in line for line in lines[:2]] == [True, False]


def _graph_of(model, example):
    """The nodes of a traced model's convolutions, each as `assign` wants them."""
    frozen = fused_resnet.freeze(model, example, backend="eager")
    module = frozen.plan(example)
    modules = dict(module.named_modules())
    return {
        node: planned.Placed(modules[node.target].problem._replace(device="cuda", dtype=torch.float16, N=64), None)
        for node in module.graph.nodes
        if isinstance(modules.get(node.target) if node.op == "call_module" else None, FrozenConv)
    }


def test_under_a_cuda_graph_every_convolution_takes_the_likeliest_config(monkeypatch):
    """Decided from shapes alone, so also without a GPU: what a plan of ResNet-18's middle would take on an H100."""
    monkeypatch.setattr(runtime, "num_sms", lambda device: 132)  # which are two in the interpreter
    model = nn.Sequential(*(BasicBlock(64, 64) for _ in range(2))).eval()
    convs = _graph_of(model, torch.randn(1, 64, 56, 56))
    result = layouts.assign(convs, torch.device("cpu"), is_replayed=True)
    assert result.keys() == convs.keys()
    for node, conv in result.items():
        assert conv.config in configs(conv.problem, 90)
        assert conv.config.num_warps == 4, "nobody has verified it here (pytorch issue 173068)"
        if conv.config.form == "rows_tma":
            assert result[node.args[0]].writes_row_space
    assert any(conv.config.form == "rows_tma" for conv in result.values())
    assert layouts.assign(convs, torch.device("cpu"), is_replayed=False) == convs


def test_a_rows_config_without_row_space_is_replaced_under_a_cuda_graph():
    rows = TritonConfig(128, 16, 16, 8, 4, 3, "rows_tma")
    convs = _graph_of(networks.single(BasicBlock, 1, 16), torch.randn(1, 16, 28, 28))
    convs = {node: conv._replace(config=rows) for node, conv in convs.items()}
    first, second = layouts.assign(convs, torch.device("cpu"), is_replayed=True).values()
    assert first.config.form != "rows_tma" and first.config in configs(first.problem, 90) and first.writes_row_space
    assert second.config == rows and not second.writes_row_space


LARGE = TritonConfig(128, 256, 64, 8, 8, 3, "gemm_tma")
ROWS = TritonConfig(128, 64, 64, 8, 4, 3, "rows_tma")


@pytest.mark.parametrize("measured", [{"conv1": LARGE}, {"elsewhere": LARGE}, {}], ids=["writer", "reader", "neither"])
def test_a_measured_config_that_would_spill_in_row_space_keeps_its_tensors_out(measured):
    """Many sums a thread leave no registers for a second numbering of the rows; only what nobody measured makes way."""
    model = Middle(nn.Conv2d(256, 256, 1))
    model.conv1, model.conv2 = nn.Conv2d(64, 256, 1), nn.Conv2d(256, 64, 3, padding=1)
    model.eval()
    graph = _graph_of(model, torch.randn(1, 64, 28, 28))
    nodes = {node.name.removeprefix("fused_").removeprefix("model_"): node for node in graph}

    def with_configs(**configs):
        return {node: graph[node]._replace(config=configs.get(name)) for name, node in nodes.items()}

    assert layouts.stranded(with_configs(conv2=ROWS, **measured)) == [nodes["conv2"]] * bool(measured)
    settled = measured or {"conv2": ROWS}
    assigned = layouts.assign(with_configs(**settled), torch.device("cpu"), is_replayed=True)
    assert {name: assigned[nodes[name]].config for name in settled} == settled
    assert assigned[nodes["conv1"]].writes_row_space == (not measured)


def _tune_3x3s(tuned_files, monkeypatch, in_nhwc):
    """A basic block and an input whose 3x3 convolutions were measured fastest in row space, with this second winner."""
    rows = TritonConfig(64, 16, 16, 8, 4, 2, "rows_tma")
    triton = backends.known("conv_bn_act")["triton"]
    legal = triton.configs._replace(legal=lambda p: [rows, rows._replace(form="pointer")])
    triton = triton._replace(configs=legal)
    monkeypatch.setitem(record.REGISTRY["conv_bn_act"], "triton", triton)
    model, x = networks.single(stride=1, channels=16).to(DEVICE), torch.randn(2, 16, 6, 6, device=DEVICE)
    convs = [m for m in fused_resnet.freeze(model, x).plan(x).modules() if isinstance(m, FrozenConv)]
    for conv in convs:
        best = entry("triton", triton=(rows._asdict(), 1.0), onednn=(None, 3.0))
        tuned_files.add(tuned_files.user, conv.problem, best._replace(in_nhwc=in_nhwc))
    return model, x


needs_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="the tuned files of these tests are for a CPU")
POINTER = TritonConfig(64, 16, 16, 8, 4, 2)


@needs_cpu
@pytest.mark.parametrize(
    "in_nhwc, expected",
    [
        (None, None),  # as older versions wrote it: the fixed order
        (entry("onednn"), [("onednn", None)] * 2),  # and what reads its output is stranded in turn
        (entry("triton", triton=(POINTER._asdict(), 2.0)), [("triton", "pointer"), ("triton", "rows_tma")]),
    ],
    ids=("not kept", "another backend", "another form"),
)
def test_what_was_measured_without_row_space_takes_over_where_x_cannot_lie_there(
    tuned_files, monkeypatch, in_nhwc, expected
):
    """The first convolution reads the caller's x. Nothing that nobody measured takes its place."""
    model, x = _tune_3x3s(tuned_files, monkeypatch, in_nhwc)
    frozen = fused_resnet.freeze(model, x)
    convs = [m for m in frozen.plan(x).modules() if isinstance(m, FrozenConv)]
    expected = expected or [(choosing.fixed_order(c.problem, in_plan=True).backend.name, None) for c in convs]
    assert [(c.backend.name, c.selection.config and c.selection.config.form) for c in convs] == expected
    check(frozen, model, x)
