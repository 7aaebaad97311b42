"""Every form of our convolution kernels once, in every dtype, against the reference.

python -m benchmarks.gpu_check.run_forms [--list] [--backend NAME] [--form NAME] [--dtype NAME]

A form is one of Triton's or one of csrc's tiles. Without a config `verify` runs the default, which is never a TMA form,
on problems too small for the largest tile. Prints a line per form; exit code 1 when one is wrong, raises or is missing.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, Iterator, NamedTuple

from benchmarks.gpu_check import run_configs
from benchmarks.gpu_check.budget import OURS
from fused_resnet import backends
from fused_resnet.operators.problem import ConvProblem, parsed_problem

DTYPES = ("float16", "bfloat16", "float32")
# Both kinds of window that the TMA forms have. On a GPU 13 tiles of 128x128, of which the last is not full
_PROBLEMS = {
    "cuda": ("2x256x28x28 -> 128, 3x3 p1 {} bias+add relu", "2x256x28x28 -> 128, 1x1 {} bias+add relu"),
    "cpu": ("2x32x6x6 -> 32, 3x3 p1 {} bias+add relu", "2x32x6x6 -> 32, 1x1 {} bias+add relu"),
}


class Form(NamedTuple):
    """A form with a problem that it computes and the first config that it is legal in."""

    backend: str
    form: str
    dtype: str
    problem: ConvProblem
    config: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.backend} {self.form} {self.dtype}"


def forms(device: str) -> Iterator[Form]:
    """What this device can run."""
    for name in OURS:
        backend = backends.known("conv_bn_act")[name]
        for dtype in DTYPES:
            seen = set()
            for text in _PROBLEMS[device]:
                problem = parsed_problem(text.format(dtype), device)
                if backend.configs is None or backend.configs.legal is None or backend.why_not(problem) is not None:
                    continue
                for config in backend.configs.legal(problem):
                    form = getattr(config, "form", None) or f"tile{config.tile}"
                    if form not in seen:
                        seen.add(form)
                        yield Form(name, form, dtype, problem, config._asdict())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check.run_forms", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--list", action="store_true", help="only say which there are, one a line")
    for name in ("backend", "form", "dtype"):
        parser.add_argument(f"--{name}", default=None, help="only this one")
    options = parser.parse_args()
    wanted = {name: value for name in ("backend", "form", "dtype") if (value := getattr(options, name)) is not None}
    chosen = [one for one in forms(options.device) if all(getattr(one, name) == wanted[name] for name in wanted)]
    if options.list:
        print("\n".join(map(str, chosen)))
        return 0
    outcomes = []
    for one in chosen:
        outcome, why = run_configs.run(one.problem, one.backend, one.config, options.device)
        outcomes.append(outcome)
        print(f"{outcome}: {one}: {one.config} {why}", flush=True)
    print(f"{outcomes.count('right')} of {len(outcomes)} right")
    return 0 if outcomes and set(outcomes) == {"right"} else 1


if __name__ == "__main__":
    sys.exit(main())
