"""`fused-resnet verify`: random problems against the fp64 reference."""

from __future__ import annotations

from typing import Any, Optional, Sequence

import click
import torch

from fused_resnet import backends, testing
from fused_resnet.cli.console import (
    Listed,
    as_json_option,
    device_option,
    new_table,
    print_json,
    progress_on_stderr,
    stdout_console,
)
from fused_resnet.emulation import verify as emulated


def _backend_names() -> list[str]:
    operators = ("conv_bn_act", "add_relu", "conv_int8", "conv_float8")
    return list(dict.fromkeys(name for op in operators for name in backends.known(op)))


@click.command()
@click.option("--problems", type=click.IntRange(min=1), default=200, show_default=True, help="How many to draw.")
@click.option("--seed", type=int, default=0, show_default=True)
@device_option
@click.option("--backend", "chosen", multiple=True, type=Listed("backend", _backend_names),
              help="Repeat for several; default, all.")  # fmt: skip
@click.option("--common", "kind", flag_value="common",
              help="Only 1x1 and 3x3 convolutions as plans of ResNets have them.")  # fmt: skip
@click.option("--strided", "kind", flag_value="strided",
              help="Only bf16 convolutions with strides to 4 on maps of 1 to 33 columns.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["int8", "float8_e4m3fn"]), default=None,
              help="Convolutions of bytes, which must be the reference's (oneDNN's: within a bound); or of "
                   "e4m3.")  # fmt: skip
@click.option("--emulate", type=click.Choice([f"sm_{arch}" for arch in emulated.ARCHITECTURES]), default=None,
              help="Run the compiled kernels in the PTX emulator, as this GPU would.")  # fmt: skip
@click.option("--kernel", "kernels", multiple=True, type=Listed("kernel", lambda: emulated.known_names()),
              help="With --emulate; repeat for several; default, all.")  # fmt: skip
@click.option("--large/--no-large", default=None,
              help="Also convolutions beyond 2**31 elements and 4 GiB; default, on a GPU with the memory.")  # fmt: skip
@as_json_option
@click.pass_context
def verify(
    ctx, problems: int, seed: int, device: str, chosen: tuple[str, ...], kind: str, dtype: Optional[str],
    emulate: Optional[str], kernels: tuple[str, ...], large: Optional[bool], as_json: bool,
) -> None:  # fmt: skip
    """Random problems on every backend against the fp64 reference. Exit code 1 when one differs.

    A backend or kernel asked for by name that could not run a single problem is a failure too.
    """
    if dtype is not None:
        if kind or large:
            raise click.UsageError("--dtype draws problems of its own: leave out --common, --strided and --large.")
        kind, large = dtype, False
    if emulate is not None:
        return _verify_emulated(ctx, emulate, problems, seed, chosen, kind or "any", kernels, as_json)
    if kernels:
        raise click.UsageError("--kernel names emulated kernels: it needs --emulate.")
    with progress_on_stderr(f"verify on {device}") as progress:
        report = testing.verify(
            problems, seed, device, chosen or None,
            progress=lambda index: progress((index + 1) / problems, f"{index + 1}/{problems}"), kind=kind or "any",
            large=torch.device(device).type == "cuda" if large is None else large,
        )  # fmt: skip
    idle = [name for name in chosen if not any(_ran(entry) for key, entry in report.backends.items()
                                               if key.split("/")[1] == name)]  # fmt: skip
    if as_json:
        print_json({**report.as_dict(), "asked_for_but_never_ran": idle})
    else:
        _show_report(report, "operator/backend")
        for name in idle:
            click.echo(f"verify: backend {name!r} could not run any of these problems.", err=True)
    has_run = any(map(_ran, report.backends.values()))
    if not has_run:
        click.echo(f"verify: nothing ran on {device}; --emulate sm_80 needs no GPU.", err=True)
    ctx.exit(0 if report.passed and has_run and not idle else 1)


def _verify_emulated(ctx, emulate, problems, seed, chosen, kind, kernels, as_json) -> None:
    if chosen:
        raise click.UsageError("--emulate runs kernels, not backends: name them with --kernel.")
    if reason := emulated.why_not(kernels):
        raise click.ClickException(reason)
    arch = int(emulate.removeprefix("sm_"))
    with progress_on_stderr(f"verify on an emulated {emulate}") as progress:
        report = emulated.verify(
            problems, seed, arch, kernels, kind=kind,
            progress=lambda index: progress((index + 1) / problems, f"{index + 1}/{problems}"),
        )  # fmt: skip
    ran = {part for name, entry in report.backends.items() if _ran(entry) for part in (name, *name.split("/"))}
    idle = [name for name in kernels if name not in ran]
    if as_json:
        print_json({**report.as_dict(), "asked_for_but_never_ran": idle})
    else:
        _show_report(report, "kernel")
        _show_idle_kernels(report, emulated.chosen_kernels(kernels))
        for name in idle:
            click.echo(f"verify: kernel {name!r} could not run any of these problems.", err=True)
    ctx.exit(0 if report.passed and not idle else 1)


def _ran(entry: Any) -> int:
    return entry.ok + len(entry.mismatches)


def _show_idle_kernels(report: testing.Report, kernels: Sequence[str]) -> None:
    """One line: those that never ran, by the reason that most problems had."""
    idle: dict[str, list[str]] = {}
    for name in kernels:
        entry = report.backends.get(name)
        if entry is None:
            idle.setdefault("no problem of theirs was drawn", []).append(name)
        elif not _ran(entry):
            idle.setdefault(max(entry.cannot_run, key=lambda why: entry.cannot_run[why]), []).append(name)
    if idle:
        by_reason = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in idle.items())
        stdout_console().print(f"never ran: {by_reason}", markup=False, soft_wrap=True)


def _show_report(report: testing.Report, column: str) -> None:
    entries = report.backends
    title = f"{report.counted_problems}, seed {report.seed}, {report.device}"
    out = stdout_console()
    has_bytes = any(entry.num_bytes for entry in entries.values())
    last = "bytes that differ" if has_bytes else "worst error / bound"
    table = new_table(column, "ok", "mismatches", "not run", last, title=title)
    for name, entry in sorted(entries.items()):
        wrong = f"[bold red]{len(entry.mismatches)}[/]" if entry.mismatches else "0"
        worst = f"{entry.worst_error:.3f}" if entry.ok else "-"
        if has_bytes:
            is_bounded = entry.num_differing and not entry.mismatches
            worst = f"{entry.num_differing:,} of {entry.num_bytes:,}" + (", within its bound" if is_bounded else "")
        table.add_row(name, str(entry.ok), wrong, str(sum(entry.cannot_run.values())), worst)
    if not entries:
        out.print(f"{title}: nothing was compared", markup=False)
        return
    out.print(table)
    for name, entry in sorted(entries.items()):
        for reason, count in sorted(entry.cannot_run.items(), key=lambda item: -item[1]):
            out.print(f"{name}: {count} not run: {reason}", markup=False)
        for mismatch in entry.mismatches:
            lines = (f"MISMATCH {name}: {mismatch['call']}", mismatch["problem"], mismatch["detail"])
            out.print("\n  ".join(lines), markup=False)
    out.print("no mismatch" if report.passed else "[bold red]some results differ from the reference[/]")
