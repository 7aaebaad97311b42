"""What the tests of fuse share: small modules, and what a conversion may not disturb."""

import torch
from torch import nn

from fused_resnet.nn import FusedBlock
from tests.support import networks


class Rewritable(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def fused_blocks(model):
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


def snapshot(model):
    """Everything about a model that a conversion might disturb."""
    state = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in model.state_dict(keep_vars=True).items()}
    modules = {
        name: (id(module), type(module), module.training, set(module.__dict__), list(module._modules))
        for name, module in model.named_modules()
    }
    return state, modules


def unchanged(model, before):
    (state, modules), (old_state, old_modules) = snapshot(model), before
    assert list(state) == list(old_state)
    for key, (pointer, value) in state.items():
        assert pointer == old_state[key][0] and torch.equal(value, old_state[key][1]), key
    assert modules == old_modules


def as_good_as_plain(model, plain, x):
    """Fused and plain round differently, so each is held against fp64. Sums in another order are up to 2.2 times worse
    or better (seen); a mistake is a thousand times worse."""
    exact = networks.in_fp64(plain, x)
    with torch.no_grad():
        allowed = networks.allowed(plain(x), exact)
        assert networks.error(model(x), exact) <= allowed < 1e-4
