"""What a step of training takes: time, and what autograd keeps of the forward for the backward."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, nn


class Saved(NamedTuple):
    """Bytes of the distinct storages that a forward saved for its backward, of parameters and of all else.

    What has the shape of a parameter counts as one, transposed or not: autocast makes copies of them.
    """

    parameters: int
    activations: int


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> Saved:
    """What `forward`, a call of the model with gradients, keeps until the backward. Counted where autograd saves it.

    A storage counts once and whole, however many nodes keep it, or views of it.
    """
    shapes = {tuple(sorted(parameter.shape)) for parameter in model.parameters()}
    found: dict[int, tuple[int, bool]] = {}  # by the storage's address
    alive = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes(), tuple(sorted(tensor.shape)) in shapes
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    by_kind = [sum(size for size, is_one in found.values() if is_one is wanted) for wanted in (True, False)]
    return Saved(*by_kind)
