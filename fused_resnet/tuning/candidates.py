"""The candidates for a convolution: every backend with each config that arithmetic leaves in the race."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

from fused_resnet import backends, measuring
from fused_resnet.kernels.triton.conv import configs as conv_configs
from fused_resnet.kernels.triton.conv import cost
from fused_resnet.operators.problem import ConvProblem

_HOPELESS = 3.0  # times the least estimate: above it a config is not measured
_MOST_CONFIGS = 12  # of one backend, by estimate


class Candidate(NamedTuple):
    """A backend and one of its configs, None for a default that is the same inside plans and outside."""

    backend: backends.Backend
    config: Optional[Any]

    @property
    def reads_row_space(self) -> bool:
        return self.backend.reads_row_space(self.config)

    def __str__(self) -> str:
        if self.config is None:
            return self.backend.name
        return f"{self.backend.name} {' '.join(f'{key}={value}' for key, value in self.config._asdict().items())}"


def candidates(problem: ConvProblem) -> tuple[list[Candidate], dict[str, str]]:
    """(what is worth measuring, the fixed order's choice first; why the other backends cannot run the problem)."""
    first = backends.fixed_order(problem, in_plan=True).backend
    found = {Candidate(first, _default(problem, first)): None}
    skipped = measuring.why_not_timed(problem)
    for name, backend in backends.known(problem.op).items():
        if name not in skipped:
            configs = [_default(problem, backend), *promising(problem, backend)]
            found.update(dict.fromkeys(Candidate(backend, config) for config in configs))
    return list(found), skipped


def _default(problem: ConvProblem, backend: backends.Backend) -> Optional[Any]:
    configs = backend.configs
    return None if configs is None or configs.default is None else configs.default(problem)


def promising(problem: ConvProblem, backend: backends.Backend) -> list[Any]:
    """The configs of a backend that may win, the likeliest first where it estimates them."""
    configs = list(backend.configs.worth(problem)) if backend.configs else []
    if backend.configs is None or backend.configs.estimated_us is None:
        return configs
    return _likeliest({config: backend.configs.estimated_us(problem, config) for config in configs})


def promising_on(problem: ConvProblem, arch: int) -> list[Any]:
    """Triton's configs that may win on an architecture, which need not be here."""
    configs = conv_configs.configs(problem, arch)
    return _likeliest({config: cost.estimated_us(problem, config, arch) for config in configs})


def _likeliest(estimates: dict[Any, float]) -> list[Any]:
    limit = _HOPELESS * min(estimates.values(), default=0.0)
    return [config for config in sorted(estimates, key=estimates.__getitem__) if estimates[config] <= limit][
        :_MOST_CONFIGS
    ]
