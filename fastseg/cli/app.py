"""The commands and what they share."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import fastseg
from fastseg._info import cpu_isa
from fastseg.cli.check import check
from fastseg.cli.compare import compare
from fastseg.cli.demo import demo
from fastseg.cli.evaluate import evaluate
from fastseg.cli.explain import explain
from fastseg.cli.export import export
from fastseg.cli.predict import predict
from fastseg.cli.train import train
from fastseg.training import ConfigError

app = typer.Typer(
    help="Image segmentation on fused kernels: check the data, train, evaluate, predict, explain, export.",
    add_completion=False,
    pretty_exceptions_enable=False,  # a programming error shows Python's own traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _fastseg(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        typer.echo(f"fastseg {fastseg.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    else:
        try:
            cpu_isa()  # reads FASTSEG_CPU_ISA, which is every command's
        except ValueError as error:
            raise ConfigError(str(error)) from error


@app.command()
def info() -> None:
    """Print versions, kernels and devices, for bug reports."""
    table = Table("", "value", show_header=False)
    for name, value in fastseg.info().items():
        table.add_row(name, str(value))
    Console().print(table)


app.command()(demo)
app.command()(check)
app.command()(train)
app.command()(evaluate)
app.command()(predict)
app.command()(explain)
app.command()(export)
app.command()(compare)
