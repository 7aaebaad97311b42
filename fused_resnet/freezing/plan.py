"""A plan: a lowered graph for one input shape, as a function, and on CUDA captured as a graph.

A plan's graph is an fx.GraphModule, so it prints as Python.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any, Callable, Optional

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fused_resnet.freezing.dtypes import Conversion
from fused_resnet.freezing.modules import LOWERED
from fused_resnet.freezing.region import FrozenRegion
from fused_resnet.graphs.nodes import function_of, module_of
from fused_resnet.machine.cuda_graphs import capture, is_captured
from fused_resnet.machine.locks import new_lock
from fused_resnet.regions.layout import DTYPES


class Plan:
    """A lowered graph; with a conversion, between the caller's dtypes and the plan's."""

    is_graphed = False

    def __init__(self, module: fx.GraphModule, conversion: Optional[Conversion]) -> None:
        self.module, self.conversion = module, conversion
        self._run, self._reads = _bound(module), _reads_as_given(module)
        module.graph.owning_module = None  # a circle, in which a dropped plan would wait for the garbage collector

    def taken(self, x: Tensor) -> Tensor:
        """x as the graph takes it."""
        if x.dtype in self._reads and x.layout is torch.strided:
            return x
        if self.conversion is not None:
            # not together with the layout: fp32 to bf16 and NHWC at once took 2.5 times as long
            x = x.to(self.conversion.input)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    def __call__(self, x: Tensor) -> Any:
        out = self._run(self.taken(x))
        if self.conversion is None:
            return out
        if isinstance(out, Tensor):
            return out.to(self.conversion.outputs[0])
        leaves, structure = pytree.tree_flatten(out)
        wanted = zip(leaves, self.conversion.outputs, strict=True)
        return pytree.tree_unflatten([v if dtype is None else v.to(dtype) for v, dtype in wanted], structure)


def _bound(module: fx.GraphModule) -> Callable[[Tensor], Any]:
    """The plan's graph as one function in which the frozen modules are plain calls.

    A module call costs little in a loop, but about 19 us between two convolutions that have emptied the caches: 1.0 of
    76.4 ms for ResNet-50 at batch 1 (EPYC Zen 4, one thread, 2026-11).
    """
    graph = copy.deepcopy(module.graph)
    modules = dict(module.named_modules())
    for node in graph.nodes:
        frozen = module_of(node, modules)
        if isinstance(frozen, LOWERED):
            node.op, node.target = "call_function", frozen.bound()
    return functools.partial(function_of(graph), module)


def _reads_as_given(module: fx.GraphModule) -> tuple[torch.dtype, ...]:
    """The dtypes of inputs that are neither converted nor laid out beforehand: regions do that as they read them."""
    modules, placeholder = dict(module.named_modules()), next(iter(module.graph.nodes))
    readers = [module_of(user, modules) for user in placeholder.users]
    return DTYPES if readers and all(type(reader) is FrozenRegion for reader in readers) else ()


class Turns:
    """What the CUDA graphs of one frozen model share, because they are replayed one after another: memory above all.

    Each would hold the activations of its shape; in one pool they hold little more than those of the largest. What one
    capture has freed the next one takes, so no two replays may overlap. `lock` keeps their launches apart, and the GPU
    waits for `finished` before the next one. Their order does not matter: no graph keeps anything between replays, and
    outputs are copied before the next turn.

    Without sharing, replays of two shapes could overlap. That gains little: they would share one GPU, which a large
    batch fills.
    """

    def __init__(self) -> None:
        self.lock = new_lock()

    @functools.cached_property
    def finished(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """All captures run on it: what is freed in a pool is given again only to the stream that had it."""
        return torch.cuda.Stream()

    @functools.cached_property
    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def leave_pool(self) -> None:
        """Have the next capture begin another one: torch may take this one for one that is still captured into."""
        self.__dict__.pop("pool", None)

    def end(self) -> None:
        """Wait until the GPU has run all replays."""
        if finished := self.__dict__.get("finished"):
            finished.synchronize()


class GraphedPlan(Plan):
    """The same, captured once as a CUDA graph. Replays share static buffers, so they take turns.

    Called inside a capture of the caller's, it is no replay: its kernels go into the caller's graph, with memory of
    that graph's own. An event of another stream would end that capture.
    """

    is_graphed = True

    def __init__(self, plan: Plan, example: Tensor, turns: Turns) -> None:
        self._turns = turns
        super().__init__(plan.module, plan.conversion)
        # a normal tensor can be written in and out of inference mode
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(example.device):
            # as the graph takes it, so that writing it converts at once, and the graph need not
            self._input = torch.empty_like(plan.taken(example)).copy_(example)
            try:
                self._graph, self._output = capture(lambda: plan(self._input), turns.stream, turns.pool)
            except RuntimeError:
                turns.leave_pool()
                raise

    def __call__(self, x: Tensor) -> Any:
        if is_captured(x.device):
            return super().__call__(x)
        turns = self._turns
        with turns.lock, torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(turns.finished)  # another stream may still be using the memory
            self._input.copy_(x)
            self._graph.replay()
            out = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, self._output)
            turns.finished.record(stream)
            return out

    def __del__(self) -> None:
        # the plan may be dropped while another stream still replays it
        self._turns.end()


def plainly(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Without gradients and outside autocast: a plan's dtypes are its own."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return _outside_autocast(device)
    return torch.no_grad()  # by itself: each call enters it, out of cold caches


@contextlib.contextmanager
def _outside_autocast(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
