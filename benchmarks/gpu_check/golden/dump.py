"""The file of a GPU's outputs: read, gone on with, written."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any, Optional, Sequence

from benchmarks.gpu_check.golden.driver import Driver, DriverError
from benchmarks.gpu_check.golden.inputs import drawn
from benchmarks.gpu_check.golden.kernels import Golden
from fused_resnet.measuring import Record


def make(kernels: Sequence[Golden], driver: Driver, file: Path, record: Record) -> bool:
    """Run what the file does not hold yet. False where a kernel has ended the context, and a new process goes on.

    Each kernel runs twice, since what is not the same twice proves nothing.
    """
    found = _read(file, record.device)
    for kernel in kernels:
        if kernel.gpu > driver.capability or (kernel.gpu == 90 and driver.capability >= 100):
            continue
        if found.get(kernel.name, {}).get("digest") == kernel.digest:
            continue
        goes_on = True
        try:
            given = drawn(kernel.name, kernel.inputs)
            outputs = [driver.run(kernel, given) for _ in range(2)]
            answer = {"outputs": packed(outputs[0])} if outputs[0] == outputs[1] else {"why": "it differs from itself"}
        except DriverError as error:
            answer, goes_on = {"why": str(error)}, not error.costs_context
        found[kernel.name] = {"digest": kernel.digest, **answer}
        if "why" in answer:
            print(f"{kernel.name}: {answer['why']}", flush=True)
        if not goes_on:
            _write(file, record, driver, found)
            return False
    _write(file, record, driver, found)
    return True


def packed(outputs: bytes) -> str:
    return base64.b64encode(zlib.compress(outputs, 9)).decode()


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def outputs_of(answers: dict[str, dict[str, str]], kernel: Golden) -> tuple[Optional[bytes], str]:
    """(what the GPU left of a kernel's output, "" or why there is nothing to compare with)."""
    answer = answers.get(kernel.name, {})
    if answer.get("digest") != kernel.digest:
        return None, "the kernel is newer than the dump" if answer else "the dump has none of this kernel"
    return (unpacked(answer["outputs"]), "") if "outputs" in answer else (None, f"the GPU: {answer['why']}")


def _read(file: Path, device: str) -> dict[str, dict[str, str]]:
    try:
        record = Record.from_json(json.loads(file.read_text()))
        return dict(record.more["answers"]) if record.device == device else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(file: Path, record: Record, driver: Driver, answers: dict[str, Any]) -> None:
    record._replace(more={"capability": driver.capability, "answers": answers}).write(file)
