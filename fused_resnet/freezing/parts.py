"""Which parts of a model can be frozen where the whole cannot: the largest modules that are called with one tensor.

Detectors take lists of images, transformers' models look at their input's shape: torch.fx cannot trace them. What
does the arithmetic in them are plain networks.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_resnet.freezing.copies import copy_tensors, copy_with_parameters
from fused_resnet.freezing.dtypes import is_floating
from fused_resnet.freezing.trace import computed_weights
from fused_resnet.graphs.tracer import TRACING, Unfaithful, count_writes


class Uncalibrated(ValueError):
    """What was given to calibrate a model does not fit one of its parts: no smaller part would fare better."""


def freeze_parts(
    model: nn.Module, example: Any, freeze_part: Callable[[str, nn.Module, Tensor], nn.Module]
) -> tuple[dict[str, nn.Module], Any, bool]:
    """({name: frozen part}, the model's output for `example`, whether it writes into its input).

    Modules are tried from the model's children downwards: freeze_part(name, module, the tensor that it was called with)
    for each that:

    - has convolutions
    - was only ever called with one tensor
    - did not return that tensor to be written into

    Where it raises ValueError or Unfaithful, but not Uncalibrated, the module's children are tried. A copy of the model
    runs on the example, once. Raises ValueError when it does not.
    """
    example = copy_tensors(example)  # the caller's is not written
    inputs, output, writes_input = _inputs(copy_with_parameters(model), example)
    parts: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        if not any(isinstance(child, nn.Conv2d) for child in module.modules()):
            return
        if name in inputs:
            try:
                parts[name] = freeze_part(name, module, inputs[name])
                return
            except Uncalibrated:
                raise
            except (ValueError, Unfaithful):
                pass  # a smaller part may do; where none does, freeze says what the whole model lacks
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    for name, child in model.named_children():
        visit(name, child)
    return parts, output, writes_input


def calls_of(model: nn.Module, name: str, batch: Any) -> list[Tensor]:
    """What the model calls one of its modules with, for a batch. Raises ValueError when it does not run."""
    inputs: list[Tensor] = []

    def note(module: nn.Module, args: tuple) -> None:
        inputs.append(args[0].detach().clone())  # which may be written into later

    handle = model.get_submodule(name).register_forward_pre_hook(note)
    try:
        with torch.no_grad():
            model(batch)
    except Exception as error:
        raise ValueError(f"freeze: {type(model).__name__} does not run on a batch of calibrate: {error}") from error
    finally:
        handle.remove()
    return inputs


def _inputs(model: nn.Module, example: Any) -> tuple[dict[str, Tensor], Any, bool]:
    """({module: its input}, the output, whether the example was written to) of a run on the example.

    A module is there if it was only called with one floating-point tensor and nothing else. Two kinds are left out:

    - one that returned its input or a view of it, into which the model then wrote
    - one inside which anything was written: an attribute of a module, which the model may read, or a parameter
    """
    inputs: dict[str, Tensor] = {}
    others: set[str] = set()
    returned: list[tuple[str, Tensor, int]] = []
    thread = threading.get_ident()

    def note(name: str, args: tuple, kwargs: dict) -> None:
        if threading.get_ident() != thread:
            return
        if len(args) == 1 and not kwargs and is_floating(args[0]):
            inputs.setdefault(name, args[0].detach())
        else:
            others.add(name)

    def note_output(name: str, args: tuple, output: Any) -> None:
        if threading.get_ident() == thread and _memory_of(args) & _memory_of(output):
            returned.extend((name, leaf, count_writes(leaf)) for leaf in args if isinstance(leaf, Tensor))

    given = [(leaf, count_writes(leaf)) for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    handles: list[Any] = []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(lambda _, *call, name=name: note(name, *call), with_kwargs=True),
            module.register_forward_hook(lambda _, *call, name=name: note_output(name, *call)),
        ]
    try:
        with torch.no_grad(), _noting_writes(model) as written:
            output = model(example)
    except Exception as error:
        raise ValueError(f"freeze: {type(model).__name__} does not run on the example: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    others.update(name for name, tensor, writes in returned if count_writes(tensor) != writes)
    others.update(name for name, module in model.named_modules() if not written.isdisjoint(map(id, module.modules())))
    writes_input = any(count_writes(tensor) != writes for tensor, writes in given)
    return {name: value for name, value in inputs.items() if name not in others}, output, writes_input


@contextlib.contextmanager
def _noting_writes(model: nn.Module) -> Iterator[set[int]]:
    """The modules, by id, of which this thread writes an attribute, a parameter or a buffer meanwhile."""
    written: set[int] = set()
    thread = threading.get_ident()

    def noting(write: Callable) -> Callable:
        def noted(module: nn.Module, name: str, *args: Any) -> None:
            if threading.get_ident() == thread and name not in computed_weights(module):
                written.add(id(module))
            write(module, name, *args)

        return noted

    def writes(module: nn.Module) -> list[int]:
        return [count_writes(tensor) for tensor in (*module.parameters(False), *module.buffers(False))]

    before = [(module, writes(module)) for module in model.modules()]
    with TRACING:
        # read here: what another thread's trace has patched is not stock
        stock = {name: getattr(nn.Module, name) for name in ("__setattr__", "__delattr__")}
        try:
            for name, write in stock.items():
                setattr(nn.Module, name, noting(write))
            yield written
        finally:
            for name, write in stock.items():
                setattr(nn.Module, name, write)
    written.update(id(module) for module, count in before if writes(module) != count)


def _memory_of(values: Any) -> set[int]:
    """Where the memory of the tensors in these values begins."""
    tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
