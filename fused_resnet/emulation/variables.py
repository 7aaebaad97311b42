"""Variables of a kernel's PTX: where each lies in its space (PTX ISA 5.1, 5.4)."""

from __future__ import annotations

import re

import numpy

from fused_resnet.emulation.entry import Entry, ModuleVariable, Operand, Scope
from fused_resnet.emulation.interface import IMMEDIATE, SHARED_BASE
from fused_resnet.emulation.syntax import TYPE_BYTES, Statement, align, floating, integer, refuse, split_list

_VARIABLE = re.compile(
    r"(?P<words>(?:\.(?:visible|weak|extern|common)\s+)*)\.(?P<space>shared|global|const|local)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?(?:\.v(?P<vector>[24])\s+)?\.(?P<type>\w+)\s+"
    r"(?P<name>[\w$%]+)\s*(?P<counts>(?:\[\s*\d*\s*\]\s*)*)(?:=\s*(?P<value>.*))?",
    re.S,
)


class Variables:
    """Gives each variable its place. shared_shift: bytes before dynamic shared memory, at least."""

    def __init__(self, entry: Entry, shared_shift: int):
        self.entry, self.shared_shift = entry, shared_shift
        self.dynamic: list[tuple[Scope, str, int]] = []  # .extern .shared ones: scope, name, alignment

    def declare(self, scope: Scope, statement: Statement, match: re.Match) -> None:
        """match: of `matched`. A .global or .const variable is for the scope of the module alone."""
        if match["space"] == "shared":
            self.shared(scope, statement, match)
        elif match["space"] == "local":
            self.local(scope, match)
        elif "extern" in match["words"]:
            refuse(statement.line, statement.text, "a variable of another module")
        else:
            self.of_host(scope, statement, match)

    @staticmethod
    def matched(statement: Statement) -> re.Match:
        match = _VARIABLE.fullmatch(statement.text)
        if match is None:
            refuse(statement.line, statement.text, "not understood as a variable")
        if not TYPE_BYTES.get(match["type"]):
            refuse(statement.line, statement.text, f"a variable of type .{match['type']}")
        return match

    @staticmethod
    def layout(match: re.Match) -> tuple[int, int, int]:
        """(bytes of an element, elements, alignment). An array without a size has as many as its initialiser."""
        one = TYPE_BYTES[match["type"]]
        width = int(match["vector"] or 1)
        count = width
        for size in re.findall(r"\[\s*(\d*)\s*\]", match["counts"]):
            count *= int(size) if size else 0
        return one, count, int(match["align"] or one * width)

    def shared(self, scope: Scope, statement: Statement, match: re.Match) -> None:
        one, count, alignment = self.layout(match)
        if match["value"] is not None:
            refuse(statement.line, statement.text, "shared memory has no initial value")
        if "extern" in match["words"]:
            self.dynamic.append((scope, match["name"], alignment))
            return
        if count == 0:
            refuse(statement.line, statement.text, "a shared variable of no size that is not .extern")
        begin = align(self.entry.static_shared_bytes, alignment)
        scope.names[match["name"]] = Operand(IMMEDIATE, 0, SHARED_BASE + begin)
        self.entry.static_shared_bytes = begin + one * count

    def place_dynamic(self) -> None:
        """Behind what is static; all dynamic variables begin at the same address (PTX ISA 5.1.7)."""
        if not self.dynamic:
            return
        alignment = self.entry.dynamic_alignment = max(each for _, _, each in self.dynamic)
        self.entry.static_shared_bytes = align(self.entry.static_shared_bytes + self.shared_shift, alignment)
        for scope, name, _ in self.dynamic:
            scope.names[name] = Operand(IMMEDIATE, 0, SHARED_BASE + self.entry.static_shared_bytes)

    def local(self, scope: Scope, match: re.Match) -> None:
        one, count, alignment = self.layout(match)
        begin = align(self.entry.local_bytes, alignment)
        scope.names[match["name"]] = Operand(IMMEDIATE, 0, begin)
        self.entry.local_bytes = begin + one * count

    def of_host(self, scope: Scope, statement: Statement, match: re.Match) -> None:
        one, count, alignment = self.layout(match)
        values = self.initialiser(statement, match)
        count = count or len(values)
        if count == 0 or len(values) > count:
            refuse(statement.line, statement.text, f"{len(values)} values for a variable of {count}")
        data = b"".join(value.to_bytes(one, "little") for value in values).ljust(one * count, b"\0")
        room = numpy.zeros(len(data) + alignment, numpy.uint8)
        begin = -room.ctypes.data % alignment
        memory = room[begin : begin + len(data)]
        memory[:] = numpy.frombuffer(data, numpy.uint8)
        self.entry.variables.append(ModuleVariable(match["name"], memory, match["space"] == "global"))
        scope.names[match["name"]] = Operand(IMMEDIATE, 0, memory.ctypes.data)

    def initialiser(self, statement: Statement, match: re.Match) -> list[int]:
        """The values as unsigned numbers of the element's size (PTX ISA 5.4.4)."""
        text = match["value"]
        if text is None:
            return []
        if match["counts"].count("[") > 1:
            refuse(statement.line, statement.text, "an initialiser of an array of several dimensions")
        bits, is_double = 8 * TYPE_BYTES[match["type"]], match["type"] == "f64"
        values = []
        for word in split_list(text.strip().strip("{}")):
            number = integer(word)
            if number is None or match["type"].startswith("f"):
                number = floating(word if "." in word or word[:1] == "0" else f"{word}.", is_double)
            if number is None:
                refuse(statement.line, statement.text, f"{word!r} is not understood as a value")
            values.append(number & ((1 << bits) - 1))
        return values
