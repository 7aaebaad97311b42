"""Kernels that run on the CPU: `Kernel(ptx).run(grid, block, arguments)`."""

from __future__ import annotations

import ctypes
import math
import random
import struct
from numbers import Integral
from typing import Any, Iterable, Mapping, NamedTuple, Optional, Sequence, Union

from fused_resnet.emulation import arrays, interface, library, parser, targets, widths
from fused_resnet.emulation.entry import Entry, Instruction, Parameter
from fused_resnet.emulation.interface import LANDINGS, SCHEDULES, Counts
from fused_resnet.emulation.syntax import PtxError
from fused_resnet.emulation.tensor_map import TensorMap

ROUNDINGS = ("fp64", 80, 89, 90)
_REPORT_BYTES = 1 << 20
_USUAL_ALIGNMENT = 1024  # of dynamic shared memory, on GPUs
_MAP_BYTES = 128
# What an architecture has without a promise that later ones will (PTX ISA 11.1.2, targets with the suffix a)
_OF_ONE_ARCHITECTURE = ("wgmma.", "setmaxnreg.", "tensormap.replace.")
# Registers of a multiprocessor, and of a thread at most, with what their allocation in eights adds.
_REGISTER_FILE, _MOST_REGISTERS = 65536, 256
# Shared memory a block may have, by compute capability (CUDA C++ programming guide, technical specifications).
_SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
CAPABILITIES = tuple(_SHARED_KIB)  # compute capabilities, times ten

Size = Union[int, Sequence[int]]


class Outcome(NamedTuple):
    """What a run found. A fault ends a launch, and so leaves its results unfinished; it is among the reports too.

    reports: one string a finding, "[kind] what; where". seconds: of CPU time.
    """

    reports: list[str]
    faulted: bool
    counts: Counts
    seconds: float


class Launch(NamedTuple):
    """One of several that `run_together` starts. The fields are the arguments of `Kernel.run`."""

    kernel: Kernel
    grid: Size
    block: Size
    arguments: Sequence[Any]
    shared_bytes: int = 0
    cluster: Size = 1
    blocks: Optional[Sequence[int]] = None


class Kernel:
    """One kernel of a PTX text, ready to run.

    name: which, when the text has several.
    shared_shift: moves dynamic shared memory by so many bytes, or to the next place that its alignment allows. Else it
    begins, without static variables, at a multiple of 1024, on which kernels come to rely. In strict mode it begins
    wherever its alignment allows, by seed.
    Raises PtxError for whatever is unknown in it, with its line.
    """

    def __init__(self, text: str, name: Optional[str] = None, *, shared_shift: int = 0):
        self._program = None
        self._text, self._shift, self._moved = text, shared_shift, dict[int, Kernel]()
        lib = library.library()
        self.entry = parser.parse(text, name, shared_shift)
        entry = self.entry
        self._program = ctypes.c_void_p(lib.ptx_program(entry.num_registers, entry.num_predicates, entry.local_bytes))
        for instruction in entry.instructions:
            self._add(lib, instruction)

    def _add(self, lib, instruction: Instruction) -> None:
        target = self.entry.target
        if instruction.op.startswith(_OF_ONE_ARCHITECTURE) and target[-1:] not in ("a", "f"):
            raise PtxError(
                f"PTX line {instruction.line}: {instruction.text} needs .target sm_90a, the text has {target}"
            )
        flat = [element for operand in instruction.operands for element in operand]
        operands = (interface.PtxOperand * max(len(flat), 1))(*[interface.PtxOperand(*element) for element in flat])
        counts = (ctypes.c_int32 * max(len(instruction.operands), 1))(*map(len, instruction.operands))
        error = lib.ptx_add(
            self._program, instruction.op.encode(), instruction.predicate, instruction.negated, operands, counts,
            len(instruction.operands), instruction.line, instruction.text.encode(), instruction.target,
        )  # fmt: skip
        if error:
            raise PtxError(f"PTX line {instruction.line}: {error.decode()}")
        targets.check(target, instruction)
        widths.check(self.entry, instruction)

    def __del__(self):
        if self._program:
            library.library().ptx_free(self._program)

    def moved(self, shift: int) -> Kernel:
        """The same one with its dynamic shared memory so many bytes further on."""
        if shift not in self._moved:
            self._moved[shift] = Kernel(self._text, self.name, shared_shift=self._shift + shift)
        return self._moved[shift]

    @property
    def name(self) -> str:
        return self.entry.name

    def run(
        self, grid: Size, block: Size, arguments: Sequence[Any], *, shared_bytes: int = 0, writable: Iterable[Any] = (),
        memory: Optional[Mapping[str, Any]] = None, cluster: Size = 1, landing: str = "late", schedule: str = "random",
        seed: int = 0, max_steps: int = 10**9, races: int = 1, rounding: Union[str, int] = "fp64",
        blocks: Optional[Sequence[int]] = None,
    ) -> Outcome:  # fmt: skip
        """Runs the grid; results are in the arrays.

        arguments: one a parameter. int, float, None (zeros), bytes, an array (its address), or a TensorMap. A list is
        a struct: its bytes, arrays and maps, one after another.
        writable: those arrays that the kernel may write. memory: further arrays that it may reach, by name.
        shared_bytes: dynamic shared memory. blocks: the indices of those to run, by default all.
        landing: when asynchronous work arrives. schedule: the order of warps.
        max_steps: warp instructions before it counts as endless.
        races: 0 looks at data only, 1 also for races, 2 also for what PTX demands and hardware does not need.
        rounding: of tensor-core sums, exact or as that GPU's.
        """
        launch = Launch(self, grid, block, arguments, shared_bytes, cluster, blocks)
        return run_together(
            [launch], writable=writable, memory=memory, landing=landing, schedule=schedule, seed=seed,
            max_steps=max_steps, races=races, rounding=rounding,
        )  # fmt: skip


def run_together(
    launches: Sequence[Launch], *, writable: Iterable[Any] = (), memory: Optional[Mapping[str, Any]] = None,
    landing: str = "late", schedule: str = "random", seed: int = 0, max_steps: int = 10**9, races: int = 1,
    rounding: Union[str, int] = "fp64", overlap: bool = False,
) -> Outcome:  # fmt: skip
    """Launches of one stream, in order. overlap: they depend programmatically (griddepcontrol), and run interleaved."""
    options = interface.PtxOptions(
        landing=_one_of("landing", landing, LANDINGS), schedule=_one_of("schedule", schedule, SCHEDULES),
        seed=seed % 2**64, max_steps=max_steps, races=_one_of("races", races, (0, 1, 2)),
        rounding=0 if rounding == "fp64" else ROUNDINGS[_one_of("rounding", rounding, ROUNDINGS)], overlap=overlap,
    )  # fmt: skip
    if races == 2:
        launches = [_moved_by_seed(launch, seed) for launch in launches]
    found = _Memory(memory or {})
    prepared = [_prepare(launch, found) for launch in launches]
    regions = found.regions(list(writable))
    outcome, reports = interface.PtxOutcome(), ctypes.create_string_buffer(_REPORT_BYTES)
    structures = (interface.PtxLaunch * len(prepared))(*[one.structure for one in prepared])
    library.library().ptx_launch(
        structures, len(prepared), regions, len(regions), ctypes.byref(options), ctypes.byref(outcome), reports,
        len(reports),
    )  # fmt: skip
    counts = Counts(*(getattr(outcome.counts, name) for name in Counts._fields))
    return Outcome(_paragraphs(reports.value.decode()), bool(outcome.faulted), counts, outcome.seconds)


def _moved_by_seed(launch: Launch, seed: int) -> Launch:
    """Dynamic shared memory begins at any multiple of its alignment, where the block has room for that."""
    alignment = launch.kernel.entry.dynamic_alignment
    if not 0 < alignment < _USUAL_ALIGNMENT:
        return launch
    shift = alignment * random.Random(seed).randrange(_USUAL_ALIGNMENT // alignment)
    moved = launch._replace(kernel=launch.kernel.moved(shift))
    try:
        _shared_bytes(moved)
    except ValueError:
        return launch
    return moved


def _paragraphs(reports: str) -> list[str]:
    """A report begins with "[" at the start of a line."""
    return ["[" + report.strip() for report in ("\n" + reports).split("\n[")[1:]]


def _one_of(what: str, value: Any, allowed: Sequence[Any]) -> int:
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}; wanted: one of {', '.join(map(repr, allowed))}")
    return list(allowed).index(value)


class _Memory:
    """The arrays that a run may reach."""

    def __init__(self, named: Mapping[str, Any]):
        self.ranges: dict[int, tuple[int, str, bool]] = {}  # by address: bytes, name, writable
        for name, array in named.items():
            self.add(name, array)

    def add(self, name: str, array: Any, writable: bool = False) -> None:
        if not arrays.is_array(array):
            raise TypeError(f"memory {name!r} is a {type(array).__name__}; wanted: a tensor or an ndarray")
        if reason := arrays.why_not(array):
            raise ValueError(f"{name!r} {reason}")
        begin, size = arrays.address(array), arrays.num_bytes(array)
        known = self.ranges.get(begin, (0, name, writable))
        if size or not known[0]:
            self.ranges[begin] = (max(size, known[0]), known[1], writable or known[2])

    def regions(self, writable: list[Any]) -> ctypes.Array:
        for array in writable:
            begin = arrays.address(array)
            if begin not in self.ranges:
                raise ValueError("an array in writable= is neither an argument nor in memory=")
            size, name, _ = self.ranges[begin]
            self.ranges[begin] = (size, name, True)
        merged: list[list] = []
        for begin, (size, name, is_writable) in sorted(self.ranges.items()):
            if merged and begin < merged[-1][0] + merged[-1][1]:
                self._merge(merged[-1], begin, size, name, is_writable)
            elif size:
                merged.append([begin, size, is_writable, name])
        return (interface.PtxRegion * len(merged))(
            *[interface.PtxRegion(b, s, int(w), n.encode()) for b, s, w, n in merged]
        )

    @staticmethod
    def _merge(before: list, begin: int, size: int, name: str, is_writable: bool) -> None:
        if before[2] != is_writable:
            raise ValueError(f"{before[3]!r} and {name!r} overlap, and only one of them is writable")
        before[1] = max(before[1], begin + size - before[0])


class _Prepared(NamedTuple):
    structure: interface.PtxLaunch
    kept: tuple  # what the structure points to


def _prepare(launch: Launch, memory: _Memory) -> _Prepared:
    entry = launch.kernel.entry
    for variable in entry.variables:
        memory.add(variable.name, variable.memory, variable.writable)
    if len(launch.arguments) != len(entry.parameters):
        raise ValueError(
            f"{entry.name}: {len(launch.arguments)} arguments for {len(entry.parameters)} parameters "
            f"({', '.join(parameter.name for parameter in entry.parameters)})"
        )
    grid, block, cluster = _sizes(launch)
    buffer = (ctypes.c_uint8 * max(entry.parameter_bytes, 1))()
    for parameter, value in zip(entry.parameters, launch.arguments):
        if isinstance(value, TensorMap):
            _check_map(parameter)
            value = [value]
        bytes_of = _struct_of if isinstance(value, (list, tuple)) else _bytes_of
        data = bytes_of(parameter, value, memory)
        buffer[parameter.offset : parameter.offset + parameter.size] = list(data)
    chosen = _chosen_blocks(launch, grid)
    structure = interface.PtxLaunch(
        launch.kernel._program, (ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block),
        (ctypes.c_uint32 * 3)(*cluster), _shared_bytes(launch), _registers(entry), buffer, entry.parameter_bytes,
        chosen, 0 if chosen is None else len(chosen),
    )  # fmt: skip
    return _Prepared(structure, (buffer, chosen, launch))


# ------------------------------------------------------------------------------------------------------------- sizes


def _three(what: str, size: Size) -> tuple[int, int, int]:
    sizes: Any = (size,) if isinstance(size, Integral) else size
    is_known = isinstance(sizes, Sequence) and all(isinstance(each, Integral) for each in sizes)
    if not is_known or not 1 <= len(sizes) <= 3:
        raise ValueError(f"{what} is {size!r}; wanted: a number or a tuple of up to three")
    x, y, z = ([*map(int, sizes), 1, 1])[:3]
    return x, y, z


def _sizes(launch: Launch) -> tuple[tuple[int, int, int], ...]:
    entry = launch.kernel.entry
    sizes = {"grid": launch.grid, "block": launch.block, "cluster": launch.cluster}
    grid, block, cluster = (_three(f"{entry.name}: {what}", size) for what, size in sizes.items())
    if not all(1 <= size <= most for size, most in zip(grid, (2**31 - 1, 65535, 65535))):
        raise ValueError(f"{entry.name}: a grid of {grid} blocks; wanted: 1 to 2**31 - 1, 65535 and 65535")
    threads = block[0] * block[1] * block[2]
    if not all(1 <= size <= most for size, most in zip(block, (1024, 1024, 64))) or threads > 1024:
        raise ValueError(f"{entry.name}: a block of {block} threads; wanted: at most 1024, and 64 in z")
    if entry.required_block not in (None, block):
        raise ValueError(f"{entry.name}: a block of {block} threads; its .reqntid wants {entry.required_block}")
    if threads > entry.most_threads:
        raise ValueError(f"{entry.name}: {threads} threads; its .maxntid allows {entry.most_threads}")
    if cluster == (1, 1, 1):
        cluster = entry.required_cluster or cluster
    if entry.required_cluster not in (None, cluster):
        raise ValueError(f"{entry.name}: clusters of {cluster}; its .reqnctapercluster wants {entry.required_cluster}")
    if any(g % c for g, c in zip(grid, cluster)) or not 1 <= cluster[0] * cluster[1] * cluster[2] <= 16:
        raise ValueError(
            f"{entry.name}: clusters of {cluster} blocks in a grid of {grid}; wanted: at most 16, in whole"
        )
    return grid, block, cluster


def _shared_bytes(launch: Launch) -> int:
    entry = launch.kernel.entry
    total = entry.static_shared_bytes + launch.shared_bytes
    digits = "".join(filter(str.isdigit, entry.target))
    most = 1024 * _SHARED_KIB.get(int(digits or 0), 227)
    if launch.shared_bytes < 0 or total > most:
        raise ValueError(f"{entry.name}: {total} bytes of shared memory; {entry.target or 'a GPU'} has {most} a block")
    return total


def _registers(entry: Entry) -> int:
    """A thread's at launch, as setmaxnreg counts them (PTX ISA 9.7.19.5): in eights, 0 if no directive says.

    .maxnreg says it, or .minnctapersm together with the number of threads: so many blocks share the 64 Ki registers.
    """
    if entry.most_registers:
        return -(-entry.most_registers // 8) * 8
    threads = math.prod(entry.required_block or (entry.most_threads,))
    if not entry.fewest_blocks:
        return 0
    warps = -(-threads // 32) * entry.fewest_blocks
    return min(_MOST_REGISTERS, _REGISTER_FILE // (32 * warps) // 8 * 8)


def _chosen_blocks(launch: Launch, grid: tuple[int, int, int]) -> Optional[ctypes.Array]:
    if launch.blocks is None:
        return None
    count = grid[0] * grid[1] * grid[2]
    if not all(isinstance(block, Integral) for block in launch.blocks):
        raise ValueError(
            f"{launch.kernel.name}: blocks {list(launch.blocks)}; wanted: linear indices, x + grid x * (y + grid y * z)"
        )
    if not launch.blocks or not all(0 <= block < count for block in launch.blocks):
        raise ValueError(f"{launch.kernel.name}: blocks {list(launch.blocks)}; wanted: some of 0 to {count - 1}")
    return (ctypes.c_uint32 * len(launch.blocks))(*launch.blocks)


# --------------------------------------------------------------------------------------------------------- arguments


def _check_map(parameter: Parameter) -> None:
    if parameter.size != _MAP_BYTES or parameter.offset % 64:
        raise TypeError(f"{parameter.name} has {parameter.size} bytes; a TensorMap has 128, aligned to 64")


def _struct_of(parameter: Parameter, parts: Sequence[Any], memory: _Memory) -> bytes:
    """A struct that is given in parts."""
    data = bytearray()
    for part in parts:
        if isinstance(part, TensorMap):
            if (parameter.offset + len(data)) % 64:
                raise ValueError(f"{parameter.name}: a TensorMap at byte {len(data)}; wanted: aligned to 64")
            memory.add(parameter.name, part.array)
            data += part.encoded
        elif arrays.is_array(part):
            memory.add(parameter.name, part)
            data += struct.pack("<Q", arrays.address(part))
        elif isinstance(part, (bytes, bytearray)):
            data += part
        else:
            raise TypeError(
                f"{parameter.name}: a {type(part).__name__} in a struct; wanted: bytes, an array, a TensorMap"
            )
    if len(data) != parameter.size:
        raise ValueError(f"{parameter.name} has {parameter.size} bytes, not {len(data)}")
    return bytes(data)


def _bytes_of(parameter: Parameter, value: Any, memory: _Memory) -> bytes:
    if value is None:
        return bytes(parameter.size)
    if isinstance(value, (bytes, bytearray)):
        if len(value) != parameter.size:
            raise ValueError(f"{parameter.name} has {parameter.size} bytes, not {len(value)}")
        return bytes(value)
    if parameter.is_array:
        raise TypeError(f"{parameter.name} is an array of {parameter.size} bytes; wanted: bytes, a list or a TensorMap")
    if arrays.is_array(value):
        if parameter.type not in ("u64", "b64", "s64"):
            raise TypeError(f"{parameter.name} is .{parameter.type}; an array's address needs 64 bits")
        memory.add(parameter.name, value)
        return struct.pack("<Q", arrays.address(value))
    if hasattr(value, "item"):  # numpy's scalars
        value = value.item()
    if isinstance(value, float):
        return _float_bytes(parameter, value)
    if isinstance(value, int):
        return _integer_bytes(parameter, value)
    raise TypeError(f"{parameter.name}: a {type(value).__name__} is no argument of a kernel")


def _float_bytes(parameter: Parameter, value: float) -> bytes:
    kinds = {"f16": "<e", "f32": "<f", "b32": "<f", "f64": "<d", "b64": "<d"}
    if parameter.type not in kinds:
        raise TypeError(f"{parameter.name} is .{parameter.type}; {value} is a float")
    return struct.pack(kinds[parameter.type], value)


def _integer_bytes(parameter: Parameter, value: int) -> bytes:
    if parameter.type.startswith(("f", "bf")):
        raise TypeError(f"{parameter.name} is .{parameter.type}; {value} is an int")
    bits = 8 * parameter.size
    low = 0 if parameter.type.startswith("u") and value >= 0 else -(1 << (bits - 1))
    if not low <= value < 1 << bits:
        raise ValueError(f"{parameter.name} is .{parameter.type}, which does not hold {value}")
    return (value % (1 << bits)).to_bytes(parameter.size, "little")
