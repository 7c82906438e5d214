"""The command `pom-ext`."""

import typer

from .common import friendly_errors
from .distill import distill
from .draw import sample
from .options import flatten_groups
from .tools import bench, demo, doctor
from .train import train
from .video import export, play, stream

app = typer.Typer(
    help="PoM: train and sample diffusion transformers whose cost is linear in tokens.", no_args_is_help=True
)
for command in (demo, train, distill, sample, stream, play, export):
    app.command()(friendly_errors(flatten_groups(command)))
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command(context_settings=PASS_THROUGH)(friendly_errors(bench))
app.command()(friendly_errors(doctor))


def main():
    """Entry point of the command."""
    app()
