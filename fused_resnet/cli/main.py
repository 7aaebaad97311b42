"""The command line, `fused-resnet` or `python -m fused_resnet`: one module of this folder per verb.

Results go to stdout, as tables or with --json as one JSON document; progress and errors go to stderr.
Exit codes: 0, 1 for a mismatch or a failure, 2 for wrong arguments, 130 when interrupted.
"""

from __future__ import annotations

from typing import Optional, Sequence

import click

import fused_resnet
from fused_resnet import backends
from fused_resnet.cli.bench import bench_group
from fused_resnet.cli.evaluate import evaluate
from fused_resnet.cli.explain import explain
from fused_resnet.cli.info import info
from fused_resnet.cli.report import report
from fused_resnet.cli.train import train
from fused_resnet.cli.tune import tune
from fused_resnet.cli.verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fused_resnet.__version__, prog_name="fused-resnet")
def cli() -> None:
    """Fused residual networks: what works here, is it right, is it fast."""


for _command in (info, explain, verify, evaluate, train, tune, bench_group, report):
    cli.add_command(_command)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        return cli.main(arguments, prog_name="fused-resnet", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except (backends.BackendError, ValueError, TypeError, OSError) as error:
        click.echo(f"fused-resnet: {error}", err=True)
        return 1
