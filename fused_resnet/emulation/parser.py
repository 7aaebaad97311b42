"""PTX text to the instructions, parameters and variables of one kernel.

What is not known here is refused, with its line. Which opcodes exist is csrc/ptx's to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import numpy

from fused_resnet.emulation.syntax import (
    TYPE_BYTES,
    PtxError,
    Source,
    Statement,
    align,
    floating,
    integer,
    refuse,
    split_list,
)

# As in csrc/ptx/program.h: OperandKind, and the order of SpecialRegister.
NONE, REGISTER, PREDICATE, IMMEDIATE, SPECIAL, SINK, LABEL, MEMORY = range(8)
SPECIAL_REGISTERS = (
    "tid.x tid.y tid.z ntid.x ntid.y ntid.z ctaid.x ctaid.y ctaid.z nctaid.x nctaid.y nctaid.z laneid warpid "
    "lanemask_lt lanemask_le lanemask_gt lanemask_ge lanemask_eq clock smid "
    "cluster_ctaid.x cluster_ctaid.y cluster_ctaid.z cluster_nctaid.x cluster_nctaid.y cluster_nctaid.z "
    "cluster_ctarank cluster_nctarank clusterid.x clusterid.y clusterid.z nclusterid.x nclusterid.y nclusterid.z "
    "dynamic_smem_size total_smem_size nwarpid zero"
).split()
_ALIASES = {"clock64": "clock", "globaltimer": "clock", "clock_hi": "zero", "gridid": "zero"}
SHARED_BASE = 1024  # as in csrc/ptx/machine/machine.h

_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_HEAD_WORDS = re.compile(r"(?:\.(?:visible|weak|extern|common)\s+)*\.(\w+)")
_VARIABLE = re.compile(
    r"(?P<words>(?:\.(?:visible|weak|extern|common)\s+)*)\.(?P<space>shared|global|const|local)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?(?:\.v(?P<vector>[24])\s+)?\.(?P<type>\w+)\s+"
    r"(?P<name>[\w$%]+)\s*(?P<counts>(?:\[\s*\d*\s*\]\s*)*)(?:=\s*(?P<value>.*))?",
    re.S,
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr\s+(?:\.(?:global|shared|const|local|param)\s+)?(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[\w$%]+)\s*(?:\[\s*(?P<count>\d+)\s*\])?"
)
_GUARD = re.compile(r"@(!?)\s*([\w$%]+)\s+")
_OPCODE = re.compile(r"([A-Za-z][\w.:]*)\s*(.*)", re.S)
_ADDRESS = re.compile(r"([\w$%.]+)\s*(?:\+\s*(-?\w+)|(-\s*\w+))?")
_REGISTERS = re.compile(r"([\w$%]+)\s*(?:<\s*(\d+)\s*>)?")


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
    num_predicates: int = 0
    local_bytes: int = 0
    static_shared_bytes: int = 0
    variables: list[ModuleVariable] = field(default_factory=list)
    required_block: Optional[tuple[int, int, int]] = None
    most_threads: int = 1024
    required_cluster: Optional[tuple[int, int, int]] = None


class _Scope:
    """Names and labels between two braces; what is not known here is asked of the scope around it (PTX ISA 4.4)."""

    def __init__(self, parent: Optional[_Scope] = None):
        self.parent = parent
        self.names: dict[str, Operand] = {}
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}

    def find(self, kind: str, name: str):
        scope: Optional[_Scope] = self
        while scope is not None:
            if name in getattr(scope, kind):
                return getattr(scope, kind)[name]
            scope = scope.parent
        return None


def kernel_names(text: str) -> list[str]:
    return _ENTRY.findall(Source(text).text)


def parse(text: str, name: Optional[str] = None, shared_shift: int = 0) -> Entry:
    """The kernel of this name. None: the only one. shared_shift: bytes before dynamic shared memory, at least."""
    source = Source(text)
    names = _ENTRY.findall(source.text)
    if name is None and len(names) != 1:
        raise PtxError(f"the PTX has {len(names)} kernels, name one of them: {', '.join(names) or 'none'}")
    if name is not None and name not in names:
        raise PtxError(f"the PTX has no kernel {name!r}; it has {', '.join(names) or 'none'}")
    return _Parser(source, name or names[0], shared_shift).parse()


class _Parser:
    def __init__(self, source: Source, name: str, shared_shift: int):
        self.source, self.entry, self.module = source, Entry(name), _Scope()
        self.shared_shift = shared_shift
        self.dynamic: list[tuple[_Scope, str, int]] = []  # .extern .shared variables: scope, name, alignment
        self.pending: list[tuple[_Scope, Statement]] = []  # instructions, until all labels and variables are known
        self.cache: dict[tuple[int, str, bool], tuple[Operand, ...]] = {}

    def parse(self) -> Entry:
        head, body = self.find_entry()
        self.read_module(self.source.text[body : self.source.end_of_block(body)])
        self.read_head(head, body)
        self.read_body(body)
        self.place_dynamic_shared()
        for scope, statement in self.pending:
            self.entry.instructions.append(self.instruction(scope, statement))
        return self.entry

    # ------------------------------------------------------------------------------------------------------- module

    def find_entry(self) -> tuple[int, int]:
        """Where the kernel's head begins, behind its name, and where its body does."""
        for match in _ENTRY.finditer(self.source.text):
            if match[1] == self.entry.name:
                body = self.source.text.find("{", match.end())
                if body < 0:
                    refuse(self.source.line(match.start()), match[0], "a kernel without a body")
                return match.end(), body
        raise AssertionError("the caller has looked for it")

    def read_module(self, body: str) -> None:
        """Directives outside of kernels. A shared variable takes room only if `body` names it."""
        text, position = self.source.text, self.source.skip_blank(0)
        while position < len(text):
            word = _HEAD_WORDS.match(text, position)
            line = self.source.line(position)
            if word is None:
                refuse(line, text[position : position + 60], "unknown at the level of the module")
            end = self.directive(word[1], position, line, body)
            position = self.source.skip_blank(end)

    def directive(self, word: str, position: int, line: int, body: str) -> int:
        """One of the module's; returns where it ends."""
        text = self.source.text
        if word == "entry":
            return self.source.end_of_block(text.index("{", position))
        if word == "section":
            return self.source.end_of_block(text.index("{", position))
        if word in ("version", "target", "address_size", "file", "loc"):
            statement = next(self.source.statements(position, len(text))).text
            self.read_line_directive(word, statement, line)
            return position + len(statement)
        if word == "func":
            return self.skip_declared_function(position, line)
        end = text.find(";", position)
        statement = text[position : end if end >= 0 else len(text)]
        if end < 0 or word not in ("shared", "global", "const", "pragma"):
            refuse(line, statement, "unknown at the level of the module")
        if word != "pragma":
            self.module_variable(Statement(";", statement, line), body)
        return end + 1

    def read_line_directive(self, word: str, statement: str, line: int) -> None:
        if word == "target":
            self.entry.target = split_list(statement.split(None, 1)[1])[0]
        elif word == "address_size" and statement.split()[1] != "64":
            refuse(line, statement, "only addresses of 64 bits are known")

    def skip_declared_function(self, position: int, line: int) -> int:
        """A declaration is no harm, since `call` is refused; a body would be."""
        text = self.source.text
        semicolon, brace = text.find(";", position), text.find("{", position)
        if semicolon < 0 or 0 <= brace < semicolon:
            refuse(line, text[position:brace], "device functions are not modelled, have the compiler inline them")
        return semicolon + 1

    def module_variable(self, statement: Statement, body: str) -> None:
        match = self.variable(statement)
        if re.search(rf"(?<![\w$%]){re.escape(match['name'])}(?![\w$])", body) is None:
            return
        if match["space"] == "shared":
            self.shared_variable(self.module, statement, match)
        elif "extern" in match["words"]:
            refuse(statement.line, statement.text, "a variable of another module")
        else:
            self.host_variable(statement, match)

    # ---------------------------------------------------------------------------------------------------- variables

    def variable(self, statement: Statement) -> re.Match:
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

    def shared_variable(self, scope: _Scope, statement: Statement, match: re.Match) -> None:
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

    def place_dynamic_shared(self) -> None:
        """Behind what is static; all dynamic variables begin at the same address (PTX ISA 5.1.7)."""
        if not self.dynamic:
            return
        alignment = max(each for _, _, each in self.dynamic)
        self.entry.static_shared_bytes = align(self.entry.static_shared_bytes + self.shared_shift, alignment)
        for scope, name, _ in self.dynamic:
            scope.names[name] = Operand(IMMEDIATE, 0, SHARED_BASE + self.entry.static_shared_bytes)

    def local_variable(self, scope: _Scope, match: re.Match) -> None:
        one, count, alignment = self.layout(match)
        begin = align(self.entry.local_bytes, alignment)
        scope.names[match["name"]] = Operand(IMMEDIATE, 0, begin)
        self.entry.local_bytes = begin + one * count

    def host_variable(self, statement: Statement, match: re.Match) -> None:
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
        self.module.names[match["name"]] = Operand(IMMEDIATE, 0, memory.ctypes.data)

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

    # --------------------------------------------------------------------------------------------------------- head

    def read_head(self, begin: int, body: int) -> None:
        text, line = self.source.text[begin:body].strip(), self.source.line(begin)
        directives = text
        if text.startswith("("):
            parameters, directives = text[1:].split(")", 1)
            self.parameters(parameters, line)
        while directives := directives.strip():
            match = re.match(r"\.(\w+)\s*((?:\d+\s*,\s*)*\d+)?", directives)
            if match is None or not self.head_directive(match[1], match[2]):
                refuse(line, directives, "unknown in a kernel's head")
            directives = directives[match.end() :]

    def parameters(self, text: str, line: int) -> None:
        offset = 0
        for declaration in split_list(text):
            match = _PARAMETER.fullmatch(declaration)
            if match is None or not TYPE_BYTES.get(match["type"]):
                refuse(line, declaration, "not understood as a parameter")
            one = TYPE_BYTES[match["type"]]
            size = one * int(match["count"] or 1)
            offset = align(offset, int(match["align"] or one))
            self.entry.parameters.append(
                Parameter(match["name"], match["type"], offset, size, match["count"] is not None)
            )
            self.module.names[match["name"]] = Operand(IMMEDIATE, 0, offset)
            offset += size
        self.entry.parameter_bytes = offset

    def head_directive(self, word: str, numbers: Optional[str]) -> bool:
        sizes = [int(number) for number in (numbers or "").split(",") if number.strip()]
        x, y, z = ([*sizes, 1, 1, 1])[:3]
        if word == "reqntid":
            self.entry.required_block = (x, y, z)
        elif word == "maxntid":
            self.entry.most_threads = x * y * z
        elif word == "reqnctapercluster":
            self.entry.required_cluster = (x, y, z)
        else:  # hints to ptxas about registers and occupancy, and a limit that the launch checks again
            return word in ("minnctapersm", "maxnreg", "maxclusterrank", "explicitcluster", "noreturn")
        return True

    # --------------------------------------------------------------------------------------------------------- body

    def read_body(self, begin: int) -> None:
        """Declarations and labels now; instructions later, since they name what comes after them."""
        scope, table = self.module, None
        for statement in self.source.statements(begin, self.source.end_of_block(begin)):
            if statement.kind == "{":
                scope = _Scope(scope)
            elif statement.kind == "}":
                scope = scope.parent or scope
            elif statement.kind == "label":
                scope.labels[statement.text] = len(self.pending)
                table = statement.text
                continue
            elif statement.kind == "line":
                pass
            elif statement.text.startswith("."):
                self.declaration(scope, statement, table)
            elif statement.text:
                self.pending.append((scope, statement))
            table = None

    def declaration(self, scope: _Scope, statement: Statement, label: Optional[str]) -> None:
        word = _HEAD_WORDS.match(statement.text)
        kind = word[1] if word else ""
        if kind == "reg":
            self.registers(scope, statement)
        elif kind in ("shared", "local", "global", "const"):
            match = self.variable(statement)
            if kind == "shared":
                self.shared_variable(scope, statement, match)
            elif kind == "local":
                self.local_variable(scope, match)
            else:
                refuse(statement.line, statement.text, f"a .{kind} variable within a kernel")
        elif kind == "branchtargets" and label:
            scope.tables[label] = split_list(statement.text.split(None, 1)[1])
        elif kind != "pragma":
            why = "device calls are not modelled" if kind in ("param", "callprototype") else "unknown directive"
            refuse(statement.line, statement.text, why)

    def registers(self, scope: _Scope, statement: Statement) -> None:
        match = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", statement.text, re.S)
        if match is None or match[1] not in TYPE_BYTES:
            refuse(statement.line, statement.text, "registers of a type that is unknown here")
        for item in split_list(match[2]):
            many = _REGISTERS.fullmatch(item)
            if many is None:
                refuse(statement.line, statement.text, f"{item!r} is not understood as a register")
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many[2] else [many[1]]
            for name in names:
                scope.names[name] = self.new_register(match[1] == "pred")

    def new_register(self, is_predicate: bool) -> Operand:
        if is_predicate:
            self.entry.num_predicates += 1
            return Operand(PREDICATE, self.entry.num_predicates - 1)
        self.entry.num_registers += 1
        return Operand(REGISTER, self.entry.num_registers - 1)

    # ------------------------------------------------------------------------------------------------- instructions

    def instruction(self, scope: _Scope, statement: Statement) -> Instruction:
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
            refuse(statement.line, statement.text, "device calls are not modelled, have the compiler inline them")
        target, operands = -1, []
        if name == "bra":
            target = self.label(scope, statement, words.pop(0))
        elif name == "brx":
            operands.append(self.table(scope, statement, words.pop()))
        operands[:0] = [self.operand(scope, statement, word, ".f64" in op) for word in words]
        return Instruction(
            op, predicate, negated, tuple(operands), target, statement.line, " ".join(statement.text.split())
        )

    def label(self, scope: _Scope, statement: Statement, name: str) -> int:
        index = scope.find("labels", name)
        if index is None:
            refuse(statement.line, statement.text, f"no label {name} is to be seen from here")
        return index

    def table(self, scope: _Scope, statement: Statement, name: str) -> tuple[Operand, ...]:
        labels = scope.find("tables", name)
        if labels is None:
            refuse(statement.line, statement.text, f"no branch targets {name} are to be seen from here")
        return tuple(Operand(LABEL, 0, self.label(scope, statement, label)) for label in labels)

    def operand(self, scope: _Scope, statement: Statement, word: str, is_double: bool) -> tuple[Operand, ...]:
        key = (id(scope), word, is_double)
        if key not in self.cache:
            self.cache[key] = tuple(self.elements(scope, statement, word, is_double))
        return self.cache[key]

    def elements(self, scope: _Scope, statement: Statement, word: str, is_double: bool) -> list[Operand]:
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

    def scalar(self, scope: _Scope, statement: Statement, word: str, is_double: bool) -> Operand:
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

    def memory(self, scope: _Scope, statement: Statement, word: str) -> Operand:
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
