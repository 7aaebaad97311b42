"""What a conversion may not disturb in a model, before it and after."""

import torch


def snapshot(model):
    """Everything about a model that a conversion might disturb."""
    state = {
        key: (tensor, tensor.data_ptr(), tensor.detach().clone())
        for key, tensor in model.state_dict(keep_vars=True).items()
    }
    modules = {
        name: (id(module), type(module), module.training, set(module.__dict__), list(module._modules))
        for name, module in model.named_modules()
    }
    return state, modules


def unchanged(model, before):
    (state, modules), (old_state, old_modules) = snapshot(model), before
    assert list(state) == list(old_state)
    for key, (tensor, pointer, value) in state.items():
        old_tensor, old_pointer, old_value = old_state[key]
        assert tensor is old_tensor and pointer == old_pointer and torch.equal(value, old_value), key
    assert modules == old_modules
