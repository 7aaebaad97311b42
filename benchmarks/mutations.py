"""Breaks our kernels one line at a time, and counts what the emulator notices: python -m benchmarks.mutations

Mutants are drawn by seed: waits, commits, fences, barriers, counts, parities, descriptors, swizzles, masks, addresses.
They are edits of the PTX of Triton's and nvcc's kernels, and of csrc's CUDA source. Each runs in up to four ways of
landing and turns on each of a kernel's problems. "report" counts those that a report gives away, "data" those whose
output is wrong or unfinished. Nothing but the output tells of "data alone". What nobody notices is listed, to be
explained. Lines of PTX that no problem reaches are counted apart: a trap in their place goes unnoticed too.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional

import torch

from fused_resnet.emulation import PtxError, cuda_launches, launches
from fused_resnet.emulation.kernel import LANDINGS, SCHEDULES, Kernel, Outcome
from fused_resnet.emulation.parser import kernel_names
from fused_resnet.kernels.triton.conv import launch as conv
from fused_resnet.kernels.triton.conv.configs import TritonConfig
from fused_resnet.machine import files
from fused_resnet.operators import reference
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import ConvProblem, parsed_problem

_MOST_STEPS = 3_000_000  # warp instructions, beyond which a mutant counts as hanging
_WAYS = tuple(zip(itertools.cycle(LANDINGS), SCHEDULES))


class Mutant(NamedTuple):
    """One edit. line: its number in the text, from 1. where: the line as it was."""

    kind: str
    line: int
    where: str
    text: str


Run = Callable[[str, dict[str, Any]], tuple[bool, list[str]]]


class Subject(NamedTuple):
    """A kernel to break. runs: of each problem (the kernel's text, how) -> whether the output is right, and reports."""

    name: str
    text: str
    runs: list[Run]
    mutants: Callable[[str], Iterator[Mutant]]


class Verdict(NamedTuple):
    reports: list[str]
    is_wrong: bool

    @property
    def is_killed(self) -> bool:
        return bool(self.reports) or self.is_wrong


# ------------------------------------------------------------------------------------------------------------ subjects

# arch, problems, config. More steps than stages, so that every wait and parity matters, and in other numbers: the last
# stage read is another one. Tiles that are full and that are not.
TRITON: tuple[tuple[int, tuple[str, ...], tuple], ...] = (
    (
        80,
        ("1x64x9x9 -> 64, 3x3 p1 float16 bias+add relu", "1x128x16x5 -> 128, 3x3 p1 float16 bias+add relu"),
        (64, 64, 64, 8, 4, 3, "pointer"),
    ),
    (
        90,
        ("1x64x9x9 -> 64, 3x3 p1 float16 bias+add relu", "1x128x16x5 -> 128, 3x3 p1 float16 bias+add relu"),
        (64, 64, 64, 8, 4, 3, "pointer"),
    ),
    (
        90,
        ("2x320x7x9 -> 72, 1x1 float16 bias+add relu", "1x448x5x13 -> 136, 1x1 float16 bias+add relu"),
        (64, 64, 64, 8, 4, 3, "gemm_tma"),
    ),
    (
        90,
        ("3x64x9x9 -> 72, 3x3 p1 float16 bias relu", "2x64x13x5 -> 200, 3x3 p1 float16 bias relu"),
        (128, 64, 64, 8, 4, 3, "rows_tma", 1, True),
    ),
    (
        90,
        ("2x64x9x7 -> 72, 3x3 p1 float16 bias+add relu", "1x64x5x7 -> 136, 3x3 p1 float16 bias+add relu"),
        (64, 64, 64, 8, 4, 3, "lines_tma"),
    ),
)
# arch, problems, tile: reductions of 9, 7 and 5 steps in a ring of three stages, or of two
CUDA: tuple[tuple[int, tuple[str, ...], int], ...] = (
    (
        80,
        (
            "1x64x9x9 -> 64, 3x3 p1 float16 bias+add relu",
            "2x448x7x9 -> 72, 1x1 float16 bn+add silu",
            "1x320x5x5 -> 100, 1x1 s2 float16 bias none",
            "1x64x8x8 -> 56, 1x1 float16 bn+bias+add relu6",
        ),
        1,
    ),
    (
        80,
        (
            "2x128x7x5 -> 72, 1x1 float16 bn+add relu6",
            "1x64x9x9 -> 64, 3x3 p1 float16 bias+add relu",
            "1x320x5x5 -> 100, 1x1 s2 float16 bias none",
        ),
        4,
    ),
)
SOURCES = ("cuda/sm80/conv_bn_act.cuh", "cuda/sm80/tile_layout.h")


def operands_of(p: ConvProblem) -> ConvOperands:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def image(*shape: int) -> torch.Tensor:
        return draw(*shape).to(p.dtype).contiguous(memory_format=torch.channels_last)

    bn = (draw(p.K), draw(p.K), draw(p.K), draw(p.K).abs() + 0.5) if p.has_bn else (None,) * 4
    weight = draw(p.K, p.C // p.groups, p.R, p.S) * p.reduction**-0.5
    return ConvOperands(
        image(p.N, p.C, p.H, p.W), weight.to(p.dtype).contiguous(memory_format=torch.channels_last), *bn, 1e-5,
        draw(p.K).to(p.dtype) if p.has_bias else None, image(p.N, p.K, p.P, p.Q) if p.has_residual else None,
    )  # fmt: skip


def judge(p: ConvProblem, o: ConvOperands) -> Callable[[torch.Tensor, list[Outcome]], tuple[bool, list[str]]]:
    expected = reference.conv_bn_act(p, o)
    bound = reference.error_bound(p, o, expected=expected)

    def judged(out: torch.Tensor, outcomes: list[Outcome]) -> tuple[bool, list[str]]:
        is_right = not any(one.faulted for one in outcomes) and bool(((out.double() - expected).abs() <= bound).all())
        return is_right, [report for one in outcomes for report in one.reports]

    return judged


def triton_subject(arch: int, problems: tuple[str, ...], config: tuple) -> Subject:
    """Raises ValueError where the problems do not share one text."""
    found = [_triton_run(arch, problem, config) for problem in problems]
    if len({text for _, text in found}) != 1:
        raise ValueError(f"mutations: the compiler makes other kernels of each of {problems}.")
    return Subject(f"Triton {config[6]}, sm_{arch}", found[0][1], [run for run, _ in found], mutants_of_ptx)


def _triton_run(arch: int, problem: str, config: tuple) -> tuple[Run, str]:
    p = parsed_problem(problem, "cuda")
    o = operands_of(p)
    out = torch.full(p.output_shape, torch.nan, dtype=p.dtype).contiguous(memory_format=torch.channels_last)
    (launch,) = conv.prepare(p, o, out, TritonConfig(*config))
    made = launches.compiled(launch, arch)
    given, judged = launches.arguments(launch, made), judge(p, o)
    programs = 2 if len(config) > 8 and config[8] else launch.num_programs

    def run(text: str, how: dict[str, Any]) -> tuple[bool, list[str]]:
        out.fill_(torch.nan)
        outcome = Kernel(text).run(programs, made.threads, given, shared_bytes=made.shared_bytes, writable=[out], **how)
        return judged(out, [outcome])

    return run, made.text


def cuda_subject(arch: int, problems: tuple[str, ...], tile: int) -> Subject:
    found = [_cuda_run(arch, problem, tile) for problem in problems]
    return Subject(f"CUDA tile {tile}, sm_{arch}", found[0][1], [run for run, _ in found], mutants_of_ptx)


def source_subject(arch: int, problems: tuple[str, ...], tile: int, header: str) -> Subject:
    """The mutant is a header of csrc's; nvcc compiles the kernel with it in the place of the stock one."""
    folder, stock = tempfile.TemporaryDirectory(prefix="mutants_"), cuda_launches._CSRC
    for file in stock.rglob("*"):
        if file.is_file() and file.relative_to(stock).parts[0] in ("common", "cuda"):
            copy = Path(folder.name) / file.relative_to(stock)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())

    def of(problem: str) -> Run:
        run_ptx, _ = _cuda_run(arch, problem, tile)

        def run(text: str, how: dict[str, Any]) -> tuple[bool, list[str]]:
            (Path(folder.name) / header).write_text(text)
            return run_ptx(_compiled_below(Path(folder.name), arch, tile, text), how)

        return run

    text = (stock / header).read_text()
    return Subject(f"{header}, tile {tile}, sm_{arch}", text, list(map(of, problems)), mutants_of_source)


_TEXTS: dict[tuple, str] = {}


def _compiled_below(root: Path, arch: int, tile: int, text: str) -> str:
    """What nvcc makes of the fp16 kernel with the headers below root; once for a text."""
    if (arch, tile, text) not in _TEXTS:
        kernel = f"conv_bn_act_kernel<Half, {tile}, 16>(const __grid_constant__ ConvArguments)"
        source = cuda_launches._instances("cuda/sm80/conv_bn_act.cuh", [kernel])
        include = (root, Path(torch.__file__).parent / "include")
        with tempfile.TemporaryDirectory() as cache:  # the source's text is the same: its cache knows no headers
            made = cuda_launches.compile_cuda(source, f"sm_{arch}", include=include, cache=Path(cache))
        _TEXTS[arch, tile, text] = made
    return _TEXTS[arch, tile, text]


def _cuda_run(arch: int, problem: str, tile: int) -> tuple[Run, str]:
    p = parsed_problem(problem, "cuda")
    o, judged = operands_of(p), judge(p, operands_of(p))
    out = torch.full(p.output_shape, torch.nan, dtype=p.dtype).contiguous(memory_format=torch.channels_last)
    launch = cuda_launches.prepare(p, o, out, None, tile, 1, arch)
    memory = {**{name: t for name, t in o._asdict().items() if isinstance(t, torch.Tensor)}, "out": out}
    given = [bytes(launch.arguments[: launch.argument_bytes])]

    def run(text: str, how: dict[str, Any]) -> tuple[bool, list[str]]:
        out.fill_(torch.nan)
        kernel = Kernel(text, next(name for name in kernel_names(text) if "conv_bn_act_kernel" in name))
        outcome = kernel.run(launch.blocks, launch.threads, given, shared_bytes=launch.shared_bytes, memory=memory,
                             writable=[out], **how)  # fmt: skip
        return judged(out, [outcome])

    text = cuda_launches.conv_text(p.dtype, arch, ((tile, launch.copy_bytes),))
    names = kernel_names(text)
    begins = [text.index(f".entry {name}") for name in names]
    first = next(begin for name, begin in zip(names, begins) if "conv_bn_act_kernel" in name)
    ends = [begin for begin in begins if begin > first] or [len(text)]
    cut = text[: text.rindex(".visible", 0, min(ends))] if min(ends) < len(text) else text
    return run, cut


# ------------------------------------------------------------------------------------------------------------- mutants

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
    lines, is_comment = text.split("\n"), re.compile(r"\s*(//|#|static_assert|template)")
    for i, line in enumerate(lines):
        code = line.split("//")[0]
        if is_comment.match(line) or not code.strip():
            continue
        for kind, (pattern, other) in SOURCE.items():
            for found in re.finditer(pattern, code):
                edited = line[: found.start()] + other + line[found.end() :]
                yield Mutant(kind, i + 1, line.strip(), "\n".join([*lines[:i], edited, *lines[i + 1 :]]))


def drawn(subject: Subject, count: int, seed: int) -> list[Mutant]:
    """So many mutants, of each kind as equally many as there are."""
    by_kind: dict[str, list[Mutant]] = collections.defaultdict(list)
    for mutant in subject.mutants(subject.text):
        by_kind[mutant.kind].append(mutant)
    rng = random.Random(f"{seed}/{subject.name}")
    for some in by_kind.values():
        rng.shuffle(some)
    turns = itertools.zip_longest(*by_kind.values())
    return [mutant for turn in turns for mutant in turn if mutant is not None][:count]


# ---------------------------------------------------------------------------------------------------------------- runs


def tried(subject: Subject, text: str, seed: int) -> Optional[Verdict]:
    """Until something is noticed, at most once each way on each problem. None where it does not compile or load."""
    verdict = Verdict([], False)
    for (landing, schedule), run in itertools.product(_WAYS, subject.runs):
        how = dict(landing=landing, schedule=schedule, seed=seed, max_steps=_MOST_STEPS)
        try:
            is_right, reports = run(text, how)
        except (PtxError, RuntimeError):
            return None
        verdict = Verdict(verdict.reports + reports, verdict.is_wrong or not is_right)
        if verdict.is_killed:
            break
    return verdict


def is_reached(subject: Subject, mutant: Mutant, seed: int) -> bool:
    """Whether any problem executes the line of PTX that was changed; True of source, of which this cannot be told."""
    if subject.mutants is not mutants_of_ptx:
        return True
    lines = subject.text.split("\n")
    guard = re.match(r"\s*(@!?%p\d+\s+|)", lines[mutant.line - 1])
    lines.insert(mutant.line - 1, f"{guard[1] if guard else ''}trap;")
    verdict = tried(subject, "\n".join(lines), seed)
    return verdict is None or verdict.is_killed


def campaign(subject: Subject, count: int, seed: int) -> dict[str, Any]:
    whole = tried(subject, subject.text, seed)
    if whole is None or whole.is_killed:
        raise SystemExit(f"mutations: {subject.name} is not right to begin with: {whole}")
    counted = ("mutants", "killed", "report", "data", "data_alone", "refused", "unreached")
    row: dict[str, Any] = dict(subject=subject.name, **dict.fromkeys(counted, 0), kinds={}, survivors=[])
    for mutant in drawn(subject, count, seed):
        verdict = tried(subject, mutant.text, seed)
        if verdict is None:
            row["refused"] += 1  # by a compiler or at load: no run was needed
            continue
        if not verdict.is_killed and not is_reached(subject, mutant, seed):
            row["unreached"] += 1
            continue
        kind = row["kinds"].setdefault(mutant.kind, [0, 0])
        row["mutants"] += 1
        kind[1] += 1
        row["killed"] += verdict.is_killed
        kind[0] += verdict.is_killed
        row["report"] += bool(verdict.reports)
        row["data"] += verdict.is_wrong
        row["data_alone"] += verdict.is_wrong and not verdict.reports
        if not verdict.is_killed:
            row["survivors"].append(dict(kind=mutant.kind, line=mutant.line, where=mutant.where))
    return row


def subjects(names: list[str]) -> Iterator[Subject]:
    if "triton" in names:
        yield from (triton_subject(*one) for one in TRITON)
    if "cuda" in names:
        yield from (cuda_subject(*one) for one in CUDA)
    if "source" in names:
        yield from (source_subject(*CUDA[0], header) for header in SOURCES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=["triton", "cuda", "source"], choices=["triton", "cuda", "source"])
    parser.add_argument("--mutants", type=int, default=50, help="of each kernel (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record: dict[str, Any] = dict(what="mutants that the emulator notices", seed=options.seed, rows=[])
    print("| kernel | mutants | killed | by a report | by data | by data alone | refused at load | not reached |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for subject in subjects(options.only):
        row = campaign(subject, options.mutants, options.seed)
        record["rows"].append(row)
        columns = ("subject", "mutants", "killed", "report", "data", "data_alone", "refused", "unreached")
        cells = [row[name] for name in columns]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        if options.out:
            files.write_json(options.out, record)
    for row in record["rows"]:
        for one in row["survivors"]:
            print(f"survives: {row['subject']}: {one['kind']}, line {one['line']}: {one['where']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
