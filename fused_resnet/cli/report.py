"""`fused-resnet report`: records of benchmarks as one page."""

from __future__ import annotations

from pathlib import Path

import click

from fused_resnet.reporting import report as reports


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("report.html"), show_default=True,
              help="The page.")  # fmt: skip
@click.option("--markdown", is_flag=True, help="Also write the tables as Markdown, beside the page, in .md.")
@click.pass_context
def report(ctx, files: tuple[Path, ...], out: Path, markdown: bool) -> None:
    """Turn JSON files of `bench`, the demo and gpu-check into one HTML page that needs no network.

    Folders stand for the .json files in them. A file that cannot be used is named on stderr and in the page; the exit
    code is 1 when none can.
    """
    found = [file for one in files for file in (sorted(one.glob("**/*.json")) if one.is_dir() else [one])]
    made = reports.read(found)
    for sentence in made.unusable:
        click.echo(f"report: {sentence}", err=True)
    if not made.sections:
        click.echo("report: no file that can be reported.", err=True)
        ctx.exit(1)
    pages = {out: reports.html(made)}
    if markdown:
        pages[out.with_suffix(".md")] = reports.markdown(made)
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        click.echo(f"{path}: {len(made.sections)} of {len(found)} files, {len(made.losses)} losses")
