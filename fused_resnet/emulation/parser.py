"""PTX text to the instructions, parameters and variables of one kernel.

What is not known here is refused, with its line. Which opcodes exist is csrc/ptx's to say.
"""

from __future__ import annotations

import re
from typing import Optional

from fused_resnet.emulation.entry import Entry, Operand, Parameter, Scope
from fused_resnet.emulation.instructions import Instructions
from fused_resnet.emulation.interface import IMMEDIATE, PREDICATE, REGISTER
from fused_resnet.emulation.syntax import (
    TYPE_BYTES,
    PtxError,
    Source,
    Statement,
    align,
    refuse,
    refuse_call,
    split_list,
)
from fused_resnet.emulation.variables import Variables

_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_HEAD_WORDS = re.compile(r"(?:\.(?:visible|weak|extern|common)\s+)*\.(\w+)")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr\s+(?:\.(?:global|shared|const|local|param)\s+)?(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[\w$%]+)\s*(?:\[\s*(?P<count>\d+)\s*\])?"
)
_REGISTERS = re.compile(r"([\w$%]+)\s*(?:<\s*(\d+)\s*>)?")


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
        self.source, self.entry, self.module = source, Entry(name), Scope()
        self.variables = Variables(self.entry, shared_shift)
        self.pending: list[tuple[Scope, Statement]] = []  # instructions, until all labels and variables are known

    def parse(self) -> Entry:
        head, body = self.find_entry()
        self.read_module(self.source.text[body : self.source.end_of_block(body)])
        self.read_head(head, body)
        self.read_body(body)
        self.variables.place_dynamic()
        instructions = Instructions(self.entry)
        for scope, statement in self.pending:
            self.entry.instructions.append(instructions.read(scope, statement))
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
        match = Variables.matched(statement)
        if re.search(rf"(?<![\w$%]){re.escape(match['name'])}(?![\w$])", body) is None:
            return
        self.variables.declare(self.module, statement, match)

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
        elif word == "maxnreg":
            self.entry.most_registers = x
        elif word == "minnctapersm":
            self.entry.fewest_blocks = x
        else:  # hints to ptxas, and a limit that the launch checks again
            return word in ("maxclusterrank", "explicitcluster", "noreturn")
        return True

    # --------------------------------------------------------------------------------------------------------- body

    def read_body(self, begin: int) -> None:
        """Declarations and labels now; instructions later, since they name what comes after them."""
        scope, table = self.module, None
        for statement in self.source.statements(begin, self.source.end_of_block(begin)):
            if statement.kind == "{":
                scope = Scope(scope)
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

    def declaration(self, scope: Scope, statement: Statement, label: Optional[str]) -> None:
        word = _HEAD_WORDS.match(statement.text)
        kind = word[1] if word else ""
        if kind == "reg":
            self.registers(scope, statement)
        elif kind in ("shared", "local", "global", "const"):
            match = Variables.matched(statement)
            if kind in ("global", "const"):
                refuse(statement.line, statement.text, f"a .{kind} variable within a kernel")
            self.variables.declare(scope, statement, match)
        elif kind == "branchtargets" and label:
            scope.tables[label] = split_list(statement.text.split(None, 1)[1])
        elif kind in ("param", "callprototype"):
            refuse_call(statement.line, statement.text, self.source.from_line(statement.line))
        elif kind != "pragma":
            refuse(statement.line, statement.text, "unknown directive")

    def registers(self, scope: Scope, statement: Statement) -> None:
        match = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", statement.text, re.S)
        if match is None or match[1] not in TYPE_BYTES:
            refuse(statement.line, statement.text, "registers of a type that is unknown here")
        for item in split_list(match[2]):
            many = _REGISTERS.fullmatch(item)
            if many is None:
                refuse(statement.line, statement.text, f"{item!r} is not understood as a register")
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many[2] else [many[1]]
            for name in names:
                scope.names[name] = self.new_register(match[1])

    def new_register(self, of_type: str) -> Operand:
        if of_type == "pred":
            self.entry.num_predicates += 1
            return Operand(PREDICATE, self.entry.num_predicates - 1)
        self.entry.num_registers += 1
        self.entry.register_bits.append(8 * TYPE_BYTES[of_type])
        return Operand(REGISTER, self.entry.num_registers - 1)
