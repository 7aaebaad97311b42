"""Files that outlive a process: where they lie, written whole, read without trust.

Measurements and downloaded weights are kept in one folder per user: platformdirs' cache folder for fused_resnet, or
the one that the environment variable FUSED_RESNET_CACHE_DIR names. Writers hold a lock (`<file>.lock`) and replace
whole files, so that processes may write at once and readers need no lock. A file that cannot be read or understood
costs one warning and counts as absent.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Callable, Optional

from fused_resnet.machine.errors import one_line

# A writer holds the lock while it replaces one small file; who waits longer than this waits for a broken file system.
_LOCK_TIMEOUT_S = 60.0

log = logging.getLogger("fused_resnet")


def cache_dir() -> Path:
    """The user's folder for what is kept, which need not exist yet."""
    if chosen := os.environ.get("FUSED_RESNET_CACHE_DIR"):
        return Path(os.path.expanduser(chosen))  # which leaves an unknown user's ~ as it is
    import platformdirs

    return platformdirs.user_cache_path("fused_resnet", appauthor=False)


def write_json(path: Path, record: Any) -> Path:
    """Write a record as JSON, whole or not at all: an interrupted call leaves what was there before.

    Raises OSError where the folder cannot be written to, ValueError for a NaN or an infinity.
    """
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())
    return Path(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file for what `path` is to hold. It takes the old one's place when the block ends, at once and whole.

    It is on the disk by then, so neither a kill nor a power cut leaves half a file. A kill leaves `<path>*.part`.
    Raises OSError where the folder cannot be written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if os.name == "posix":  # the name, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_json(path: Path, understood: Callable[[Any], Any]) -> Optional[Any]:
    """What `understood` makes of a JSON file; None without a file, and after one warning for a bad one.

    understood: takes the parsed document and returns what is needed of it. The document is not one of ours where that
    raises ValueError, TypeError, KeyError, AttributeError or OverflowError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        report_once(f"{path} cannot be read and is ignored ({one_line(error)}).")
        return None
    try:
        return understood(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        report_once(f"{path} is not a file that this fused_resnet can use, and is ignored ({one_line(error)}).")
        return None


@contextlib.contextmanager
def locked(path: Path, timeout_s: float = _LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the lock beside `path`, whose folder is made. Raises OSError where that is impossible or takes too long."""
    import filelock

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock", timeout=timeout_s):  # its Timeout is an OSError
        yield


@functools.lru_cache(maxsize=None)
def report_once(message: str) -> None:
    """Log a warning, the first time in this process that it is given."""
    log.warning("%s", message)
