"""What a step of training takes: time, and what autograd keeps of the forward for the backward."""

from __future__ import annotations

import copy
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.choosing.timing import Progress, interleaved, silent
from fused_resnet.fusing import convert
from fused_resnet.machine.errors import why_missing
from fused_resnet.measuring.summary import BASE, Row
from fused_resnet.operators.problem import short_name
from fused_resnet.training import recompute_inputs


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


class Trained:
    """A model of one's own, and steps of SGD on one batch of random images. dtype: what autocast computes in."""

    def __init__(
        self, model: nn.Module, x: Tensor, labels: Tensor, dtype: torch.dtype, run: Any = None, recomputes: bool = False
    ) -> None:
        """run: what is called instead of the model, which holds the parameters. recomputes: as `recompute_inputs`."""
        self.model, self._run, self._x, self._labels, self._dtype = model, run or model, x, labels, dtype
        self._recomputes = recomputes
        self._optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def loss(self) -> Tensor:
        casts = self._dtype != torch.float32
        with torch.autocast(self._x.device.type, self._dtype, enabled=casts), recompute_inputs(self._recomputes):
            return F.cross_entropy(self._run(self._x).float(), self._labels)

    def gradients(self) -> Tensor:
        """All in one vector, in fp64."""
        self.model.zero_grad()
        self.loss().backward()
        return torch.cat([p.grad.flatten().double() for p in self.model.parameters() if p.grad is not None])

    def step(self) -> None:
        self._optimizer.zero_grad()
        self.loss().backward()
        self._optimizer.step()


def _ratio(stats: dict[str, Any], base: str, other: str) -> Optional[float]:
    return stats[base].median_us / stats[other].median_us if other in stats else None


class TrainingSubject(NamedTuple):
    """A model in fp32, and the ways to train it that are timed in turn. shape: the input's, batch first."""

    name: str
    model: nn.Module
    shape: Sequence[int]
    device: str
    dtypes: Sequence[torch.dtype]
    with_compile: bool = True

    def measured(self, budget_s: float, rounds: Optional[int] = None, progress: Progress = silent) -> Row:
        """{"batch", "variants", "skipped"}, of steps of SGD on random images.

        max_rel_error: the norm of the gradients' difference from those of eager NCHW fp32, relative to these. A variant
        of ours that errs by more than four times what eager does in its dtype is not timed, but listed as skipped.
        "fused" is what fusion alone gives, "fused, less kept" is the same with `recompute_inputs`.
        saved_mb: `saved_bytes` of activations. saved_ratio: in relation to those of eager NHWC in the same dtype.
        fusion_alone: the speed of "fused" in relation to eager NHWC, both in the variant's dtype. Ratios are speedups,
        as in `NetworkSubject`.
        """
        x, labels = torch.randn(*self.shape, device=self.device), torch.randint(10, self.shape[:1], device=self.device)
        trained, skipped = self._variants(x, labels, progress)
        found: dict[str, dict[str, Any]] = {}
        exact = trained[BASE].gradients()
        for name, one in list(trained.items()):
            try:
                error = ((one.gradients() - exact).norm() / exact.norm()).item()
                found[name] = {"max_rel_error": error, "saved_mb": saved_bytes(one.model, one.loss).activations / 1e6}
            except Exception as problem:
                skipped[name] = why_missing(problem)
                del trained[name]
        for name in [name for name in trained if name.startswith("fused")]:
            limit = 4 * max(1e-4, found[f"eager NHWC {name.split()[-1]}"]["max_rel_error"])
            if not found[name]["max_rel_error"] <= limit:
                skipped[name] = f"its gradients are off by {found[name]['max_rel_error']:.3g}, {limit:.3g} is allowed"
                del trained[name]
        stats = interleaved(
            {name: one.step for name, one in trained.items()}, device=self.device, budget_s=budget_s, rounds=rounds,
            warmup=1, progress=lambda fraction, text: progress(0.5 + fraction / 2, text),
        )  # fmt: skip
        rows = {}
        for name, timed in stats.items():
            dtype = name.split()[-1]
            compiled, plain = stats.get(f"compile {dtype}"), found[f"eager NHWC {dtype}"]
            rows[name] = {
                **timed._asdict(),
                "ms": timed.median_us / 1e3,
                "images_per_s": len(x) / timed.median_us * 1e6,
                "ratio": stats[BASE].median_us / timed.median_us,
                "ratio_to_eager": stats[f"eager NHWC {dtype}"].median_us / timed.median_us,
                "ratio_to_compile": compiled.median_us / timed.median_us if compiled else None,
                "fusion_alone": _ratio(stats, f"eager NHWC {dtype}", f"fused {dtype}"),
                "saved_ratio": found[name]["saved_mb"] / plain["saved_mb"],
                **found[name],
            }
        return {"batch": len(x), "variants": rows, "skipped": skipped}

    def _variants(self, x: Tensor, labels: Tensor, progress: Progress) -> tuple[dict[str, Trained], dict[str, str]]:
        """By name, and why the others are missing."""
        plain = copy.deepcopy(self.model).train()
        found = {BASE: Trained(plain, x, labels, torch.float32)}
        skipped: dict[str, str] = {}
        nhwc = x.contiguous(memory_format=torch.channels_last)
        for index, dtype in enumerate(self.dtypes):
            short = short_name(dtype)
            for kind in ("eager NHWC", "fused", "fused, less kept", *(["compile"] if self.with_compile else [])):
                progress(index / len(self.dtypes) / 2, f"preparing {kind} {short}")
                model = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                try:
                    run = torch.compile(model) if kind == "compile" else None
                    model = convert.fuse(model) if kind.startswith("fused") else model
                    found[f"{kind} {short}"] = Trained(model, nhwc, labels, dtype, run, kind == "fused, less kept")
                    found[f"{kind} {short}"].loss()  # compiled here
                except Exception as error:  # whatever a compiler that is not ours raises
                    skipped[f"{kind} {short}"] = why_missing(error)
                    found.pop(f"{kind} {short}", None)
        return found, skipped
