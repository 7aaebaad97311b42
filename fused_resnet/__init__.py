"""Residual networks that touch memory as rarely as the arithmetic allows.

fuse(model) for training and editing, freeze(model, example_input) for serving, functional and nn for building;
explain(model, example_input) says who computes what, and why. agreement(model, fast, loader) compares their answers.
"""

# under their own name: what docs/api.md has for those who extend it
from fused_resnet import backends as backends
from fused_resnet import choosing as choosing
from fused_resnet import functional, models, nn
from fused_resnet import measuring as timing  # noqa: F401
from fused_resnet import testing as testing
from fused_resnet.backends import BackendError
from fused_resnet.explaining.explain import explain
from fused_resnet.freezing.freeze import freeze
from fused_resnet.fusing import adapters as adapters
from fused_resnet.fusing import convert as convert
from fused_resnet.fusing.convert import fuse, unfuse
from fused_resnet.fusing.warm_up import warm_up
from fused_resnet.measuring.agreement import agreement
from fused_resnet.operators import reference as reference
from fused_resnet.training import recompute_inputs

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "agreement",
    "explain",
    "freeze",
    "functional",
    "fuse",
    "models",
    "nn",
    "recompute_inputs",
    "unfuse",
    "warm_up",
    "__version__",
]
