"""What `freeze` returns: a model that plans for each input shape, or one whose parts do."""

from __future__ import annotations

import collections
import itertools
import logging
import threading
from typing import Any, Callable, Optional, Union, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fused_resnet.choosing import winners
from fused_resnet.choosing.decide import NOTHING, Tuning
from fused_resnet.freezing.calibrated_parts import CalibratedParts, PartCalibration
from fused_resnet.freezing.calibration import Calibration, beside_quantized
from fused_resnet.freezing.copies import copy_of, copy_tensors, copy_with_parameters, unwrapped
from fused_resnet.freezing.draft import Quantization
from fused_resnet.freezing.dtypes import check_fake_quantization, conversion, is_floating, main_dtype, propagated
from fused_resnet.freezing.fake_quantize import spelled_out
from fused_resnet.freezing.given_scales import take_scales
from fused_resnet.freezing.make import calibration_subject, make_plan
from fused_resnet.freezing.modules import FrozenConv, FrozenRegion, PackedWeights
from fused_resnet.freezing.parts import freeze_parts
from fused_resnet.freezing.plan import Plan, Turns, plainly
from fused_resnet.freezing.quantized import warn_without_int8
from fused_resnet.freezing.swapping import SECONDS, Overrides, swapped
from fused_resnet.freezing.trace import trace
from fused_resnet.freezing.warm import refused, warmed
from fused_resnet.machine.cuda_graphs import is_captured
from fused_resnet.machine.locks import new_lock
from fused_resnet.nn.scripting import NotScriptable
from fused_resnet.operators.problem import dtype_name
from fused_resnet.quantizing import Scales

log = logging.getLogger("fused_resnet")

MAX_PLANS = 8
MAX_REFUSALS = 64


class Frozen(NotScriptable, nn.Module):
    """What frozen modules share: they serve, and the way to anything else leads back to the model."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        super().train(False)
        self.__dict__["_original"] = original  # not a submodule: its parameters are not this model's

    def unfreeze(self) -> nn.Module:
        """The model this was frozen from, as it is now."""
        return self._original

    def train(self, mode: bool = True) -> "Frozen":
        if mode:
            raise RuntimeError("a frozen model cannot be trained: train frozen.unfreeze() and freeze it again.")
        return self

    def _kinds(self) -> set[tuple[torch.device, torch.dtype]]:
        """Where what it takes and what it computes with beside its plans lie, and their dtypes."""
        raise NotImplementedError

    def _apply(self, fn: Callable, recurse: bool = True) -> "Frozen":
        """What `to`, `float` and their like do to every module: nothing, where this one is as they ask already."""
        for device, dtype in self._kinds():
            sample, cause = torch.empty(1, device=device, dtype=dtype), None
            try:
                is_kept = fn(sample) is sample
            except Exception as error:
                is_kept, cause = False, error
            if not is_kept:
                raise RuntimeError(
                    f"a frozen model cannot be moved or converted, and this one is in {dtype_name(dtype)} on {device}: "
                    "move frozen.unfreeze() and freeze it again (dtype= converts). Where it is inside another model, "
                    "the modules that come before it there have been moved."
                ) from cause
        return self


class FrozenModel(Frozen):
    """What `freeze` returns. Callable like the model; `unfreeze()` gives the model back."""

    _lock: threading.Lock  # for a moment, while `_plans` or `_refusals` is read or changed
    _making: threading.Lock  # while a plan is made
    _plans: collections.OrderedDict[tuple, Plan]
    _refusals: collections.OrderedDict[tuple, str]  # of wrong shapes
    _packed: PackedWeights
    _tuning: Tuning
    _turns: Turns

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        dtype: Optional[torch.dtype],
        backend: str,
        tuning: Tuning = NOTHING,
        main: Optional[torch.dtype] = None,  # of the whole, where the model is a part
        calibration: Union[Calibration, PartCalibration, None] = None,  # for dtype int8 and float8_e4m3fn
    ) -> None:
        super().__init__(model)
        own = main_dtype(model, example_input.dtype)
        self.dtype, self.backend = dtype or own, backend
        self.device, self.input_dtype = example_input.device, example_input.dtype
        self._quantization: Optional[Quantization] = None
        with plainly(self.device):
            takes_scales, example = self.dtype == torch.int8, example_input.detach()
            self.__dict__["_traced"] = trace(model, spelled_out) if takes_scales else trace(model)
            if takes_scales:
                take_scales(self._traced)
            elif self.dtype != own:
                check_fake_quantization(self._traced)
            if calibration is not None:
                subject = calibration_subject(self._traced, example, own)
                self._quantization = calibration.of(unwrapped(model), self._traced, subject, example, tuning.progress)
                dtype = beside_quantized(self.device)
            self._conversion = conversion(self._traced, example, main or own, dtype)
        self._reset_plans()
        self.__dict__["_tuning"] = tuning  # for the first plan
        plan = self._plan_for(example_input)
        if self._quantization is not None and dtype is not None:
            warn_without_int8(plan.module, dtype)
        self.__dict__["_tuning"] = Tuning(tuning.tune and "check")

    def forward(self, x: Tensor) -> Any:
        if torch.compiler.is_dynamo_compiling():  # asked first: torch 2.11's says that it is exporting too
            return torch.compiler.disable(self._run, reason="compiled already; export frozen.unfreeze()")(x)
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise RuntimeError("a frozen model cannot be exported: its weights are packed. Export frozen.unfreeze().")
        return self._run(x)

    def _run(self, x: Tensor) -> Any:
        self._check_input(x)
        plan = self._plan_for(x)
        with plainly(self.device):
            return plan(x)

    def plan(self, x: Tensor) -> fx.GraphModule:
        """The plan for inputs like x, made now if there is none: `print(frozen.plan(x).code)`."""
        self._check_input(x)
        return self._plan_for(x).module

    def taken(self, x: Tensor) -> Tensor:
        """x as the plan for it takes it."""
        self._check_input(x)
        return self._plan_for(x).taken(x)

    def scales(self) -> Scales:
        """The ranges that a model in int8 or e4m3 was calibrated with. `save(path)` writes what
        `freeze(calibrate=path)` reads, for either.

        Raises TypeError for a model that was frozen in another dtype.
        """
        if self._quantization is None:
            raise TypeError(
                f"scales: the model is frozen in {dtype_name(self.dtype)}; int8 and float8_e4m3fn alone have scales."
            )
        return self._quantization.scales

    def is_graphed(self, x: Tensor) -> bool:
        """Whether inputs like x are served by replaying a CUDA graph. Without one, a warning has said why."""
        self._check_input(x)
        return self._plan_for(x).is_graphed

    def plans(self) -> list[fx.GraphModule]:
        """The plans that there are, the one used last at the end."""
        with self._lock:
            return [plan.module for plan in self._plans.values()]

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dtype != self.input_dtype or x.device != self.device:
            got = f"{dtype_name(x.dtype)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"frozen for {dtype_name(self.input_dtype)} inputs on {self.device}, got {got}.")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a frozen model has no gradients: use fused_resnet.fuse, or call it under no_grad.")

    def _plan_for(self, x: Tensor) -> "Plan":
        """Calls do not wait for a plan that is being made, where their shape has a plan or the model refuses it."""
        plan = self._known_plan(x)
        if plan is not None:
            return plan
        if is_captured(self.device):
            raise RuntimeError(
                f"a frozen model has no plan yet for inputs of shape {tuple(x.shape)}, and cannot make one while a "
                "CUDA graph is captured: call it once with that shape before."
            )
        graph = self._graph_for(x)
        with self._making:
            plan = self._known_plan(x)  # another thread may have made it meanwhile
            if plan is None:
                with plainly(self.device):
                    plan = self._made(graph, x.detach())
                with self._lock:
                    self._plans[tuple(x.shape)] = plan
                    if len(self._plans) > MAX_PLANS:
                        self._plans.popitem(last=False)
        return plan

    def _made(self, graph: fx.GraphModule, x: Tensor) -> Plan:
        """A new plan, warmed up. Convolutions that a library refuses, which shows when they run, go to another."""
        overrides: Overrides = {}
        options = (self._conversion, self.backend, self._packed, self._tuning, overrides, self._quantization)
        made = make_plan(graph, x, *options)
        try:
            plan = warmed(made, x, self._turns)
            return self._swapped(plan, x) if plan.is_graphed else plan
        except ValueError:
            if self.backend != "auto" or not (refusals := refused(made)):
                raise
        for problem, (selection, why) in refusals.items():
            log.info("%s refuses %s, which goes to another backend: %s", selection, problem, why)
        winners.keep_refusals(refusals)
        return self._remade(x, {})

    def _swapped(self, plan: Plan, x: Tensor) -> Plan:
        """A captured plan, with the second best of some convolutions where that is faster."""
        if self.backend != "auto" or self._tuning.tune in (False, "check"):
            return plan
        problems = [module.problem for module in plan.module.modules() if isinstance(module, FrozenConv)]
        seconds = SECONDS if isinstance(self._tuning.tune, str) else min(SECONDS, float(self._tuning.tune))
        return swapped(plan, lambda overrides: self._remade(x, overrides), problems, x, seconds)

    def _remade(self, x: Tensor, overrides: Overrides) -> Plan:
        """Measuring nothing more: what time did not allow before, it would not allow for each of them."""
        options = (self._conversion, self.backend, self._packed, NOTHING, overrides, self._quantization)
        return warmed(make_plan(self._graph_for(x), x, *options), x, self._turns)

    def _graph_for(self, x: Tensor) -> fx.GraphModule:
        """The traced graph with all shapes for x, or the refusal of a wrong one, which is remembered."""
        key = tuple(x.shape), x.stride() if x.layout is torch.strided else None
        with self._lock:
            refusal = self._refusals.get(key)
        if refusal is not None:
            raise ValueError(refusal)
        try:
            with plainly(self.device):
                return propagated(self._traced, x.detach(), self._conversion)
        except ValueError as error:
            with self._lock:
                self._refusals[key] = str(error)
                if len(self._refusals) > MAX_REFUSALS:
                    self._refusals.popitem(last=False)
            raise

    def _known_plan(self, x: Tensor) -> Optional[Plan]:
        key = tuple(x.shape)
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
            return self._plans.get(key)

    def _kinds(self) -> set[tuple[torch.device, torch.dtype]]:
        return {(self.device, self.input_dtype)}

    def extra_repr(self) -> str:
        """What it was made from and computes in, then a line for each plan: the shape, and who computes how much."""
        with self._lock:
            plans = list(self._plans.items())
        lines = [f"{type(self._original).__name__} in {dtype_name(self.dtype)} on {self.device}"]
        for shape, plan in plans:
            counts = collections.Counter(_backends(plan.module))
            computed = ", ".join(f"{name} {count}" for name, count in counts.most_common())
            lines.append(f"{'x'.join(map(str, shape))}: {computed or 'no convolutions'}")
        return "\n".join(lines)

    def _reset_plans(self) -> None:
        self.__dict__.update(_lock=new_lock(), _making=new_lock())
        self.__dict__.update(_plans=collections.OrderedDict(), _refusals=collections.OrderedDict())
        self.__dict__.update(_packed=PackedWeights(), _turns=Turns())

    def __getstate__(self) -> dict:
        # weights and graphs are packed and made where they are needed
        rebuilt = ("_lock", "_making", "_plans", "_refusals", "_packed", "_turns")
        return {name: value for name, value in self.__dict__.items() if name not in rebuilt}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._reset_plans()


def _backends(plan: fx.GraphModule) -> list[str]:
    """The name of the backend that computes each convolution of a plan, in regions too."""
    names: list[str] = []
    for module in plan.modules():
        if isinstance(module, FrozenConv):
            names.append(module.backend.name)
        elif isinstance(module, FrozenRegion):
            names += [module.selection_of(conv).backend.name for conv in module.convolutions]
    return names


class _FrozenPart(FrozenModel):
    """A FrozenModel inside a model, which may ask it for its attributes, as they were, but not set them."""

    def __init__(
        self,
        part: nn.Module,
        x: Tensor,
        dtype: Optional[torch.dtype],
        backend: str,
        tuning: Tuning,
        main: torch.dtype,
        calibration: Optional[PartCalibration] = None,
    ) -> None:
        if x.dtype != main:  # what the model computes in another dtype than its main one stays in it
            dtype, calibration = None, None
        super().__init__(part, x, dtype, backend, tuning, main, calibration)
        if self._traced.meta["writes_input"]:
            raise ValueError("freeze: it writes into its input, which a frozen part does not.")
        try:
            self.__dict__["_asked"] = copy_of(part)
        except Exception as error:
            raise ValueError(f"freeze: {type(part).__name__} cannot be copied: {error}") from error

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__.get("_asked"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_asked" in self.__dict__:
            raise RuntimeError(
                f"freeze: the model sets {name!r} of {type(self._original).__name__}, a frozen part, whose plan would "
                "not see it. Set it before freezing, freeze the modules inside it by themselves, or use "
                "fused_resnet.fuse."
            )
        super().__setattr__(name, value)


class NothingToFreeze(ValueError):
    """No part of a model can be frozen."""


class FrozenParts(Frozen):
    """What `freeze` returns for a model that cannot be frozen as a whole: a copy with frozen parts.

    Callable like the model, in no_grad mode; autocast around a call changes nothing. parts: {name: FrozenModel}. The
    rest of the copy computes in the model's dtype, and a part returns the dtypes that its module did.

    A part does what its module did when it was frozen. Its attributes and the modules inside it are those of then, to
    be read. Setting an attribute of a part is an error. What is set on a module inside, or hooked to it, has no effect:
    change unfreeze(), and freeze again. Modules that the forward writes to are in no part, and go on from where the
    model was.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        dtype: Optional[torch.dtype],
        backend: str,
        tuning: Tuning,
        reason: str,
        calibration: Optional[Calibration] = None,  # as of FrozenModel
    ) -> None:
        super().__init__(model)
        tensors = (value for value in pytree.tree_leaves(example_input) if isinstance(value, Tensor))
        weights = itertools.chain(model.parameters(), model.buffers(), tensors)
        self._device = next((tensor.device for tensor in weights), torch.device("cpu"))
        example = next(filter(is_floating, pytree.tree_leaves(example_input)))
        main = main_dtype(model, example.dtype)
        with plainly(self._device):
            try:
                plain = copy_with_parameters(model)
            except Exception as error:
                raise NothingToFreeze(f"freeze: {type(model).__name__} cannot be copied: {error}") from error
            takes_tensor = isinstance(example_input, Tensor)
            calibrated = None if calibration is None else CalibratedParts(calibration, plain, takes_tensor)

            def freeze_part(name: str, part: nn.Module, x: Tensor) -> _FrozenPart:
                if calibrated is None:
                    return _FrozenPart(part, x, dtype, backend, tuning, main)
                scaled = calibrated.of(name)
                into = beside_quantized(x.device) if scaled is None else dtype
                return _FrozenPart(part, x, into, backend, tuning, main, scaled)

            parts, expected, self._writes_input = freeze_parts(plain, example_input, freeze_part)
        if not parts:
            raise NothingToFreeze(f"freeze: no part of {type(model).__name__} can be frozen, and {reason}")
        self.parts = cast("dict[str, FrozenModel]", parts)
        self._scales: Optional[Scales] = None
        if calibrated is not None:
            scales = {name: part._quantization.scales for name, part in self.parts.items() if part._quantization}
            self._scales = calibrated.scales_of(scales)
        replaced = {id(plain.get_submodule(name)): part for name, part in parts.items()}
        self.__dict__["_copy"] = copy_of(plain, replaced)
        got, wanted = pytree.tree_structure(self(example_input)), pytree.tree_structure(expected)
        if got != wanted:
            raise ValueError(f"freeze: frozen in parts, {type(model).__name__} returns {got} instead of {wanted}.")
        self.__dict__["_copy"] = copy_of(plain, replaced)  # which has not been called yet: the rest may keep state
        log.info("frozen in %d parts (%s): %s", len(parts), ", ".join(parts), reason)

    def scales(self) -> Scales:
        """As of a FrozenModel, of all parts that are in int8 or e4m3. TypeError for a model in another dtype."""
        if self._scales is None:
            raise TypeError("scales: the model is frozen in floats; int8 and float8_e4m3fn alone have scales.")
        return self._scales

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._copy
        with plainly(self._device):
            if self._writes_input:
                args, kwargs = copy_tensors((args, kwargs))
            return model(*args, **kwargs)

    def _kinds(self) -> set[tuple[torch.device, torch.dtype]]:
        model: Any = self._copy
        rest = {(tensor.device, tensor.dtype) for tensor in itertools.chain(model.parameters(), model.buffers())}
        return rest.union(*(part._kinds() for part in self.parts.values()))

    def extra_repr(self) -> str:
        return ", ".join(self.parts)
