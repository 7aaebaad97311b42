"""Frozen plans as CUDA graphs, on a machine without a GPU: what is called in which order, and on what.

`tests.support.cuda` stands for torch.cuda. tests/freezing/test_warm.py replays real graphs.
"""

import copy
import threading

import pytest
import torch

import fused_resnet
from fused_resnet.freezing import frozen as frozen_module
from fused_resnet.freezing import make, warm
from fused_resnet.freezing import plan as plan_module
from tests.support import networks
from tests.support.cuda import FakeCuda

X = (2, 3, 16, 16)
_RUN = warm.Plan.__call__


@pytest.fixture
def cuda(monkeypatch):
    """As if the CPU captured graphs, and had no regions. A replay computes again what was captured, where it was."""
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(warm, "_has_graphs", lambda device: True)
    monkeypatch.setattr(make, "PASSES", tuple(run for run in make.PASSES if run.__name__ != "form_regions"))
    for module in (frozen_module, plan_module):
        monkeypatch.setattr(module, "is_captured", lambda device: torch.cuda.is_current_stream_capturing())
    graphed_plan = warm.GraphedPlan

    def made(plan, *arguments):
        graphed = graphed_plan(plan, *arguments)
        cuda.graphs[-1].replays = lambda: graphed._output.copy_(_RUN(plan, graphed._input))
        return graphed

    monkeypatch.setattr(warm, "GraphedPlan", made)
    return cuda


def noting(monkeypatch, seen):
    """Have every run of a plan that is not replayed noted: whether cuDNN would take the fastest."""

    def noted(plan, x):
        seen.append(torch.backends.cudnn.benchmark)
        return _RUN(plan, x)

    monkeypatch.setattr(warm.Plan, "__call__", noted)


def test_a_graph_holds_the_fastest_algorithms(cuda, monkeypatch):
    """cuDNN keeps what a convolution's first run took, so that one counts, too."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    seen = []
    noting(monkeypatch, seen)
    frozen = fused_resnet.freeze(networks.small(), torch.randn(X))
    assert seen == [True] * 5 and not torch.backends.cudnn.benchmark  # a first run, three to warm up, the capture
    frozen(torch.randn(X))
    assert len(seen) == 5 and cuda.calls.count("replay") == 1


def test_a_plan_without_a_graph_runs_with_what_the_process_has(cuda, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: (_ for _ in ()).throw(RuntimeError("no graphs here")))
    model, x = networks.small(), torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    assert not frozen.is_graphed(x) and "no graphs here" in caplog.text and not torch.backends.cudnn.benchmark
    seen = []
    noting(monkeypatch, seen)
    assert frozen(x).shape == model(x).shape and seen == [False]


@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=str)
@pytest.mark.parametrize("strides", ("NCHW", "NHWC", "a slice"))
def test_the_input_is_converted_where_it_is_copied(cuda, dtype, strides):
    """By one copy: what the graph holds begins with the convolutions."""
    model, x = networks.small(), torch.randn(X)
    if strides == "NHWC":
        x = x.contiguous(memory_format=torch.channels_last)
    elif strides == "a slice":
        x = torch.randn(2, 3, 16, 32)[..., ::2]
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    (graphed,) = frozen._plans.values()
    held = graphed._input
    assert held.dtype == (dtype or torch.float32) and held.is_contiguous(memory_format=torch.channels_last)
    assert held.shape == x.shape and graphed.taken(held) is held
    other = torch.randn(X)
    assert torch.equal(frozen(other), _RUN(graphed, other)) and cuda.calls.count("replay") == 1
    assert torch.equal(held, graphed.taken(other)) and frozen(other).dtype == torch.float32


def test_inputs_that_are_no_images_are_held_as_they_come(cuda):
    x = torch.randn(4, 6)[:, ::2]
    frozen = fused_resnet.freeze(torch.nn.Linear(3, 2), x, dtype=torch.bfloat16)
    (graphed,) = frozen._plans.values()
    assert graphed._input.dtype == torch.bfloat16 and graphed.taken(graphed._input) is graphed._input


def test_a_capture_of_the_callers_takes_the_kernels_and_not_the_graph(cuda):
    model, x = networks.small(), torch.randn(X)
    frozen = fused_resnet.freeze(model, x)
    cuda.calls.clear()
    cuda.is_capturing, other = True, torch.randn(X)
    inside = frozen(other)
    assert not cuda.calls  # no event, no stream, no replay
    cuda.is_capturing = False
    assert torch.equal(inside, frozen(other)) and cuda.calls.count("replay") == 1


def test_no_plan_is_made_inside_a_capture_of_the_callers(cuda):
    model, x, new = networks.small(), torch.randn(X), torch.randn(1, 3, 8, 8)
    frozen = fused_resnet.freeze(model, x)
    cuda.calls.clear()
    cuda.is_capturing = True
    for call in (frozen, frozen.plan, frozen.is_graphed):
        with pytest.raises(
            RuntimeError, match=r"no plan yet for inputs of shape \(1, 3, 8, 8\).*call it once with that"
        ):
            call(new)
    assert not cuda.calls and len(frozen.plans()) == 1
    cuda.is_capturing = False
    assert frozen(new).shape == (1, 10)
    cuda.is_capturing = True
    assert torch.equal(frozen(new), _RUN(frozen._plans[1, 3, 8, 8], new))


def test_the_graphs_of_a_model_share_memory(cuda):
    """And the stream of their captures, without which torch would not give one what another has freed."""
    first, second = (fused_resnet.freeze(networks.small(), torch.randn(X)) for _ in range(2))
    rooms = []
    for frozen in (first, first, second, copy.deepcopy(second)):
        frozen(torch.randn(len(rooms) + 3, 3, 8, 8))
        rooms.append((cuda.options["pool"], cuda.options["stream"]))
    assert rooms[0] == rooms[1] and len(set(rooms)) == 3 and None not in rooms[0]


def test_replays_of_one_model_take_turns(cuda):
    """Whatever their shapes: on the host by a lock, on the GPU by an event."""
    x, other = torch.randn(X), torch.randn(1, 3, 8, 8)
    frozen = fused_resnet.freeze(networks.small(), x)
    expected = frozen(other)
    cuda.calls.clear()
    frozen(x), frozen(other)
    waits, replay, records = cuda.calls[:3]
    event = waits.removeprefix("current stream waits for ")
    assert event.startswith("event") and (replay, records) == ("replay", f"current stream records {event}")
    assert cuda.calls == [waits, replay, records] * 2

    replays, started, go_on, answers = cuda.graphs[0].replays, threading.Event(), threading.Event(), {}
    cuda.graphs[0].replays = lambda: (started.set(), go_on.wait(60), replays())
    threads = [threading.Thread(target=lambda x=x: answers.update({len(x): frozen(x)})) for x in (x, other)]
    threads[0].start()
    assert started.wait(60)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive() and not answers
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(answers[2]) == 2 and torch.equal(answers[1], expected)


def test_after_a_capture_that_failed_the_next_one_has_other_memory(cuda, monkeypatch):
    frozen = fused_resnet.freeze(networks.small(), torch.randn(X))
    first, make = cuda.options["pool"], torch.cuda.CUDAGraph
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: (_ for _ in ()).throw(RuntimeError("no graphs here")))
    assert not frozen.is_graphed(torch.randn(1, 3, 8, 8))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    assert frozen.is_graphed(torch.randn(3, 3, 8, 8)) and cuda.options["pool"] != first


def test_a_graph_is_dropped_when_it_has_run_to_its_end(cuda):
    frozen = fused_resnet.freeze(networks.small(), torch.randn(X))
    frozen(torch.randn(X))
    event = frozen._turns.finished.name
    cuda.graphs[0].replays = None  # which holds the plan
    frozen._plans.clear()
    assert cuda.calls[-1] == f"{event} is waited for"
