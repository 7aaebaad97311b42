"""A backend with the faults that the environment names: importable, so that a child process has it.

BROKEN: by channels of x, as in "32:wrong,48:hangs". It is "wrong" by one column, "crashes", "hangs", "keeps" values
from call to call, or "skips" its last row. Elsewhere it is right.
"""

import os
import signal
import time

import torch

from fused_resnet import backends
from fused_resnet.backends.record import REGISTRY

EAGER = backends.known("conv_bn_act")["eager"]
calls = []
_kept = []


def run(problem, operands):
    calls.append(problem)
    out = EAGER.run(problem, operands)
    broken = dict(one.split(":") for one in os.environ.get("BROKEN", "").split(",") if one).get(str(problem.C))
    if broken == "wrong":
        out[..., -1] = out[..., -2]
    elif broken == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif broken == "hangs":
        time.sleep(1000)
    elif broken == "keeps":
        _kept.append(out)
        out = out + 0 * _kept[0]
    elif broken == "skips":
        skipped = torch.empty_like(out)
        skipped[:, :, :-1] = out[:, :, :-1]
        return skipped
    return out


BACKEND = backends.Backend("broken", lambda problem: None if problem.device == "cpu" else "it runs on the CPU", run)
if "FUSED_RESNET_TESTS_IN_PARENT" not in os.environ:  # in a child
    REGISTRY["conv_bn_act"]["broken"] = BACKEND
