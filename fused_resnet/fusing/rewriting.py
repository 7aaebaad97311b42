"""A module's own forward with its conv -> BN -> (+ residual) -> activation sequences in one call each.

`programs_of` traces one module's forward (`forward_graph`), its children as they are called. It replaces what
`matching` finds by calls that read the live children: `nn.conv_bn_act`, and `nn.bn_act` for norms in front of
convolutions. Why the rewritten forward may stand for the original:

- The graph is all that the forward does, or it is refused (`forward_graph`), as long as what the forward read is as it
  was. That is compared on each call. The original forward runs where an attribute has changed, or a child became
  another kind of module. It also runs where two names are no longer of the same one. There is a program for training
  mode and one for eval mode. A class whose forward was replaced since runs the new one.
- What a child does is not assumed. A child of a sequence that was hooked, replaced or parametrized is called
  (`nn.conv_bn_act`), and every other child is called anyway. A child that torch does not know may write the memory
  that it is given. No convolution is moved past such a write to its input.
- What a call passes decides too: the program is for one positional tensor; other calls run the original forward.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional

from torch import Tensor, fx, nn

from fused_resnet.fusing.forward_graph import graph_of
from fused_resnet.fusing.reads import CONTAINERS, Reads
from fused_resnet.fusing.watch import CannotRewrite
from fused_resnet.graphs.matching import (
    Match,
    NormMatch,
    activation_of,
    matches,
    norm_operands,
    norms_in_front,
    unfolded_norms,
)
from fused_resnet.graphs.memory import writes_in_place
from fused_resnet.graphs.nodes import function_of, module_of, skip_identities
from fused_resnet.nn import bn_act, conv_bn_act
from fused_resnet.nn.fused import Fused, plain_class_of
from fused_resnet.nn.norms import Norm
from fused_resnet.nn.stock import has_stock_call, returns_its_input


class Program(NamedTuple):
    """A rewritten forward, and what must hold for it to compute what the original does."""

    run: Callable[[nn.Module, Tensor], Any]
    convs: tuple[str, ...]
    originals: tuple  # the forwards of its class and of the classes that this is from
    reads: Reads
    skipped: tuple[str, ...]  # modules that return their input and are not called
    has_norm: bool
    left: tuple[tuple[str, str], ...]  # convolutions without the norm that follows them, and why

    def holds(self, module: Any, args: tuple) -> bool:
        return (
            len(args) == 1
            and isinstance(args[0], Tensor)
            and _forwards(module.plain_class) == self.originals
            and self.reads.hold(module)
            and all(returns_its_input(module.get_submodule(name)) for name in self.skipped)
        )


class Rewritten(Fused):
    """A module that runs the program of its mode where it holds, else its own forward."""

    def fused_forward(self, *args: Any, **kwargs: Any) -> Any:
        program = self._fused_resnet.programs.get(self.training)
        if program is None or kwargs or not program.holds(self, args):
            return NotImplemented
        return program.run(self, *args)

    def fused_convs(self) -> list[str]:
        program = self._fused_resnet.programs.get(False)
        return [] if program is None else list(program.convs)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.__dict__["_fused_resnet"] = self._fused_resnet._replace(programs=programs_of(self)[0])


class NormUnfolded(CannotRewrite):
    """No convolution of a module can be fused, and one of them is followed by a norm."""


def programs_of(module: nn.Module) -> tuple[dict[bool, Program], Optional[CannotRewrite]]:
    """(the module's programs by `training`, None), or ({}, why it has none). The module is left as it was."""
    programs: dict[bool, Program] = {}
    reason: Optional[CannotRewrite] = None
    for training in (True, False):
        try:
            programs[training] = _program_of(module, training)
        except CannotRewrite as error:
            reason = error
    return (programs, None) if False in programs else ({}, reason)


def _program_of(module: nn.Module, training: bool) -> Program:
    graph, reads = graph_of(module, training)
    modules = dict(module.named_modules())
    skipped = skip_identities(graph, modules)
    every = matches(graph, modules, is_write=_may_write)
    norms = norms_in_front(graph, modules, every)
    found = [match for match in every if match.bn or match.act]
    if training:  # so that the others keep no activated map for the backward
        activated = {norm.act or norm.bn for norm in norms} | {match.nodes[-1] for match in found if match.bn}
        found = [match for match in every if match in found or match.conv.args[0] in activated]
    left = tuple((str(conv.target), reason) for conv, reason in unfolded_norms(graph, modules, nn.Conv2d))
    if not found and not norms:
        if left:
            raise NormUnfolded(left[0][1])
        raise CannotRewrite("none of its convolutions is followed by a BN or an activation alone")
    has_norm = bool(norms) or any(match.bn for match in found)
    convs = tuple(dict.fromkeys(str(match.conv.target) for match in found))
    for match in found:
        _replace(graph, match, modules)
    for norm in norms:
        _replace_norm(graph, norm, modules)
    originals = _forwards(plain_class_of(module))
    return Program(function_of(graph), convs, originals, reads, tuple(skipped), has_norm, left)


def _forwards(cls: type) -> tuple:
    return tuple(base.__dict__.get("forward") for base in cls.__mro__)


# ----------------------------------------------------------------------------------------------------------- rewriting


def _may_write(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Also a child that is not one of torch's own, or that does more when called."""
    module = module_of(node, modules)
    if module is None:
        return writes_in_place(node, modules)
    is_torchs = type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, CONTAINERS)
    return not is_torchs or not has_stock_call(module) or writes_in_place(node, modules)


def _replace(graph: fx.Graph, match: Match, modules: dict[str, nn.Module]) -> None:
    """One call of `nn.conv_bn_act` in the place of the match's last node."""
    tail, act = match.nodes[-1], match.act
    with graph.inserting_before(tail):
        conv = graph.create_node("get_attr", match.conv.target)
        functional = norm_operands(match.bn)
        bn = graph.create_node("get_attr", match.bn.target) if match.bn and not functional else None
        bn = graph.call_function(Norm, kwargs=functional) if functional else bn
        backend = graph.create_node("get_attr", "backend")
        operands = (match.conv.args[0], conv, bn, _read(graph, act, modules), match.residual, backend)
        fused = graph.call_function(conv_bn_act, (*operands, _sum_of(match, modules)))
    tail.replace_all_uses_with(fused)
    for node in reversed(match.nodes):
        graph.erase_node(node)


def _replace_norm(graph: fx.Graph, match: NormMatch, modules: dict[str, nn.Module]) -> None:
    """One call of `nn.bn_act` in the place of the norm."""
    with graph.inserting_before(match.bn):
        bn, act = graph.create_node("get_attr", match.bn.target), _read(graph, match.act, modules)
        backend = graph.create_node("get_attr", "backend")
        fused = graph.call_function(bn_act, (match.bn.args[0], bn, act, backend))
    for node in (match.act, match.bn):
        if node is not None:
            node.replace_all_uses_with(fused)
            graph.erase_node(node)


def _read(graph: fx.Graph, act: Optional[fx.Node], modules: dict[str, nn.Module]) -> Any:
    """An activation as an operand: the module, or the name of the function."""
    if act is not None and act.op == "call_module":
        return graph.create_node("get_attr", act.target)
    return activation_of(act, modules) if act else None


def _sum_of(match: Match, modules: dict[str, nn.Module]) -> str:
    """How the forward adds the residual, as `nn.conv_bn_act` calls it."""
    if match.add is None or not writes_in_place(match.add, modules):
        return "out + residual"
    return "residual += out" if match.add.args[0] is match.residual else "out += residual"
