"""What a table of times comes to: geometric mean, worst case, share won, and every loss by name.

A row is {"problem", "count", "variants": {name: {"median_us", ...}}, ...}; a speedup is their time over ours.
"""

from __future__ import annotations

import math
import statistics
from typing import Any, Iterator, Optional, Sequence

from fused_resnet import backends

LOSS_BELOW = 0.995  # a speedup that is shown as 0.99x or less
BASE = "eager NCHW fp32"  # of a network, where everyone starts
# what someone who wants speed would take instead of us
COMPETITORS = ("compile", "autotune", "cudnn", "tensorrt", "onnxruntime", "openvino")
UNFUSED, FOLDED, COPY = "unfused", "eager folded", "copy"  # variants of an operator that are no backend
OURS, AUTO = "our kernels", "auto"
CUDNN, LIBRARY = "the better of cuDNN fused and unfused", "the best library kernel"
_BY_ORIGIN = {
    name: backend.origin for op in ("add_relu", "conv_bn_act") for name, backend in backends.known(op).items()
}
LIBRARIES = tuple(name for name, origin in _BY_ORIGIN.items() if origin == "library")  # whose kernels are not ours
THEIRS = (UNFUSED, FOLDED, COPY, *LIBRARIES)
LARGE_BATCH = 32

Row = dict[str, Any]


def compared(
    rows: Sequence[Row], name: str, ours: Sequence[str], against: str, theirs: Sequence[str], where: str = "all"
) -> Optional[dict[str, Any]]:
    """The entry of a summary: the fastest of the variants `ours` beside the fastest of `theirs`, called `against`.

    Over the rows that have both; None where no row has. A speedup below LOSS_BELOW is a loss, one above its inverse a
    win; the totals count a problem as often as the models have it.
    """
    both = [row for row in rows if _fastest(row, ours) and _fastest(row, theirs)]
    if not both:
        return None
    own, other = ([_fastest(row, names) for row in both] for names in (ours, theirs))
    speedups = [base / time_us for base, time_us in zip(other, own)]
    ordered = sorted(zip(speedups, (row["problem"] for row in both)))
    counts = [row.get("count", 1) for row in both]
    return {
        "variant": name,
        "against": against,
        "where": where,
        "problems": len(both),
        "geomean_speedup": math.exp(statistics.fmean(map(math.log, speedups))),
        "worst_speedup": ordered[0][0],
        "worst_problem": ordered[0][1],
        "share_won": sum(speedup > 1 / LOSS_BELOW for speedup in speedups) / len(both),
        "total_us": math.fsum(map(lambda t, n: t * n, own, counts)),
        "total_us_against": math.fsum(map(lambda t, n: t * n, other, counts)),
        "losses": [{"problem": problem, "speedup": speedup} for speedup, problem in ordered if speedup < LOSS_BELOW],
    }


def _fastest(row: Row, names: Sequence[str]) -> float:
    """Microseconds of the fastest of these variants, 0 without any."""
    return min((row["variants"][name]["median_us"] for name in names if name in row["variants"]), default=0.0)


def summarise(rows: Sequence[Row], against: str) -> list[dict[str, Any]]:
    """Each variant of the rows beside the one called `against`."""
    names = {name: None for row in rows for name in row["variants"] if name not in (against, COPY)}
    entries = (compared(rows, name, (name,), against, (against,)) for name in names)
    return [entry for entry in entries if entry is not None]


def summarise_ops(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What an operator benchmark says: each variant beside the plain ones, then our kernels and `auto` where it counts.

    | shown as | what it is | beside |
    | --- | --- | --- |
    | "our kernels" | the fastest without eager and the libraries | the better of cuDNN fused and unfused |
    | "auto" | what the package takes by itself | the fastest library kernel |

    Both over all rows, over the large batches, and for each batch and dtype. The additions, beside plain ones and
    beside a copy of as many bytes.
    """
    convolutions = [row for row in rows if row["op"] == "conv_bn_act"]
    additions = [row for row in rows if row["op"] == "add_relu"]
    plain = [entry for base in (UNFUSED, FOLDED, "cudnn") for entry in summarise(convolutions, base)]
    entries: list[Optional[dict[str, Any]]] = [entry for entry in plain if entry["variant"] != UNFUSED]
    names = {name: None for row in rows for name in row["variants"]}
    ours = tuple(name for name in names if name not in THEIRS)
    for where, group in _groups(convolutions):
        on_cuda = [row for row in group if row["device"] == "cuda"]
        entries.append(compared(on_cuda, OURS, ours, CUDNN, ("cudnn", FOLDED), where))
        entries.append(compared(with_auto(group), AUTO, (AUTO,), LIBRARY, (*LIBRARIES, FOLDED), where))
    for base in (UNFUSED, COPY):
        entries.append(compared(with_auto(additions), AUTO, (AUTO,), base, (base,), "add_relu"))
    entries.append(compared(additions, OURS, ours, COPY, (COPY,), "add_relu"))
    # a copy is what memory allows, nobody's competitor
    return [{**entry, "losses": []} if entry["against"] == COPY else entry for entry in entries if entry is not None]


def with_auto(rows: Sequence[Row]) -> list[Row]:
    """The rows with the variant that `auto` chooses once more, as AUTO."""
    found = []
    for row in rows:
        chosen = row["variants"].get(chosen_by_auto(row))
        found.append({**row, "variants": {**row["variants"], AUTO: chosen}} if chosen else row)
    return found


def chosen_by_auto(row: Row) -> str:
    """The variant that `auto` chooses, which was not timed if it was wrong."""
    return FOLDED if _BY_ORIGIN.get(row["auto"]) == "torch" else row["auto"]


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """All rows; the large batches where there are others too; each batch and dtype where there are several."""
    yield "all", list(rows)
    large = [row for row in rows if row["batch"] >= LARGE_BATCH]
    if 0 < len(large) < len(rows):
        yield f"batch >= {LARGE_BATCH}", large
    kinds = dict.fromkeys((row["batch"], row["dtype"]) for row in rows)
    if len(kinds) > 1:
        for batch, dtype in kinds:
            yield f"batch {batch}, {dtype}", [row for row in rows if (row["batch"], row["dtype"]) == (batch, dtype)]


def summarise_rows(kind: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The entries of a summary over the rows of a benchmark of operators ("bench ops"), or of networks. Rows without
    times have none."""
    return summarise_ops(rows) if kind == "bench ops" else summarise_networks(rows)


def summarise_networks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each of our variants beside eager NCHW fp32, and beside the fastest competitor in its own dtype."""
    names = {name: None for row in rows for name in row.get("variants", ())}
    entries = []
    for name in names:
        if not is_ours(name):
            continue
        entries.append(compared(rows, name, (name,), BASE, (BASE,)))
        dtype = name.split()[1]
        present = [word for word in COMPETITORS if f"{word} {dtype}" in names]
        label = f"the best of {', '.join(present)} in {dtype}"
        entries.append(compared(rows, name, (name,), label, [f"{word} {dtype}" for word in present]))
    return [entry for entry in entries if entry is not None]


def is_ours(variant: str) -> bool:
    """Whether a variant of a network is this package's: "frozen bf16 triton", "fused fp32"."""
    return variant.split()[0] in ("frozen", "fused")


def rival_of(variant: str, variants: dict[str, dict[str, Any]]) -> tuple[str, float]:
    """(the fastest variant of a network in the same dtype that is not ours, our speed-up over it).

    ("", inf) for a variant that is not ours, or has no rival.
    """
    words = variant.split()
    rivals = [name for name in variants if not is_ours(name) and words[1] in name.split()] if is_ours(variant) else []
    if not rivals:
        return "", math.inf
    fastest = min(rivals, key=lambda name: variants[name]["median_us"])
    return fastest, variants[fastest]["median_us"] / variants[variant]["median_us"]


def summarise_tuning(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Speedups of the winners over the fixed order: geometric mean, best, how many changed; and what was wrong."""
    speedups = [row["speedup"] for row in rows if row["speedup"] is not None]
    return {
        "convolutions": len(rows),
        "changed": sum(row["winner"] not in (None, row["default"]) for row in rows),
        "geomean_speedup": math.exp(sum(map(math.log, speedups)) / len(speedups)) if speedups else None,
        "best_speedup": max(speedups, default=None),
        "wrong": sum(len(row["wrong"]) for row in rows),
        "failed": sum(len(row["failed"]) for row in rows),
    }
