"""Tensor maps: what cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col would make, with their limits checked.

The limits are the CUDA driver API's (Tensor Map Object Management). What they allow but no published text explains is
refused here: a row of a box that is shorter than the swizzle's span. Interleaved layouts do not exist here for the same
reason: no text says how far apart their slices of channels lie.
"""

from __future__ import annotations

from typing import Any, Optional, Sequence

from fused_resnet.emulation import arrays
from fused_resnet.emulation.interface import TYPE_NAMES, PtxTensorMap

_MAGIC = 0x70616D726F736E74
SWIZZLES = (0, 32, 64, 128)  # the span in bytes


class TensorMap:
    """array: a tensor or an ndarray, whose data the map describes. Everything is given innermost first.

    sizes, strides: of the tensor, in elements and in bytes. strides has one entry less: the innermost is dense.
    box: elements a copy brings in. element_strides: of the traversal, in elements.
    fill: "zeros" or "nan", for what lies outside. dtype: by default the array's.
    """

    def __init__(
        self, array: Any, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int], *, swizzle: int = 0,
        element_strides: Optional[Sequence[int]] = None, fill: str = "zeros", dtype: Optional[str] = None,
    ):  # fmt: skip
        self._begin(array, sizes, strides, swizzle, element_strides, fill, dtype)
        self._set_box(box)

    @classmethod
    def im2col(
        cls, array: Any, sizes: Sequence[int], strides: Sequence[int], *, lower: Sequence[int], upper: Sequence[int],
        pixels: int, channels: int, swizzle: int = 0, element_strides: Optional[Sequence[int]] = None,
        fill: str = "zeros", dtype: Optional[str] = None,
    ) -> TensorMap:  # fmt: skip
        """lower, upper: corners of the box that the pixels' base may lie in, innermost (W) first.

        channels, pixels: what a copy brings in.
        """
        made = cls.__new__(cls)
        made._begin(array, sizes, strides, swizzle, element_strides, fill, dtype)
        made._set_corners(lower, upper, pixels, channels)
        return made

    def _begin(self, array, sizes, strides, swizzle, element_strides, fill, dtype) -> None:
        rank = len(sizes)
        name = dtype or arrays.type_name(array)
        self.array, self.element_bytes = array, arrays.TYPE_BYTES.get(name, 0)
        _check(self.element_bytes in (1, 2, 4, 8), f"has elements of type {name}", "elements of 1, 2, 4 or 8 bytes")
        _check(1 <= rank <= 5, f"has {rank} dimensions", "1 to 5")
        _check(len(strides) == rank - 1, f"has {len(strides)} strides for {rank} sizes", "one less than sizes")
        address = arrays.address(array)
        _check(address % 16 == 0, f"is at {address:#x}", "a multiple of 16 bytes")
        _check(all(0 < size <= 2**32 for size in sizes), f"has sizes {tuple(sizes)}", "1 to 2**32 each")
        self._check_strides(sizes, strides)
        _check(swizzle in SWIZZLES, f"has swizzle {swizzle}", f"a span of {SWIZZLES} bytes")
        _check(fill in ("zeros", "nan"), f"has fill {fill!r}", "'zeros' or 'nan'")
        _check(
            fill == "zeros" or name in ("f16", "bf16", "f32", "tf32", "f64"), f"of {name} is filled with NaN", "zeros"
        )
        steps = tuple(element_strides or (1,) * rank)
        _check(len(steps) == rank and all(1 <= step <= 8 for step in steps), f"has element strides {steps}",
               "1 to 8, one a dimension")  # fmt: skip
        # The stride of dimension 0 is that of interleaved layouts alone (PTX ISA 5.5.3.2)
        _check(steps[0] == 1, f"has element strides {steps}", "1 in the innermost dimension")
        self.structure = PtxTensorMap(
            magic=_MAGIC, address=address, rank=rank, swizzle=swizzle, element_type=TYPE_NAMES.index(name),
            nan_fill=fill == "nan",
        )  # fmt: skip
        self._fill("sizes", sizes)
        self._fill("strides", strides)
        self._fill("element_strides", steps)

    @property
    def encoded(self) -> bytes:
        """The map's 128 bytes, for a kernel that takes maps from global memory; its array goes into `memory`."""
        return bytes(self.structure)

    def _check_strides(self, sizes, strides) -> None:
        for stride in strides:
            _check(stride % 16 == 0 and 0 <= stride < 2**40, f"has strides {tuple(strides)}",
                   "multiples of 16 bytes below 2**40")  # fmt: skip
        extent = self.element_bytes * sizes[0]
        extent += sum((size - 1) * stride for size, stride in zip(sizes[1:], strides))
        _check(extent <= arrays.num_bytes(self.array), f"spans {extent} bytes",
               f"at most the array's {arrays.num_bytes(self.array)}")  # fmt: skip

    def _set_box(self, box) -> None:
        rank = self.structure.rank
        _check(len(box) == rank and all(1 <= b <= 256 for b in box), f"has the box {tuple(box)}",
               "1 to 256, one a dimension")  # fmt: skip
        self._check_row(box[0] * self.element_bytes, self.structure.swizzle)
        self._fill("box", box)

    def _set_corners(self, lower, upper, pixels, channels) -> None:
        rank = self.structure.rank
        _check(rank in (3, 4, 5), f"has {rank} dimensions", "3 to 5 for im2col")
        # The corners share 32 bits: 16 each for one dimension, 8 for two, 5 for three
        low, high = {3: (-(2**15), 2**15 - 1), 4: (-(2**7), 2**7 - 1), 5: (-(2**4), 2**4 - 1)}[rank]
        for corner in (lower, upper):
            _check(len(corner) == rank - 2 and all(low <= c <= high for c in corner), f"has the corner {tuple(corner)}",
                   f"{rank - 2} of {low} to {high}")  # fmt: skip
        spatial = list(self.structure.sizes)[1 : rank - 1]
        _check(all(size + up > down for size, down, up in zip(spatial, lower, upper)),
               f"has a bounding box from {tuple(lower)} to {tuple(upper)} of sizes {spatial}",
               "at least one position a dimension")  # fmt: skip
        _check(1 <= pixels <= 1024, f"has {pixels} pixels a column", "1 to 1024")
        _check(1 <= channels <= 256, f"has {channels} channels a pixel", "1 to 256")
        self._check_row(channels * self.element_bytes, self.structure.swizzle)
        self.structure.is_im2col, self.structure.pixels, self.structure.channels = 1, pixels, channels
        self._fill("lower", lower)
        self._fill("upper", upper)

    @staticmethod
    def _check_row(row_bytes: int, swizzle: int) -> None:
        _check(row_bytes % 16 == 0, f"has rows of {row_bytes} bytes", "a multiple of 16")
        # Shorter rows are legal, but whether they are packed or padded to the span is not published
        _check(not swizzle or row_bytes == swizzle, f"has rows of {row_bytes} bytes at swizzle {swizzle}",
               "rows of the swizzle's span")  # fmt: skip

    def _fill(self, name: str, values: Sequence[int]) -> None:
        for i, value in enumerate(values):
            getattr(self.structure, name)[i] = value


def _check(is_right: bool, what: str, wanted: str) -> None:
    if not is_right:
        raise ValueError(f"TensorMap {what}; wanted: {wanted}")
