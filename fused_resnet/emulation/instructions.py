"""One statement of a kernel's body to an instruction with its operands."""

from __future__ import annotations

import re

from fused_resnet.emulation.entry import Entry, Instruction, Operand, Scope
from fused_resnet.emulation.interface import (
    IMMEDIATE,
    LABEL,
    MEMORY,
    PREDICATE,
    REGISTER,
    SINK,
    SPECIAL,
    SPECIAL_REGISTERS,
)
from fused_resnet.emulation.syntax import Statement, floating, integer, refuse, refuse_call, split_list

_ALIASES = {"clock64": "clock", "globaltimer": "clock", "clock_hi": "zero", "gridid": "zero"}
_GUARD = re.compile(r"@(!?)\s*([\w$%]+)\s+")
_OPCODE = re.compile(r"([A-Za-z][\w.:]*)\s*(.*)", re.S)
_ADDRESS = re.compile(r"([\w$%.]+)\s*(?:\+\s*(-?\w+)|(-\s*\w+))?")


class Instructions:
    """Reads statements once all labels and variables are known."""

    def __init__(self, entry: Entry):
        self.entry = entry
        self.cache: dict[tuple[int, str, bool], tuple[Operand, ...]] = {}

    def read(self, scope: Scope, statement: Statement) -> Instruction:
        rest, predicate, negated = statement.text, -1, False
        if guard := _GUARD.match(rest):
            found = scope.find("names", guard[2])
            if found is None or found.kind != PREDICATE:
                refuse(statement.line, statement.text, f"{guard[2]} is no predicate")
            predicate, negated, rest = found.index, bool(guard[1]), rest[guard.end() :]
        match = _OPCODE.fullmatch(rest)
        if match is None:
            refuse(statement.line, statement.text, "not understood as an instruction")
        op, words, name = match[1], split_list(match[2]), match[1].split(".", 1)[0]
        if name == "call":
            refuse_call(statement.line, statement.text, statement.text)
        target, operands = -1, []
        if name == "bra":
            target = self.label(scope, statement, words.pop(0))
        elif name == "brx":
            operands.append(self.table(scope, statement, words.pop()))
        operands[:0] = [self.operand(scope, statement, word, ".f64" in op) for word in words]
        return Instruction(
            op, predicate, negated, tuple(operands), target, statement.line, " ".join(statement.text.split())
        )

    def label(self, scope: Scope, statement: Statement, name: str) -> int:
        index = scope.find("labels", name)
        if index is None:
            refuse(statement.line, statement.text, f"no label {name} is to be seen from here")
        return index

    def table(self, scope: Scope, statement: Statement, name: str) -> tuple[Operand, ...]:
        labels = scope.find("tables", name)
        if labels is None:
            refuse(statement.line, statement.text, f"no branch targets {name} are to be seen from here")
        return tuple(Operand(LABEL, 0, self.label(scope, statement, label)) for label in labels)

    def operand(self, scope: Scope, statement: Statement, word: str, is_double: bool) -> tuple[Operand, ...]:
        key = (id(scope), word, is_double)
        if key not in self.cache:
            self.cache[key] = tuple(self.elements(scope, statement, word, is_double))
        return self.cache[key]

    def elements(self, scope: Scope, statement: Statement, word: str, is_double: bool) -> list[Operand]:
        def each(parts: list[str]) -> list[Operand]:
            return [one for part in parts for one in self.elements(scope, statement, part.strip(), is_double)]

        if word[:1] == "{" and word[-1:] == "}":
            return each(split_list(word[1:-1]))
        if word[:1] == "[" and word[-1:] == "]":
            address, *coordinates = split_list(word[1:-1])
            return [self.memory(scope, statement, address), *each(coordinates)]
        if "|" in word:
            return each(word.split("|"))
        return [self.scalar(scope, statement, word, is_double)]

    def scalar(self, scope: Scope, statement: Statement, word: str, is_double: bool) -> Operand:
        if word == "_":
            return Operand(SINK)
        found = scope.find("names", word.lstrip("!").strip())
        if found is not None:
            if word[0] == "!" and found.kind != PREDICATE:
                refuse(statement.line, statement.text, f"{word}: only a predicate can be negated")
            return Operand(PREDICATE, found.index, 1) if word[0] == "!" else found
        if word[:1] == "%":
            name = _ALIASES.get(word[1:], word[1:])
            if name in SPECIAL_REGISTERS:  # a block's dynamic shared memory is what is not static
                static = self.entry.static_shared_bytes if name == "dynamic_smem_size" else 0
                return Operand(SPECIAL, SPECIAL_REGISTERS.index(name), static)
        if word == "WARP_SZ":
            return Operand(IMMEDIATE, 0, 32)
        value = floating(word, is_double)
        value = integer(word) if value is None else value
        if value is None:
            refuse(statement.line, statement.text, f"unknown operand {word!r}")
        return Operand(IMMEDIATE, 0, value)

    def memory(self, scope: Scope, statement: Statement, word: str) -> Operand:
        match = _ADDRESS.fullmatch(word)
        offset = integer((match[2] or match[3] or "0").replace(" ", "")) if match else None
        if match is None or offset is None:
            refuse(statement.line, statement.text, f"unknown address {word!r}")
        found = scope.find("names", match[1])
        if found is None:
            value = integer(match[1])
            found = None if value is None else Operand(IMMEDIATE, 0, value)
        if found is None or found.kind not in (REGISTER, IMMEDIATE):
            refuse(statement.line, statement.text, f"unknown address {word!r}")
        if found.kind == REGISTER:
            return Operand(MEMORY, found.index, offset)
        return Operand(MEMORY, -1, found.value + offset)
