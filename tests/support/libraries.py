"""The compiled libraries, for tests that need them."""

from pathlib import Path

import pytest

import fused_resnet

PACKAGE = Path(fused_resnet.__file__).parent


def built(library: str) -> pytest.MarkDecorator:
    """Skip where csrc's library of this name ("cpu", "cuda") is not built."""
    path = PACKAGE / f"_C_{library}.so"
    return pytest.mark.skipif(not path.exists(), reason=f"{path.name} is not built")
