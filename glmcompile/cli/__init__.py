"""The command line: one module a command, imported when its command is asked for.

The modules are light, so that help stays quick: what a command works with, it imports as it runs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from glmcompile.errors import GlmcompileError

# In the order of use. The module of this name holds the command as `command`.
COMMANDS = ("plan", "compile", "run", "serve", "bench", "inspect")
_EXTRAS = {"serve": "serve", "bench": "bench"}  # that have what a command imports
_EXTRAS_OF_PACKAGES = {"ray": "replicas"}  # that only an option imports


class _Commands(click.Group):
    """Loads a command by its name, and turns the errors meant for users into one line on stderr.

    Their exit code is 2.
    """

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"glmcompile.cli.{name}").command
        return command

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except GlmcompileError as error:
            click.echo(f"error: {error}", err=True)
            context.exit(2)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package == "glmcompile":
                raise
            command = _EXTRAS.get(context.invoked_subcommand or "", "compile")
            extra = _EXTRAS_OF_PACKAGES.get(package, command)
            click.echo(
                f"error: this command needs the package {error.name}; "
                f"install it with `pip install 'glmcompile[{extra}]'`.",
                err=True,
            )
            context.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted; nothing was written.", err=True)
            context.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="glmcompile")
def main() -> None:
    """Compile vision-language checkpoints to INT8 engines with a paged KV cache, and run them."""
