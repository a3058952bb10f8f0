"""`glmcompile inspect`: what an engine holds."""

from __future__ import annotations

import json
from pathlib import Path

import click

from glmcompile.cli.arguments import ENGINE
from glmcompile.errors import ArtifactError


@click.command("inspect")
@ENGINE
@click.option("--json", "as_json", is_flag=True, help="Print the whole manifest as JSON.")
def command(engine: Path, as_json: bool) -> None:
    """Verify ENGINE and say what it holds."""
    from glmcompile.artifact import MANIFEST, open_artifact

    artifact = open_artifact(engine)
    if as_json:
        click.echo(json.dumps(artifact.manifest, indent=1))
        return
    from rich.console import Console

    from glmcompile.report import describe

    try:
        description = describe(artifact)
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # fields no runtime needs
        raise ArtifactError(
            f"{engine / MANIFEST}: damaged ({error!r}); compile the checkpoint again."
        ) from error
    Console().print(description)
