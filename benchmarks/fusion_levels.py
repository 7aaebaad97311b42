"""What each level of fusion could reach on a GPU, by memory, L2 and arithmetic. No GPU is used: these are bounds.

    python -m benchmarks.fusion_levels [--model resnet50] [--batch 1,32,256] [--dtype fp16] [--out FOLDER]

| level | what is one kernel |
| --- | --- |
| unfused | convolution, BN, addition, ReLU and pooling, each |
| folded | a convolution; then its bias, addition and ReLU together |
| per-conv | a convolution with all that follows it |
| shift | 3x3 + expansion + addition + ReLU + the next block's reduction, where that is faster than one by one |
| block | a whole bottleneck, its halo computed again, where that is faster; the stem with its max-pooling |

A kernel takes the longest of three times: its least bytes through memory, what its tiles read and write through L2,
its multiplications. Tiles share nothing but L2 (and, in a cluster, their weights): each reads its part of x and the
weights by itself. Of the tiles in TILES the fastest counts. Too few tiles, or a last wave of few, leave
multiprocessors idle. Kernels overlap in nothing, and a launch costs nothing. Writes GPU_fusion_MODEL.json and .md.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, Iterable, NamedTuple, Optional, Sequence

import torch
from torch import nn

from fused_resnet import models
from fused_resnet.machine import files
from fused_resnet.nn import Bottleneck
from fused_resnet.operators.problem import SHORT_DTYPES, ConvProblem, output_size

RESULTS = Path(__file__).parent / "results" / "predictions"
LEVELS = ("unfused", "folded", "per-conv", "shift", "block")
TILES = ((64, 64), (128, 64), (128, 128), (256, 64), (256, 128), (128, 256))  # pixels x output channels
SPLITS = (1, 2, 4, 8)  # of a reduction, where tiles are few
CHAIN_PIXELS = (128, 256)
BLOCK_TILES = ((8, 8), (8, 16), (16, 16))  # lines x columns of a bottleneck's output
LARGER = ("rows", "pixels")  # how the tiles of a chain and of a block are called
SHARED_BYTES = 227 * 1024  # that a block of sm_90 may have
PIPELINE_BYTES = 64 * 1024  # of it, for what a chain streams


class Rates(NamedTuple):
    """What a GPU reaches: memory, L2 and one multiprocessor in bytes a second, flops in multiplications and additions.

    cluster: how many tiles get the same weights by one read of L2.
    """

    name: str
    memory: float
    l2: float
    flops: float
    num_sms: int
    l2_of_one_sm: float
    cluster: int = 1


# Assumed to be reached, of the data sheet's 4.8 TB/s and 989 TFLOP/s in 16 bits; L2 as in the timing model.
H200 = Rates("h200", 4.3e12, 5.5e12, 790e12, 132, 64 * 1.83e9)


class Kernel(NamedTuple):
    """One launch: what it moves and multiplies. stage: "stem", "layer1" and so on, "tail". tiles: 0 for any number."""

    name: str
    stage: str
    memory_bytes: float
    l2_bytes: float
    flops: float
    tiles: int = 0
    tile: str = ""

    def parts(self, rates: Rates) -> dict[str, float]:
        """Seconds by what is kept busy."""
        tiles = self.tiles or rates.num_sms
        pulled = min(tiles, rates.num_sms) * rates.l2_of_one_sm
        busy = tiles / (math.ceil(tiles / rates.num_sms) * rates.num_sms)
        return {
            "memory": self.memory_bytes / min(rates.memory, pulled),
            "L2": self.l2_bytes / min(rates.l2, pulled),
            "arithmetic": self.flops / (busy * rates.flops),
        }

    def seconds(self, rates: Rates) -> float:
        return max(self.parts(rates).values())


class Conv(NamedTuple):
    """A convolution of the network, with what follows it."""

    name: str
    problem: ConvProblem

    @property
    def stage(self) -> str:
        return self.name.split(".")[0] if "." in self.name else "stem"

    @property
    def pixels(self) -> int:
        return self.problem.N * self.problem.P * self.problem.Q

    @property
    def output_bytes(self) -> int:
        return self.pixels * self.problem.K * self.problem.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        return self.problem.K * self.problem.reduction * self.problem.dtype.itemsize


class Network(NamedTuple):
    """A ResNet of bottlenecks at a batch. pool and tail: the kernels behind the stem and the last block."""

    stem: Conv
    pool: Kernel
    blocks: list[dict[str, Conv]]  # "conv1", "conv2", "conv3", perhaps "downsample"
    tail: list[Kernel]

    @property
    def convs(self) -> list[Conv]:
        return [self.stem, *(conv for block in self.blocks for conv in block.values())]


def network(model_name: str, batch: int, dtype: torch.dtype) -> Network:
    """Raises ValueError for a model that is no ResNet of bottlenecks without groups."""
    model = models.create(model_name)
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if type(module) is Bottleneck]
    if not names or any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in modules.values()):
        raise ValueError(f"fusion levels are those of bottlenecks without groups, and {model_name} has other blocks.")
    shapes = _input_shapes(model, models.input_shape(model_name), batch)

    def conv(name: str, activation: str, has_residual: bool) -> Conv:
        module = modules[name]
        assert isinstance(module, nn.Conv2d)
        window = (module.stride, module.padding, module.dilation)
        K, (R, S) = module.out_channels, module.kernel_size
        problem = ConvProblem(*shapes[name], K, R, S, *window, 1, activation, False, True, has_residual, dtype, "cuda")
        return Conv(name, problem)

    stem = conv("conv1", "relu", False)
    blocks = []
    for name in names:
        block = {"conv1": conv(f"{name}.conv1", "relu", False), "conv2": conv(f"{name}.conv2", "relu", False)}
        if f"{name}.downsample.0" in modules:
            block["downsample"] = conv(f"{name}.downsample.0", "none", False)
        blocks.append({**block, "conv3": conv(f"{name}.conv3", "relu", True)})
    P, Q = (output_size(side, 3, 2, 1, 1) for side in (stem.problem.P, stem.problem.Q))
    pooled = batch * P * Q * stem.problem.K * dtype.itemsize
    pool = Kernel("maxpool", "stem", stem.output_bytes + pooled, stem.output_bytes + pooled, 0)
    last = blocks[-1]["conv3"]
    features, classes = batch * last.problem.K * dtype.itemsize, modules["fc"].out_features
    linear = classes * last.problem.K * dtype.itemsize + features + batch * classes * dtype.itemsize
    return Network(
        stem, pool, blocks,
        [Kernel("avgpool", "tail", last.output_bytes + features, last.output_bytes + features, 0),
         Kernel("fc", "tail", linear, linear, 2 * batch * classes * last.problem.K)],
    )  # fmt: skip


def _input_shapes(model: nn.Module, image: Sequence[int], batch: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    model = model.to("meta").eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args, name=name: shapes.update({name: tuple(args[0].shape)}))
    with torch.no_grad():
        model(torch.empty(batch, *image, device="meta"))
    return shapes


# ------------------------------------------------------------------------------------------------------------- kernels


def fastest(kernels: Iterable[Kernel], rates: Rates) -> Kernel:
    return min(kernels, key=lambda kernel: kernel.seconds(rates))


def one_conv(conv: Conv, rates: Rates, *, with_epilogue: bool = True) -> Kernel:
    """The convolution by the fastest tile. Without its epilogue it reads no residual."""
    p, out = conv.problem, conv.output_bytes
    residual = out if p.has_residual and with_epilogue else 0
    memory = p.bytes_moved - (out if p.has_residual else 0) + residual

    def tiled(rows: int, columns: int, splits: int) -> Kernel:
        tiles = math.ceil(conv.pixels / rows) * math.ceil(p.K / columns)
        operands = tiles * (rows + columns / rates.cluster) * p.reduction * p.dtype.itemsize
        sums = 2 * splits * conv.pixels * p.K * 4 if splits > 1 else 0  # written and read in fp32
        l2, tile = operands + sums + residual + out, f"{rows}x{columns}" + (f", {splits} splits" if splits > 1 else "")
        return Kernel(conv.name, conv.stage, memory, l2, p.flops, tiles * splits, tile)

    return fastest((tiled(*tile, splits) for tile in TILES for splits in SPLITS), rates)


def one_pass(conv: Conv, name: str, tensors: int) -> Kernel:
    """A pointwise kernel over so many tensors of the output's size."""
    moved = tensors * conv.output_bytes
    return Kernel(f"{conv.name} {name}", conv.stage, moved, moved, 0)


def chain(block: dict[str, Conv], following: Conv, rates: Rates) -> Optional[Kernel]:
    """`shift`: a block from its 3x3 on, and the 1x1 of the next. None where its 3x3 has a stride or nothing fits.

    A tile holds its pixels of t2 and reads its slab of t1 once: its rows, and a line and two pixels on either side.
    """
    middle, expand = block["conv2"], block["conv3"]
    p, element = middle.problem, middle.problem.dtype.itemsize
    if p.stride != (1, 1) or p.dilation != (1, 1) or following.problem.R != 1:
        return None
    weights = middle.weight_bytes + expand.weight_bytes + following.weight_bytes
    moved = 2 * expand.output_bytes + following.output_bytes  # the skip, y, the next t1
    memory = middle.pixels * p.C * element + weights + moved
    flops = sum(conv.problem.flops for conv in (middle, expand, following))

    def tiled(rows: int) -> Optional[Kernel]:
        slab = (rows + 2 * (p.W + 2)) * p.C * element
        held = slab + rows * p.K * element
        # two warpgroups of 128 threads hold the sums of the 3x3 and of the next 1x1 in 208 registers each
        if held + PIPELINE_BYTES > SHARED_BYTES or rows * max(p.K, following.problem.K) > 256 * 208:
            return None
        tiles = math.ceil(middle.pixels / rows)
        stays = held + weights + PIPELINE_BYTES / 2 <= SHARED_BYTES
        read = tiles * slab + (min(tiles, rates.num_sms) if stays else tiles) * weights / rates.cluster
        name = f"{middle.name} to {following.name}"
        resident = "weights stay, " if stays else ""
        return Kernel(name, middle.stage, memory, read + moved, flops, tiles, f"{resident}{rows} rows")

    found = [kernel for kernel in map(tiled, CHAIN_PIXELS) if kernel is not None]
    return fastest(found, rates) if found else None


def whole_block(block: dict[str, Conv], rates: Rates) -> Optional[Kernel]:
    """A bottleneck with an identity shortcut: x is read once and y written, conv1 is computed again in the halos."""
    first, middle, expand = block["conv1"], block["conv2"], block["conv3"]
    p, element = first.problem, first.problem.dtype.itemsize
    if "downsample" in block or middle.problem.stride != (1, 1) or middle.problem.dilation != (1, 1):
        return None
    weights = first.weight_bytes + middle.weight_bytes + expand.weight_bytes
    memory = first.pixels * p.C * element + weights + expand.output_bytes

    def tiled(lines: int, columns: int) -> Optional[Kernel]:
        halo, rows = (lines + 2) * (columns + 2), lines * columns
        if (halo + rows) * p.K * element + PIPELINE_BYTES > SHARED_BYTES or rows * p.K > 256 * 208:
            return None
        tiles = p.N * math.ceil(p.P / lines) * math.ceil(p.Q / columns)
        read = tiles * (halo * p.C * element + weights / rates.cluster + rows * p.C * element)  # x again as the skip
        again = 2 * tiles * halo * p.C * p.K
        flops = again + middle.problem.flops + expand.problem.flops
        name, tile = first.name.rpartition(".")[0], f"{lines}x{columns} pixels"
        return Kernel(name, first.stage, memory, read + expand.output_bytes, flops, tiles, tile)

    found = [kernel for tile in BLOCK_TILES if (kernel := tiled(*tile)) is not None]
    return fastest(found, rates) if found else None


def pooled_stem(net: Network, rates: Rates) -> Kernel:
    """The stem and its max-pooling: the map between them stays on the chip, its border is not counted twice."""
    conv, out = one_conv(net.stem, rates), net.stem.output_bytes
    kept = out - (net.pool.memory_bytes - out)  # what is not written: the map less what the pooling gives
    memory, l2 = conv.memory_bytes - kept, conv.l2_bytes - kept
    return Kernel("conv1 and maxpool", "stem", memory, l2, conv.flops, conv.tiles, conv.tile)


# -------------------------------------------------------------------------------------------------------------- levels


def kernels_of(net: Network, level: str, rates: Rates) -> list[Kernel]:
    """The launches of a level, in their order."""
    if level in ("unfused", "folded"):
        stem = _passes(net.stem, level, rates)
        blocks = [kernel for block in net.blocks for conv in block.values() for kernel in _passes(conv, level, rates)]
        return [*stem, net.pool, *blocks, *net.tail]
    stem = [one_conv(net.stem, rates), net.pool] if level != "block" else [pooled_stem(net, rates)]
    return [*stem, *_blocks(net, level, rates), *net.tail]


def _passes(conv: Conv, level: str, rates: Rates) -> list[Kernel]:
    """A convolution and its passes; in place, so that a pass reads and writes one tensor, an addition reads another."""
    p, found = conv.problem, [one_conv(conv, rates, with_epilogue=False)]
    if level == "folded":
        return [*found, one_pass(conv, "epilogue", 3 if p.has_residual else 2)]
    found.append(one_pass(conv, "bn", 2))
    found += [one_pass(conv, "add", 3)] if p.has_residual else []
    return [*found, one_pass(conv, p.activation, 2)] if p.activation != "none" else found


def _blocks(net: Network, level: str, rates: Rates) -> list[Kernel]:
    """The fastest of the ways that a level allows through all blocks, from the last backwards.

    A block is met with its first 1x1 still to be computed, or with that in the chain of the block before.
    """
    after: dict[bool, list[Kernel]] = {False: [], True: []}
    for index in reversed(range(len(net.blocks))):
        block, is_last = net.blocks[index], index == len(net.blocks) - 1
        single = {name: one_conv(conv, rates) for name, conv in block.items()}
        chained = None if level == "per-conv" or is_last else chain(block, net.blocks[index + 1]["conv1"], rates)
        whole = whole_block(block, rates) if level == "block" else None
        now = {}
        for is_reduced in (False, True):
            before = [
                single[name]
                for name in ("conv1", "downsample")
                if name in single and not (is_reduced and name == "conv1")
            ]
            ways = [[*before, single["conv2"], single["conv3"], *after[False]]]
            ways += [[*before, chained, *after[True]]] if chained is not None else []
            ways += [[whole, *after[False]]] if whole is not None and not is_reduced else []
            now[is_reduced] = min(ways, key=lambda kernels: total(kernels, rates))
        after = now
    return after[False]


def total(kernels: Sequence[Kernel], rates: Rates) -> float:
    return sum(kernel.seconds(rates) for kernel in kernels)


def bounds(net: Network, level: str, rates: Rates) -> dict[str, Any]:
    """What a level comes to: bytes an image, images a second by memory and arithmetic, and with L2."""
    batch = net.stem.problem.N
    kernels = kernels_of(net, level, rates)
    no_l2 = rates._replace(l2=math.inf, l2_of_one_sm=math.inf)
    by_stage: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        stage = by_stage.setdefault(kernel.stage, dict(us=0.0, memory_us=0.0, l2_us=0.0, arithmetic_us=0.0))
        for name, seconds in zip(("memory_us", "l2_us", "arithmetic_us"), kernel.parts(rates).values()):
            stage[name] += 1e6 * seconds
        stage["us"] += 1e6 * kernel.seconds(rates)
    fastest_without, fastest_with = total(kernels_of(net, level, no_l2), no_l2), total(kernels, rates)
    return dict(
        level=level, batch=batch, launches=len(kernels),
        mb_per_image=sum(kernel.memory_bytes for kernel in kernels) / batch / 1e6,
        l2_mb_per_image=sum(kernel.l2_bytes for kernel in kernels) / batch / 1e6,
        bound_images_per_s=batch / fastest_without, with_l2_images_per_s=batch / fastest_with,
        measured_images_per_s=None, stages=by_stage,
        larger=[kernel._asdict() for kernel in kernels if "." in kernel.name and kernel.tile.endswith(LARGER)],
    )  # fmt: skip


def markdown(record: dict[str, Any]) -> str:
    rates = record["rates"]
    assumed = f"{rates['memory'] / 1e12:.1f} TB/s of memory, {rates['l2'] / 1e12:.1f} TB/s of L2"
    lines = [
        f"# Bounds of fusion levels for {record['model']}, {record['dtype']}, on an {rates['name']}",
        "",
        f"Nothing here was measured. Assumed: {assumed}, {rates['flops'] / 1e12:.0f} TFLOP/s, weights shared by "
        f"{rates['cluster']} tiles. Every kernel takes the longest of its parts, and kernels do not overlap.",
        "",
        "| batch | level | launches | MB an image | L2 MB an image | bound, images/s | with L2, images/s | measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        bytes_of_image = f"{row['mb_per_image']:.1f} | {row['l2_mb_per_image']:.1f}"
        speeds = f"{row['bound_images_per_s']:,.0f} | {row['with_l2_images_per_s']:,.0f}"
        lines.append(f"| {row['batch']} | {row['level']} | {row['launches']} | {bytes_of_image} | {speeds} | - |")
    title = "Of each stage at the largest batch, microseconds by what is kept busy:"
    head = ["| level | stage | memory | L2 | arithmetic | sum of the longest |", "|" + " --- |" * 6]
    lines += ["", title, "", *head]
    largest = max(row["batch"] for row in record["rows"])
    for row in record["rows"]:
        for name, stage in row["stages"].items() if row["batch"] == largest else ():
            parts = " | ".join(f"{stage[part]:.0f}" for part in ("memory_us", "l2_us", "arithmetic_us", "us"))
            lines.append(f"| {row['level']} | {name} | {parts} |")
    lines += ["", "Where larger kernels than a convolution's are faster:", ""]
    lines += ["| batch | level | from | to | tile |", "| --- | --- | --- | --- | --- |"]
    for row in record["rows"]:
        for kernel in row["larger"]:
            first, _, last = kernel["name"].partition(" to ")
            lines.append(f"| {row['batch']} | {row['level']} | {first} | {last or first} | {kernel['tile']} |")
    return "\n".join(lines) + "\n"


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet50", help="a ResNet of bottlenecks (default: resnet50)")
    parser.add_argument("--batch", default="1,32,256", help="images (default: 1,32,256)")
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16"))
    parser.add_argument("--memory", type=float, default=H200.memory / 1e12, help="TB/s reached (default: %(default)s)")
    parser.add_argument("--l2", type=float, default=H200.l2 / 1e12, help="TB/s reached (default: %(default)s)")
    parser.add_argument("--tflops", type=float, default=H200.flops / 1e12, help="reached (default: %(default)s)")
    parser.add_argument("--cluster", type=int, default=2, help="tiles that share weights (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    rates = H200._replace(
        memory=options.memory * 1e12, l2=options.l2 * 1e12, flops=options.tflops * 1e12, cluster=options.cluster
    )
    try:
        networks = [network(options.model, int(size), SHORT_DTYPES[options.dtype]) for size in options.batch.split(",")]
    except ValueError as error:
        print(f"fusion_levels: {error}", file=sys.stderr)
        return 2
    rows = [bounds(net, level, rates) for net in networks for level in LEVELS]
    record = dict(
        what="bounds, not measurements", model=options.model, dtype=options.dtype, rates=rates._asdict(), rows=rows
    )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{rates.name}_fusion_{options.model}.json"
    files.write_json(path, record)
    path.with_suffix(".md").write_text(markdown(record))
    print(markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
