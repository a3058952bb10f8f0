"""`glmcompile compile`: a checkpoint to an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from glmcompile.cli.arguments import CALIBRATION, CHECKPOINT, RECIPE, TARGET
from glmcompile.cli.progress import TerminalProgress


@click.command("compile")
@CHECKPOINT
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Engine directory."
)
@click.option(
    "--precision",
    type=click.Choice(["int8", "fp32"]),
    default="int8",
    show_default=True,
    help="int8: W8A8 linear layers, int8 embedding and lm_head, as the recipe says.",
)
@RECIPE
@CALIBRATION
@TARGET
@click.option(
    "--kv-dtype",
    type=click.Choice(["int8", "fp32"]),
    help="Type of the KV cache; default: int8 for an int8 engine, fp32 for an fp32 one.",
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="Directory of a LoRA adapter, as PEFT writes it, that is merged into the weights.",
)
@click.option("--overwrite", is_flag=True, help="Replace the engine that stands at the output.")
def command(checkpoint: Path, output: Path, calibration: Path | None, **options: Any) -> None:
    """Compile CHECKPOINT, a Hugging Face directory or a GGUF file, to an engine.

    The directory holds config.json, safetensors weights, tokenizer, processor and chat template.
    Weights that were quantized before (GPTQ, AWQ, compressed-tensors, FP8) are dequantized first.
    Nothing is downloaded. The engine appears at the output only when it is complete; a compile that
    was interrupted goes on where it was when the same command is run again.

    \b
    glmcompile compile AutoGLM-Phone-9B -o phone.engine
    glmcompile compile AutoGLM-Phone-9B -o phone.fp32 --precision fp32
    glmcompile compile SmolLM2-135M-Instruct.Q4_1.gguf -o smollm2.engine
    """
    try:
        with TerminalProgress(time_left=True) as progress:
            from glmcompile.compiler import compile_checkpoint

            compile_checkpoint(
                checkpoint, output, calibration=calibration, progress=progress, **options
            )
    except KeyboardInterrupt:
        from glmcompile.artifact import store_path

        store = store_path(output)
        if not store.exists():
            raise
        click.echo(
            f"interrupted; run the same command again to go on, or remove {store}.", err=True
        )
        click.get_current_context().exit(130)
    from glmcompile.artifact import open_artifact

    artifact = open_artifact(output, verify=False)
    click.echo(f"{output}: {artifact.size / 2**20:.1f} MiB")
