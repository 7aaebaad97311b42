"""Single-line edits of a kernel's PTX and of csrc's CUDA sources, for `benchmarks.mutations`."""

from __future__ import annotations

import collections
import itertools
import random
import re
from typing import Any, Callable, Iterator, NamedTuple


class Mutant(NamedTuple):
    """One edit. line: its number in the text, from 1. where: the line as it was."""

    kind: str
    line: int
    where: str
    text: str


_ADDRESS = re.compile(r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+))?\s*\]")
_DESCRIPTOR = r"\b(46116862933052948\d\d)\b"  # of wgmma, as Triton writes the constant part

Edit = Callable[[str], str]  # of a line; what it does not concern stays as it is


def _deleted(pattern: str) -> Edit:
    return lambda line: "" if re.search(pattern, line) else line


def _replaced(pattern: str, by: Any) -> Edit:
    return lambda line: re.sub(pattern, by, line, count=1)


def _number(pattern: str, change: Callable[[int], int]) -> Edit:
    """The number that is the pattern's first group."""

    def edit(found: re.Match) -> str:
        begin, end = found.start(1) - found.start(), found.end(1) - found.start()
        return found[0][:begin] + str(change(int(found[1]))) + found[0][end:]

    return _replaced(pattern, edit)


def _moved(pattern: str, by: int) -> Edit:
    """The first address of the line, in bytes."""

    def edit(line: str) -> str:
        if not re.search(pattern, line):
            return line
        return _ADDRESS.sub(lambda found: f"[{found[1]}+{int(found[2] or 0) + by}]", line, count=1)

    return edit


PTX: dict[str, Edit] = {
    "cp.async wait deleted": _deleted(r"cp\.async\.wait_group"),
    "cp.async wait one group later": _number(r"cp\.async\.wait_group\s+(\d+)", lambda n: n + 1),
    "cp.async commit deleted": _deleted(r"cp\.async\.commit_group"),
    "cp.async without its mask": _replaced(r"(cp\.async\.c[ag]\.shared.*,\s*)(0x10|16|8|4),\s*%r\d+", r"\1\2, \2"),
    "wgmma wait deleted": _deleted(r"wgmma\.wait_group"),
    "wgmma wait one group later": _number(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", lambda n: n + 1),
    "wgmma commit deleted": _deleted(r"wgmma\.commit_group"),
    "wgmma fence deleted": _deleted(r"wgmma\.fence"),
    "proxy fence deleted": _deleted(r"fence\.proxy\.async"),
    "barrier deleted": _deleted(r"^\s*(bar\.sync|barrier\.sync)"),
    "warp barrier deleted": _deleted(r"bar\.warp\.sync"),
    "mbarrier wait deleted": _deleted(r"bra\.uni\s+waitLoop"),
    "mbarrier count": _number(r"mbarrier\.init\S*\s+\[.*\],\s*(\d+)", lambda n: n + 1),
    "expected bytes halved": _number(r"expect_tx\S*\s.*,\s*(\d+);", lambda n: n // 2),
    "expected bytes more": _number(r"expect_tx\S*\s.*,\s*(\d+);", lambda n: n + 16),
    "expected bytes deleted": _deleted(r"expect_tx"),
    "parity kept": _replaced(r"xor\.b32\s+(%r\d+),\s*(\1,\s*%r\d+|%r\d+,\s*1);", r"mov.b32 \1, \1;"),
    "descriptor of another swizzle": _number(_DESCRIPTOR, lambda n: n ^ (3 << 62)),
    "descriptor of another stride": _number(_DESCRIPTOR, lambda n: n - (32 << 32)),
    "descriptor 32 bytes on": _number(_DESCRIPTOR, lambda n: n + 2),
    "TMA coordinates swapped": _replaced(r"(cp\.async\.bulk\.tensor.*)\{(%r\d+), (%r\d+)", r"\1{\3, \2"),
    "TMA copy deleted": _deleted(r"cp\.async\.bulk\.tensor"),
    "ldmatrix 16 bytes on": _moved("ldmatrix", 16),
    "shared access 16 bytes on": _moved(r"\b(st|ld)\.shared", 16),
    "global access 16 bytes on": _moved(r"\b(st|ld)\.global", 16),
    "swizzle bits": _number(r"xor\.b32\s+%r\d+,\s*%r\d+,\s*(\d+);", lambda n: n ^ 32),
    "mask of less": _replaced(r"setp\.(l|g)t(\.[su]\d\d)", r"setp.\1e\2"),
    "mask of more": _replaced(r"setp\.(l|g)e(\.[su]\d\d)", r"setp.\1t\2"),
    "guard turned": _replaced(r"^(\s*)@(!?)(%p\d+\s+)(?!bra)", lambda m: f"{m[1]}@{'' if m[2] else '!'}{m[3]}"),
    "choice turned": _replaced(r"(selp\.\w+\s+%\w+,\s*)([^,]+),\s*([^,]+),", r"\1\3, \2,"),
    "sum of one more": _number(r"add\.[su]\d\d\s+%\w+,\s*%\w+,\s*(-?\d+);", lambda n: n + 1),
    "shift of one more": _number(r"sh[lr]\.\w\d\d\s+%\w+,\s*%\w+,\s*(\d+);", lambda n: n + 1),
    "maximum lost": _replaced(r"max(\.NaN)?\.(f32|f16x2|bf16x2)(\s+%\w+,\s*%\w+),\s*[^;]+;", r"mov.b32\3;"),
}

SOURCE: dict[str, tuple[str, str]] = {
    "wait deleted": (r"\bwait_copies<[^>]*>\(\);", ";"),
    "commit deleted": (r"\bcommit_copies\(\);", ";"),
    "barrier deleted": (r"\bsync_block\(\);", ";"),
    "less or equal": (r"(?<=[\w)\]]) < (?=[\w(])", " <= "),
    "plus to minus": (r"(?<=[\w)\]]) \+ (?=[\w(])", " - "),
    "times to plus": (r"(?<=[\w)\]]) \* (?=[\w(])", " + "),
    "exclusive or to or": (r" \^ ", " | "),
    "remainder to quotient": (r"(?<=[\w)\]]) % (?=[\w(])", " / "),
    "and to or": (r" && ", " || "),
    "equal to unequal": (r" == ", " != "),
}


def mutants_of_ptx(text: str) -> Iterator[Mutant]:
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if line.lstrip().startswith((".", "//", "$")):
            continue
        for kind, edit in PTX.items():
            if (edited := edit(line)) != line:
                yield Mutant(kind, i + 1, " ".join(line.split()), "\n".join([*lines[:i], edited, *lines[i + 1 :]]))


def mutants_of_source(text: str) -> Iterator[Mutant]:
    """What devices run: in conv_shape.h that begins behind what the host alone does."""
    lines, is_comment = text.split("\n"), re.compile(r"\s*(//|#|static_assert|template)")
    first = next((i for i, line in enumerate(lines) if re.match(r"FUSED_RESNET_HD|template|__device__", line)), 0)
    for i, line in enumerate(lines):
        code = line.split("//")[0]
        if i < first or is_comment.match(line) or not code.strip():
            continue
        for kind, (pattern, other) in SOURCE.items():
            for found in re.finditer(pattern, code):
                edited = line[: found.start()] + other + line[found.end() :]
                yield Mutant(kind, i + 1, line.strip(), "\n".join([*lines[:i], edited, *lines[i + 1 :]]))


def drawn(mutants: Iterator[Mutant], seed: Any) -> list[Mutant]:
    """All of them in the order of trying: one of each kind, then another of each, while there are."""
    by_kind: dict[str, list[Mutant]] = collections.defaultdict(list)
    for mutant in mutants:
        by_kind[mutant.kind].append(mutant)
    rng = random.Random(seed)
    for some in by_kind.values():
        rng.shuffle(some)
    return [mutant for turn in itertools.zip_longest(*by_kind.values()) for mutant in turn if mutant is not None]
