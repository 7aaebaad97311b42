"""Questions to the nodes of a graph, and the small edits that fuse and freeze both make."""

from __future__ import annotations

from typing import Optional

from torch import fx, nn

from fused_resnet.nn.stock import returns_its_input


def is_made_in_forward(node: fx.Node) -> bool:
    """Whether this is a tensor that the forward makes, as torch.arange does, and that is in no module."""
    return node.op == "get_attr" and str(node.target).startswith("_tensor_constant")


def skip_identities(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[str]:
    """Drop the modules that return their input. Their names."""
    skipped = []
    for node in list(graph.nodes):
        if len(node.args) == 1 and returns_its_input(module_of(node, modules)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            skipped.append(str(node.target))
    return skipped


def module_of(node: Optional[fx.Node], modules: dict[str, nn.Module]) -> Optional[nn.Module]:
    return modules[str(node.target)] if node is not None and node.op == "call_module" else None


def only_user(node: fx.Node) -> Optional[fx.Node]:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def free_name(module: nn.Module, name: str) -> str:
    """This name, or the next that a module has no attribute of."""
    while hasattr(module, name):
        name += "_"
    return name


def add_child(module: nn.Module, modules: dict, name: str, child: nn.Module) -> str:
    """Give a module a child of this name, or of the next free one. Returns the name."""
    name = free_name(module, name)
    modules[name] = child
    module.add_module(name, child)
    return name
