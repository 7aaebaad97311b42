"""Sizes of registers: they fit the instruction's type (PTX ISA 6.1, 9.4.1).

ld, st and cvt take wider registers than their types. All others want the same size.
"""

from __future__ import annotations

import functools
from typing import Optional

from fused_resnet.emulation.entry import Entry, Instruction
from fused_resnet.emulation.interface import REGISTER
from fused_resnet.emulation.syntax import TYPE_BYTES, PtxError

_BITS = {name: 8 * size for name, size in TYPE_BYTES.items() if size}
_BITS |= {"e4m3x2": 16, "e5m2x2": 16, "u16x2": 32, "s16x2": 32}

# A letter an operand: t the first type's size, s the second's, w twice the first's, T and S: t and s or more, 2 and 6:
# 32 and 64 bits, - is not looked at. The last letter holds for all that follow.
_FORMS = {
    **dict.fromkeys(
        "add addc sub subc mul mad madc sad div rem abs neg min max and or xor not cnot fma copysign rcp sqrt rsqrt "
        "sin cos lg2 ex2 tanh brev cvta".split(), "t",
    ),
    **dict.fromkeys("shl shr".split(), "tt2"),
    **dict.fromkeys("mul24 mad24 shf lop3 prmt dp4a dp2a fns activemask redux".split(), "2"),
    **dict.fromkeys("popc clz bfind".split(), "2t"),
    "bfe": "tt22", "bfi": "ttt22", "set": "tss-", "setp": "-tt-", "selp": "ttt-", "slct": "ttts", "testp": "-t",
    "mov": "tt", "cvt": "TS", "ld": "T-6", "ldu": "T-", "st": "-T6", "red": "-t6", "shfl": "22222", "elect": "22",
    "bar": "2", "barrier": "2", "mapa": "tt2", "getctarank": "2t", "createpolicy": "6-", "nanosleep": "2",
    "ldmatrix": "2-", "stmatrix": "-2", "movmatrix": "2",
}  # fmt: skip
_LONGER_FORMS = {
    "mul.wide": "wtt", "mad.wide": "wttw", "vote.sync.ballot": "2-2", "vote.sync": "--2", "match": "2t2",
    "mbarrier.init": "-2", "mbarrier.arrive": "6-2", "mbarrier.arrive_drop": "6-2", "mbarrier.expect_tx": "-2",
    "mbarrier.complete_tx": "-2", "mbarrier.pending_count": "26", "mbarrier.test_wait.parity": "--2",
    "mbarrier.try_wait.parity": "--22", "mbarrier.test_wait": "--6", "mbarrier.try_wait": "--62",
    "atom": "t-tt", "st.async": "-t-", "red.async": "-t-",
}  # fmt: skip


@functools.lru_cache(maxsize=4096)
def form(op: str) -> Optional[tuple[tuple[int, bool], ...]]:
    """For each operand: the bits of its registers, and whether more will do. 0 bits: anything. None: no rule."""
    parts = op.split(".")
    letters = _FORMS.get(parts[0])
    for length in (3, 2, 1):
        letters = _LONGER_FORMS.get(".".join(parts[:length]), letters) if length <= len(parts) else letters
        if ".".join(parts[:length]) in _LONGER_FORMS:
            break
    if letters is None:
        return None
    types = [_BITS[part] for part in parts if part in _BITS]
    first = types[0] if types else 0
    second = types[1] if len(types) > 1 else first
    bits = {"t": first, "s": second, "w": 2 * first, "2": 32, "6": 64, "T": first, "S": second, "-": 0}
    return tuple((bits[letter], letter in "TS") for letter in letters)


def check(entry: Entry, instruction: Instruction) -> None:
    """Raises PtxError if a register's size does not fit."""
    wanted = form(instruction.op)
    if wanted is None or (instruction.op.startswith("mov.") and max(map(len, instruction.operands)) > 1):
        return
    for place, operand in enumerate(instruction.operands):
        bits, is_least = wanted[min(place, len(wanted) - 1)]
        for part in operand:
            has = entry.register_bits[part.index] if part.kind == REGISTER else bits
            if bits and (has < bits if is_least else has != bits):
                raise PtxError(
                    f"PTX line {instruction.line}: operand {place + 1} has {has} bits; wanted: {bits}"
                    f"{' or more' if is_least else ''}: {instruction.text}"
                )
