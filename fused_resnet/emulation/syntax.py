"""The words of PTX: comments, statements, lists, numbers. What they mean is the parser's."""

from __future__ import annotations

import bisect
import re
import struct
from typing import Iterator, NamedTuple, NoReturn

# Bytes of each type (PTX ISA 5.2). A predicate is no memory.
TYPE_BYTES = {
    "pred": 0, **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    "f16": 2, "bf16": 2, "f32": 4, "tf32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "e4m3": 1, "e5m2": 1,
}  # fmt: skip

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
_BLANK = re.compile(r"\s*")
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_OF_ONE_LINE = re.compile(r"\.(?:loc|file|version|target|address_size)\b[^\n]*")
_DEBUG_SECTION = re.compile(r"\.section\b[^{]*\{[^}]*\}")
_INTEGER = re.compile(r"([-~]?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?")
_DECIMAL = re.compile(r"-?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?")


class PtxError(ValueError):
    """The text cannot be run: an instruction, a directive or a use of them that is unknown here or wrong."""


def refuse(line: int, text: str, why: str) -> NoReturn:
    raise PtxError(f"PTX line {line}: {why}: {' '.join(text.split())}")


_CALL = re.compile(r"\bcall(?:\.uni)?\s+(?:\([^()]*\)\s*,\s*)?([\w$%]+)")
_IN_SOURCE = {"vprintf": "printf", "__assertfail": "assert"}  # what a call is, where it is not named so


def refuse_call(line: int, text: str, following: str) -> NoReturn:
    """following: the text from there on, in which the next call is the one that is meant."""
    found = _CALL.search(following)
    if found is None:
        refuse(line, text, "device calls are not modelled")
    name = found[1]
    advice = f"remove {_IN_SOURCE[name]}" if name in _IN_SOURCE else "have the compiler inline it"
    refuse(line, text, f"device calls are not modelled, and this calls {name}: {advice}")


class Statement(NamedTuple):
    """kind: "{", "}", "label", "line" (a directive that ends with its line) or ";"."""

    kind: str
    text: str
    line: int


class Source:
    """A text without its comments, and what its positions are as lines."""

    def __init__(self, text: str):
        self.text = _COMMENT.sub(lambda comment: " " + "\n" * comment[0].count("\n"), text)
        self._ends = [match.start() for match in re.finditer("\n", self.text)]

    def line(self, position: int) -> int:
        return bisect.bisect_left(self._ends, position) + 1

    def from_line(self, line: int) -> str:
        return self.text[0 if line == 1 else self._ends[line - 2] :]

    def skip_blank(self, position: int) -> int:
        return _BLANK.match(self.text, position).end()  # type: ignore[union-attr]

    def end_of_block(self, begin: int) -> int:
        """The position behind the brace that closes the one at `begin`."""
        depth = 0
        for brace in re.compile(r"[{}]").finditer(self.text, begin):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return brace.end()
        refuse(self.line(begin), self.text[begin : begin + 40], "a brace that is never closed")

    def statements(self, begin: int, end: int) -> Iterator[Statement]:
        position = self.skip_blank(begin)
        while position < end:
            line, char = self.line(position), self.text[position]
            if char in "{}":
                yield Statement(char, char, line)
                position += 1
            elif match := _OF_ONE_LINE.match(self.text, position):
                yield Statement("line", match[0], line)
                position = match.end()
            elif match := _DEBUG_SECTION.match(self.text, position):
                position = match.end()
            elif match := _LABEL.match(self.text, position):
                yield Statement("label", match[1], line)
                position = match.end()
            else:
                stop = self.text.find(";", position, end)
                if stop < 0:
                    refuse(line, self.text[position : position + 60], "a statement without a semicolon")
                yield Statement(";", self.text[position:stop].strip(), line)
                position = stop + 1
            position = self.skip_blank(position)


def split_list(text: str) -> list[str]:
    """At the commas that stand in no bracket."""
    if "{" not in text and "[" not in text and "(" not in text:
        return [part.strip() for part in text.split(",")] if text.strip() else []
    parts, depth, start = [], 0, 0
    for position, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    return [*parts, text[start:].strip()]


def integer(text: str) -> int | None:
    """A constant of 64 bits as a signed number (PTX ISA 4.5.1), or None."""
    match = _INTEGER.fullmatch(text)
    if match is None:
        return None
    digits = match[2]
    is_octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    value = int(digits, 8) if is_octal else int(digits, 0)
    if match[1]:
        value = -value if match[1] == "-" else ~value
    return signed(value)


def signed(value: int, bits: int = 64) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def floating(text: str, is_double: bool) -> int | None:
    """The bits of a floating-point constant (PTX ISA 4.5.2), or None. A decimal one has the instruction's type."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return signed(int(text[2:], 16))
    if _DECIMAL.fullmatch(text):
        kinds = ("<d", "<q") if is_double else ("<f", "<I")
        return struct.unpack(kinds[1], struct.pack(kinds[0], float(text)))[0]
    return None


def align(value: int, to: int) -> int:
    return -(-value // to) * to
