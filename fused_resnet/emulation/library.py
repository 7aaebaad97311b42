"""fused_resnet/_ptx.so, loaded at first use."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from fused_resnet.emulation import interface
from fused_resnet.kernels import compiled

PATH = Path(__file__).parent.parent / "_ptx.so"
_BUILD = "pip install --no-build-isolation -e ."


def why_missing() -> str | None:
    """Why nothing can be emulated here, or None: there is no library, or it was built for another interface.

    That is read from its file, so that none of its code runs: a call with other structures may end the process.
    """
    if not PATH.exists():
        return (
            f"the PTX emulator is not built: {PATH} does not exist. "
            f"Install from a checkout with a C++17 compiler: {_BUILD}"
        )
    wanted, found = interface.digest(), compiled.embedded_digest(PATH, "interface of ptx")
    if found != wanted:
        return (
            f"the PTX emulator was built for another version of fused_resnet: {PATH} has the interface "
            f"{found or 'unknown'}, wanted {wanted}. Build it again: {_BUILD}"
        )
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """Raises ImportError, which says what to do, where the library was not built or is another version's."""
    if reason := why_missing():
        raise ImportError(reason)
    try:
        return interface.declare(ctypes.CDLL(str(PATH)))
    except OSError as error:
        raise ImportError(f"the PTX emulator cannot be loaded: {error}. Build it again: {_BUILD}") from error
