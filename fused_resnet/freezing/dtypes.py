"""The shape and dtype of every value of a traced model, and the casts that compute it in another dtype.

Nothing is computed. In the model's own dtype a graph stays as it is: what torch refuses or promotes, it refuses and
promotes here. In another, the graph computes as under autocast, from an input that is in that dtype already:

- Products (convolutions, linear layers, matmul, attention) cast what arrives to it, unless all of it is fp64.
- Every other operation computes in what arrives: a step with an explicit cast to fp32 stays fp32, sums promote.
- The model's own weights and buffers take the dtype of the activations that they meet, as after `model.to(dtype)`,
  and are rounded once. What was of another dtype than the model's main one is left alone.
- Operations that take operands of one dtype alone get the widest, and those without 16-bit kernels get fp32.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import threading
from typing import Any, Callable, Iterator, NamedTuple, Optional

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from fused_resnet.freezing import shapes
from fused_resnet.graphs.memory import writes_in_place, written
from fused_resnet.graphs.nodes import free_name, is_made_in_forward, module_of
from fused_resnet.machine.errors import first_line
from fused_resnet.machine.locks import new_lock
from fused_resnet.nn.stock import has_stock_call
from fused_resnet.operators.describe import Facts
from fused_resnet.operators.problem import dtype_name

# And those with modules inside: attention, Transformer layers, parametrized modules.
_PRODUCT_MODULES = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
# By name, because functions, methods and operators share them; a trailing underscore is taken off first.
_PRODUCTS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution conv_bn_act linear bilinear "
    "matmul imatmul __matmul__ mm mv bmm addmm addmv addbmm baddbmm einsum tensordot dot vdot inner chain_matmul "
    "multi_dot scaled_dot_product_attention multi_head_attention_forward".split()
)
_ONE_DTYPE = frozenset(
    "prelu lerp layer_norm group_norm rms_norm grid_sample grid_sampler cdist cross index_add index_copy index_put "
    "scatter scatter_add masked_scatter pairwise_distance".split()
)
_PRODUCTS_OF_ONE_DTYPE = _PRODUCTS - {"conv_bn_act", "scaled_dot_product_attention", "multi_head_attention_forward"}
_BATCH_NORMS = frozenset(("batch_norm", "instance_norm"))
_NO_16_BITS = frozenset(
    "quantile nanquantile local_response_norm avg_pool3d cdist view_as_complex det logdet slogdet inverse pinverse inv "
    "pinv svd svdvals qr eig eigh eigvals eigvalsh cholesky solve lstsq matrix_rank fft ifft rfft irfft fft2 ifft2 "
    "rfft2 irfft2 fftn ifftn rfftn irfftn stft istft complex polar".split()
)
_NO_16_BIT_MODULES = (nn.LocalResponseNorm, nn.AvgPool3d)
_DYNAMICALLY_QUANTIZED = "torch.ao.nn.quantized.dynamic."
_CASTS = frozenset("to type type_as float double half bfloat16".split())

# Torch notes for the process that such a mode is on, and two that overlap leave it noted: torch.compile then gives up.
_FAKES = new_lock()


class Conversion(NamedTuple):
    """Arithmetic in another dtype than the model's own, or on inputs of another dtype than it takes."""

    main: torch.dtype  # what most of the model is in, and what becomes `wanted`
    wanted: Optional[torch.dtype]  # None: nothing does, only x does not come as the model takes it
    input: torch.dtype  # what x is cast to first
    outputs: tuple[Optional[torch.dtype], ...]  # of the leaves of what is returned; None for what is no tensor


def main_dtype(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """What most of a model's floating-point parameters are in, counted by elements."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=sizes.__getitem__, default=default)


def conversion(
    traced: fx.GraphModule, x: Tensor, main: torch.dtype, wanted: Optional[torch.dtype]
) -> Optional[Conversion]:
    """What computes a model in `wanted` (None: in its main dtype) on inputs like x; None where the model itself does.

    What is returned keeps its dtype, but for a model that does not take x's dtype: then x is cast to its main one, and
    back what comes in it. Raises ValueError when the model does not take inputs like x, nor would under autocast.
    """
    if x.dtype == main and wanted in (None, main):
        return None
    try:
        dtypes = _returned(propagated(traced, x))
        if wanted is None:
            return None
        return Conversion(main, wanted, wanted if x.dtype == main else x.dtype, dtypes)
    except ValueError as error:
        refused = error
    try:
        dtypes = _returned(propagated(traced, x.to(main)))
    except ValueError:
        if wanted is None:
            raise refused from None
        dtypes = _returned(propagated(traced, x, _to_its_own(main)))
    outputs = tuple(x.dtype if dtype == main else dtype for dtype in dtypes)
    return Conversion(main, wanted, wanted or main, outputs)


def check_fake_quantization(traced: fx.GraphModule) -> None:
    """Raises ValueError for a model that is to be in another dtype and rounds as quantized ones do: torch's operator
    reads a scale as fp32, whatever it is in."""
    for node in traced.graph.nodes:
        if node.op == "call_function" and "fake_quant" in getattr(node.target, "__name__", ""):
            raise ValueError(
                f"freeze: {node.name} rounds as a quantized model would, which torch does right in fp32 alone. Leave "
                "out dtype, freeze in torch.int8, or take the FakeQuantize modules out of the model."
            )


def _to_its_own(main: torch.dtype) -> Conversion:
    """What casts as autocast would in the model's own dtype: more runs so than without."""
    return Conversion(main, main, main, ())


def _returned(model: fx.GraphModule) -> tuple[Optional[torch.dtype], ...]:
    (output,) = model.graph.find_nodes(op="output")
    return tuple(facts and facts.dtype for facts in output.meta["leaves"])


def propagated(traced: fx.GraphModule, x: Tensor, to: Optional[Conversion] = None) -> fx.GraphModule:
    """A copy of a graph, with the casts that a conversion needs, in which every node knows its value's shape and dtype.

    meta["facts"]: the `Facts` of a tensor; of the output node, meta["leaves"]. meta["arrives_in"]: the dtype that a
    module computes in. Raises ValueError when the model does not take inputs like x.
    """
    propagation = _Propagation(traced, to, lambda tensor: tensor.to("meta"))
    try:
        with shapes.Rules():
            return propagation.run_on(x)
    except shapes.Refused as error:
        raise _refusal(traced, x, to, propagation.node, error) from error
    except Exception:
        pass  # meta tensors are quick, but do not know of devices and of operators without a meta kernel
    try:
        with _FAKES, FakeTensorMode(allow_non_fake_inputs=True) as mode, without_torchs_log():
            mode.cache_enabled = False  # it compares arguments, which the packed weights of torch.ao refuse
            propagation = _Propagation(traced, to, mode.from_tensor)
            return propagation.run_on(x)
    except Exception as error:
        raise _refusal(traced, x, to, propagation.node, error) from error


def _refusal(
    traced: fx.GraphModule, x: Tensor, to: Optional[Conversion], node: fx.Node, error: Exception
) -> ValueError:
    """What an error at a node says about the model, or about x."""
    name, message = _spelled(node), first_line(error)
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return ValueError(
            f"freeze: what {name} returns has no shape or value before it runs, and a plan needs it. "
            "Freeze the modules around it by themselves, or use fused_resnet.fuse."
        )
    if to is not None and to.wanted not in (None, to.main):
        propagated(traced, x, _to_its_own(to.main))  # says what is wrong with x, if anything is
        return ValueError(
            f"freeze: the model cannot be computed in {dtype_name(to.wanted)}, because {name} cannot: {message}. "
            "Cast its input to float32 in the model, or freeze without dtype."
        )
    return ValueError(f"freeze: the model cannot take an input of shape {tuple(x.shape)}: {message}")


@contextlib.contextmanager
def without_torchs_log() -> Iterator[None]:
    """Torch logs a traceback for whatever is refused on fake tensors; the error itself says enough."""
    thread = threading.get_ident()
    log = logging.getLogger(FakeTensorMode.__module__)

    def is_of_another_thread(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log.addFilter(is_of_another_thread)
    try:
        yield
    finally:
        log.removeFilter(is_of_another_thread)


def facts_of(node: Any) -> Optional[Facts]:
    return node.meta.get("facts") if isinstance(node, fx.Node) else None


def converted(module: nn.Module, main: torch.dtype, wanted: torch.dtype) -> nn.Module:
    """A copy of a module that computes in `wanted`: what was in its model's main dtype is that, a batch norm's vectors
    fp32 beside 16-bit inputs. What need not change is shared."""
    tensors: dict[int, Any] = {}
    for child in module.modules():
        is_batch_norm = isinstance(child, nn.modules.batchnorm._NormBase)
        dtype = torch.promote_types(wanted, torch.float32) if is_batch_norm else wanted
        changing = {main, *(_misfits(child, wanted) if isinstance(child, _NORMS) else ())}
        for tensor in (*child.parameters(recurse=False), *child.buffers(recurse=False)):
            tensors[id(tensor)] = tensor.detach().to(dtype) if tensor.dtype in changing else tensor
    return copy.deepcopy(module, tensors)  # which takes what its memo holds for a copy


class _Propagation(fx.Interpreter):
    """Runs a copy of a graph on tensors without memory: `ghost` makes them of tensors that have some."""

    def __init__(self, traced: fx.GraphModule, to: Optional[Conversion], ghost: Callable[[Tensor], Tensor]) -> None:
        self._model = fx.GraphModule(traced, copy.deepcopy(traced.graph))
        super().__init__(self._model, garbage_collect_values=False)
        self.node = next(iter(self._model.graph.nodes))  # where it is
        self._to = to if to and to.wanted else None
        self._input_dtype, self._ghost = to and to.input, ghost
        self._ghosts: dict[int, Any] = {}  # deepcopy's memo: tensors and modules, by id
        self._state: set[fx.Node] = set()  # computed from the model's own weights and buffers alone
        self._constants: dict[tuple[str, torch.dtype], str] = {}

    def run_on(self, x: Tensor) -> fx.GraphModule:
        x = self._ghost(x)
        self.args_iter = iter([x.to(self._input_dtype or x.dtype)])
        for node in list(self._model.graph.nodes):
            self.node = node
            if self._to is None:
                self._check_dtypes(node)
            elif node.op.startswith("call_"):
                self._cast_operands(node, self._to)
            self._compute(node)
            if self._to is not None and self._is_state(node, self._to.main):
                self._state.add(node)
        node.meta["leaves"] = [_facts(leaf) for leaf in pytree.tree_leaves(self.env[node])]
        return self._model

    def _compute(self, node: fx.Node) -> None:
        value = self.env[node] = self.run_node(node)
        if isinstance(value, Tensor):
            node.meta["facts"] = _facts(value)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self.fetch_attr(target)
        return self._ghost(value) if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Converted modules are not made for this: theirs is what the module returns in its own dtype."""
        module = self.fetch_attr(target)
        if type(module) is nn.BatchNorm2d and has_stock_call(module) and _takes(module, *args, **kwargs):
            known = shapes.like(args[0])
            if known is not None:
                return known
        held = (*module.parameters(), *module.buffers())
        self._ghosts.update({id(tensor): self._ghost(tensor) for tensor in held if id(tensor) not in self._ghosts})
        if held:  # packed weights of quantized layers are none, and have no ghosts
            module = copy.deepcopy(module, self._ghosts)
        dtype = self.node.meta.get("arrives_in")
        if dtype is None or self._to is None:
            return module(*args, **kwargs)
        args, kwargs = _in_another(dtype, self._to.main, (args, kwargs))
        return _in_another(self._to.main, dtype, module(*args, **kwargs))

    def _check_dtypes(self, node: fx.Node) -> None:
        """Torch refuses these, but not on tensors without memory."""
        module = module_of(node, self.submodules)
        values = [self.env[operand] for operand in node.all_input_nodes]
        given = {value.dtype for value in values if is_floating(value)}
        if isinstance(module, _NORMS):
            wrong = set().union(*(_misfits(module, dtype) for dtype in given))
        elif isinstance(module, _PRODUCT_MODULES):
            wrong = _dtypes_in(module) - given if given else set()
        else:
            wrong = given if _name_of(node) in _PRODUCTS_OF_ONE_DTYPE and len(given) > 1 else set()
        if wrong:
            names = " and ".join(sorted(map(dtype_name, given | wrong)))
            raise TypeError(f"{_spelled(node)} cannot compute with {names} together")

    # ------------------------------------------------------------------------------------------------------- casts

    def _cast_operands(self, node: fx.Node, to: Conversion) -> None:
        operands = {n: self.env[n].dtype for n in node.all_input_nodes if is_floating(self.env[n])}
        dtype, cast = self._wanted(node, operands, to)
        module = module_of(node, self.submodules)
        if module is not None and dtype is not None:
            is_main = to.main in _dtypes_in(module) and dtype != to.main
            if is_main or isinstance(module, _NORMS) and _misfits(module, dtype):
                node.meta["arrives_in"] = dtype
        if dtype is None:
            return
        for operand in cast:
            if operands[operand] != dtype:
                node.replace_input_with(operand, self._cast(operand, dtype, before=node))

    def _wanted(
        self, node: fx.Node, operands: dict[fx.Node, torch.dtype], to: Conversion
    ) -> tuple[Optional[torch.dtype], list[fx.Node]]:
        """The dtype that an operation computes in, if it has floating-point operands; those to be cast to it."""
        kept = written(node) if writes_in_place(node, self.submodules) else []
        every = [operand for operand in operands if operand not in kept]
        own = [operand for operand in every if operand in self._state]
        given = [dtype for operand, dtype in operands.items() if operand not in own]
        widest = functools.reduce(torch.promote_types, given) if given else None
        module, name = module_of(node, self.submodules), _name_of(node)
        if module is not None:
            if isinstance(module, _NO_16_BIT_MODULES) and widest is not None and widest.itemsize == 2:
                return torch.float32, every
            if type(module).__module__.startswith(_DYNAMICALLY_QUANTIZED):
                return torch.float32, every  # which they quantize
            dtypes = _dtypes_in(module)
            is_product = isinstance(module, _PRODUCT_MODULES) or any(True for _ in module.children())
            if is_product and operands and dtypes:
                return to.wanted if to.main in dtypes else max(dtypes, key=lambda dtype: dtype.itemsize), every
            return (widest if dtypes else None), every
        if name in _PRODUCTS:
            is_double = set(operands.values()) == {torch.float64}
            return (None if is_double else to.wanted), every
        if node.target is getattr and node.args[1:] == ("dtype",):
            return to.wanted, own  # x.to(self.weight.dtype)
        if widest is None:
            return None, []
        if name in _NO_16_BITS and widest.itemsize == 2:
            return torch.float32, every
        if name in _ONE_DTYPE:
            target = [operands[operand] for operand in kept if operand in operands]
            return (target or [widest])[0], every
        return (torch.promote_types(widest, torch.float32) if name in _BATCH_NORMS else widest), own

    def _cast(self, operand: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
        graph = self._model.graph
        with graph.inserting_before(before):
            if operand.op == "get_attr":
                cast = graph.get_attr(self._constant(str(operand.target), dtype))
            else:
                cast = graph.call_method("to", (operand, dtype))
        self._compute(cast)
        return cast

    def _constant(self, target: str, dtype: torch.dtype) -> str:
        """The name of a buffer of the graph's own: this weight in this dtype."""
        if (target, dtype) not in self._constants:
            name = free_name(self._model, f"{target.replace('.', '_')}_{dtype_name(dtype)}")
            self._model.register_buffer(name, self.fetch_attr(target).detach().to(dtype))
            self._constants[target, dtype] = name
        return self._constants[target, dtype]

    def _is_state(self, node: fx.Node, main: torch.dtype) -> bool:
        if node.op == "get_attr":
            return not is_made_in_forward(node) and getattr(self.env[node], "dtype", None) == main
        if node.op not in ("call_function", "call_method", "call_module") or _name_of(node) in _CASTS:
            return False
        inputs = [n for n in node.all_input_nodes if any(map(is_floating, pytree.tree_leaves(self.env[n])))]
        module = module_of(node, self.submodules)
        is_of_module = module is not None and main in _dtypes_in(module)  # an embedding
        return self._state.issuperset(inputs) and (bool(inputs) or is_of_module) and _name_of(node) not in _PRODUCTS


def _facts(value: Any) -> Optional[Facts]:
    return Facts(tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else None


def _takes(norm: nn.BatchNorm2d, x: Any = None, *args: Any, **kwargs: Any) -> bool:
    is_image = not args and not kwargs and is_floating(x) and x.dim() == 4
    return is_image and norm.running_mean is not None and x.shape[1] == norm.num_features


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _dtypes_in(module: nn.Module) -> set[torch.dtype]:
    """The dtypes of its floating-point parameters and buffers."""
    return {tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()}


def _misfits(norm: nn.Module, dtype: torch.dtype) -> set[torch.dtype]:
    """The dtypes of a norm's vectors that torch does not take beside an input of this dtype."""
    return _dtypes_in(norm) - ({dtype, torch.float32} if dtype.itemsize == 2 else {dtype})


def _in_another(dtype: torch.dtype, other: torch.dtype, values: Any) -> Any:
    return pytree.tree_map(lambda v: v.to(other) if isinstance(v, Tensor) and v.dtype == dtype else v, values)


def _name_of(node: fx.Node) -> str:
    """The function that is called: "add" for x.add(y), x.add_(y), torch.add and torch.ops.aten.add.Tensor."""
    if node.op not in ("call_function", "call_method"):
        return ""
    schema = getattr(node.target, "_schema", None)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = schema.name.rpartition("::")[2] if schema is not None else name
    name = name.removeprefix("linalg_").removeprefix("fft_")
    return name if name.startswith("__") else name.rstrip("_")


def _spelled(node: fx.Node) -> str:
    return str(node.target).removeprefix("model.") if node.op == "call_module" else _name_of(node)
