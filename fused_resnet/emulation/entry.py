"""What the parser makes of a kernel: its instructions, parameters and variables, and the names that are to be seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import numpy


class Operand(NamedTuple):
    """As PtxOperand in csrc/ptx/interface.h."""

    kind: int
    index: int = 0  # type: ignore[assignment]
    value: int = 0


class Instruction(NamedTuple):
    """An operand is a tuple of elements: one, or a vector's, or the halves of `p|q`, or an address and coordinates."""

    op: str
    predicate: int  # the guard, or -1
    negated: bool
    operands: tuple[tuple[Operand, ...], ...]
    target: int  # of a branch: an instruction's index, or -1
    line: int
    text: str


class Parameter(NamedTuple):
    name: str
    type: str
    offset: int
    size: int
    is_array: bool


class ModuleVariable(NamedTuple):
    """A `.global` or `.const` variable and the host's memory it lies in."""

    name: str
    memory: numpy.ndarray
    writable: bool


@dataclass
class Entry:
    """One kernel. Sizes are in bytes; `required_block` and `required_cluster` are what the directives fix."""

    name: str
    target: str = ""
    parameters: list[Parameter] = field(default_factory=list)
    parameter_bytes: int = 0
    instructions: list[Instruction] = field(default_factory=list)
    num_registers: int = 0
    register_bits: list[int] = field(default_factory=list)
    num_predicates: int = 0
    local_bytes: int = 0
    static_shared_bytes: int = 0
    dynamic_alignment: int = 0  # of dynamic shared memory; 0: there is none
    variables: list[ModuleVariable] = field(default_factory=list)
    required_block: Optional[tuple[int, int, int]] = None
    most_threads: int = 1024
    required_cluster: Optional[tuple[int, int, int]] = None
    most_registers: int = 0  # of a thread, by .maxnreg; 0: not said
    fewest_blocks: int = 0  # of a multiprocessor, by .minnctapersm; 0: not said


class Scope:
    """Names and labels between two braces; what is not known here is asked of the scope around it (PTX ISA 4.4)."""

    def __init__(self, parent: Optional[Scope] = None):
        self.parent = parent
        self.names: dict[str, Operand] = {}
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}

    def find(self, kind: str, name: str):
        scope: Optional[Scope] = self
        while scope is not None:
            if name in getattr(scope, kind):
                return getattr(scope, kind)[name]
            scope = scope.parent
        return None
