"""Locks that are free in a forked process, whoever held them: of that thread nothing is left there."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

_MADE: weakref.WeakSet[Any] = weakref.WeakSet()


def new_lock() -> threading.Lock:
    return _kept(threading.Lock())


def new_rlock() -> Any:
    return _kept(threading.RLock())


def _kept(lock: Any) -> Any:
    _MADE.add(lock)
    return lock


def _free_all() -> None:
    for lock in _MADE:
        lock._at_fork_reinit()  # as `logging` and `threading` free theirs


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_all)
