"""Narrower processors, as far as variables make them."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fused_resnet import extension

ROOT = Path(__file__).resolve().parents[1]
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "FUSED_RESNET_CPU_ISA", "ATEN_CPU_CAPABILITY")
UNLIMITED = {name: value for name, value in os.environ.items() if name not in LIMITS}
NEEDS_LIBRARY = pytest.mark.skipif(extension.load("cpu") is not None, reason=str(extension.load("cpu")))


def processor_flags() -> set[str]:
    with contextlib.suppress(OSError):
        return set(re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    return set()


def widest_kernels() -> str:
    """What the C++ kernels use on this processor where nothing limits them."""
    wanted = {"avx512": {"avx512f", "avx512bw", "avx512vl"}, "avx2": {"avx2", "fma"}, "portable": set()}
    return next(name for name, flags in wanted.items() if flags <= processor_flags())


# ------------------------------------------------------------------------------------------- the C++ kernels' own limit

# One process a case, forked before the library is loaded. Only the instructions keep a NaN's payload when they round it
# to float16, so its bits show what really ran.
CHOOSE = """
import json, os, sys, torch
import fused_resnet
from fused_resnet import extension
for variables in json.loads(sys.argv[1]):
    if os.fork() == 0:
        os.environ.update(variables)
        print(json.dumps(variables), flush=True, file=sys.stderr)
        assert extension.load("cpu") is None
        nan, out = torch.full((8,), 0x7E55, dtype=torch.int16).view(torch.half), torch.empty(8, dtype=torch.half)
        torch.ops.fused_resnet.cpu_add_relu(nan, nan, out)
        bits = [hex(bits) for bits in set(out.view(torch.int16).tolist())]
        print(json.dumps([*extension.instruction_set().values(), *bits]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
OWN, ATEN = "FUSED_RESNET_CPU_ISA", "ATEN_CPU_CAPABILITY"
ORDER = ("portable", "avx2", "avx512")
CHOICES = [
    ({}, "avx512", None),
    ({OWN: ""}, "avx512", None),
    ({OWN: "portable"}, "portable", OWN),
    ({OWN: "avx2"}, "avx2", OWN),
    ({OWN: "avx512"}, "avx512", OWN),
    ({ATEN: "default"}, "portable", ATEN),
    ({ATEN: "avx2"}, "avx2", ATEN),
    ({ATEN: "avx512"}, "avx512", ATEN),
    ({ATEN: "avx2", OWN: "avx512"}, "avx512", OWN),
    ({ATEN: "avx2", OWN: "portable"}, "portable", OWN),
    ({ATEN: "avx2", OWN: "AVX512"}, "avx2", ATEN),
]


@NEEDS_LIBRARY
def test_variables_choose_the_kernels_instructions():
    """Ours decides where it names a set, else torch's; neither goes beyond the processor."""
    command = [sys.executable, "-c", CHOOSE, json.dumps([variables for variables, _, _ in CHOICES])]
    env = {**UNLIMITED, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    for (variables, allowed, limited_by), line in zip(CHOICES, done.stdout.splitlines(), strict=True):
        name, why, *bits = json.loads(line)
        assert name == min(allowed, widest_kernels(), key=ORDER.index), variables
        is_limited = ORDER.index(allowed) < ORDER.index(widest_kernels())
        widest = "this processor and the kernels have no wider ones"
        assert why == (f"{limited_by}={variables[limited_by]}" if is_limited else widest), variables
        if "f16c" in processor_flags():
            assert bits == ["0x7e00" if name == "portable" else "0x7e55"], variables
    assert [line for line in done.stderr.splitlines() if "ignored" in line] == [
        f"{OWN}=AVX512 is ignored: it may be one of portable, avx2, avx512"
    ]
