"""The least .target of an instruction, from the "Target ISA Notes" of PTX ISA 9.7, as far as it is above sm_75."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from fused_resnet.emulation.entry import Instruction
from fused_resnet.emulation.syntax import PtxError


class Rule(NamedTuple):
    """names: of instructions, or "" for any. words: modifiers that are all there; a|b: one of the two."""

    names: str
    words: str
    least: int


# An instruction needs what the greatest of its rules says.
RULES = (
    # 9.7.9: data movement
    Rule("", "shared::cluster", 90),
    Rule("", "L2::cache_hint", 80),
    Rule("ld", "L2::256B", 80),
    Rule("ld st", "v8", 100),
    Rule("ld st", "v4 b64|u64|s64|f64", 100),
    Rule("st red", "async", 90),
    Rule("st red", "async release", 100),
    Rule("createpolicy applypriority discard redux", "", 80),
    Rule("prefetch", "L2::evict_last|L2::evict_normal", 80),
    Rule("prefetch", "tensormap", 90),
    Rule("mapa getctarank elect griddepcontrol multimem stmatrix tensormap", "", 90),
    Rule("cvt", "f16x2|bf16|bf16x2|tf32|relu", 80),
    Rule("cvt", "e4m3x2|e5m2x2", 89),
    Rule("cvt", "bf16 u8|s8|u16|s16|u32|s32|u64|s64|f16|f64", 90),
    Rule("cvt", "bf16 ftz", 90),
    Rule("cvt", "tf32 rn|rz", 90),
    Rule("cvt", "tf32 satfinite", 100),
    Rule("cp", "async", 80),
    Rule("cp", "bulk", 90),
    # 9.7.13: barriers, fences, atomics
    Rule("mbarrier", "", 80),
    Rule("mbarrier", "try_wait|expect_tx|complete_tx|relaxed|cluster", 90),
    Rule("barrier ld st atom red fence", "cluster", 90),
    Rule("fence", "mbarrier_init|async|async::generic|tensormap::generic", 90),  # ptxas has .acquire on sm_80, too
    Rule("atom red", "bf16|bf16x2|v2|v4|v8|b128", 90),
    # 9.7.14: matrices
    Rule("mma", "m16n8k16|m16n8k32|m16n8k64|bf16|tf32|f64", 80),
    Rule("mma", "e4m3|e5m2", 89),
    Rule("mma", "f64 m16n8k4|m16n8k8|m16n8k16", 90),
    # 9.7.1 to 9.7.7: arithmetic
    Rule("add sub mul ex2 tanh set setp", "bf16|bf16x2", 90),
    Rule("fma", "relu|bf16|bf16x2", 80),
    Rule("fma", "oob", 90),
    Rule("abs neg", "bf16|bf16x2", 80),
    Rule("min max", "f16|f16x2|bf16|bf16x2|NaN", 80),
    Rule("min max", "xorsign", 86),
    Rule("add min max", "u16x2|s16x2", 90),
    Rule("min max", "relu", 90),
    Rule("add sub mul fma", "f32x2", 100),
)


@functools.lru_cache(maxsize=4096)
def least(op: str) -> int:
    """The least sm that has an instruction with these modifiers; 0: any."""
    name, *modifiers = op.split(".")
    return max((rule.least for rule in RULES if _fits(rule, name, modifiers)), default=0)


def _fits(rule: Rule, name: str, modifiers: list[str]) -> bool:
    if rule.names and name not in rule.names.split():
        return False
    if name == "cvt" and modifiers.count("bf16") == 2 and "ftz" not in rule.words:
        modifiers = [*modifiers, "f16"]  # from and to bf16 counts as no fp32
    return all(any(one in modifiers for one in word.split("|")) for word in rule.words.split())


def check(target: str, instruction: Instruction) -> None:
    """Raises PtxError if the text's .target lacks the instruction."""
    number = re.match(r"sm_(\d+)", target)
    if number is None:
        return
    needed = least(instruction.op)
    if instruction.op.startswith(("mbarrier.arrive.", "mbarrier.arrive_drop.")) and len(instruction.operands) > 2:
        if ".noComplete" not in instruction.op:  # 9.7.13.15.13: the note on sm_8x
            needed = max(needed, 90)
    if int(number[1]) < needed:
        raise PtxError(
            f"PTX line {instruction.line}: {instruction.text} needs .target sm_{needed}, the text has {target}"
        )
