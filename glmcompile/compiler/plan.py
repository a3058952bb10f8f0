"""What a checkpoint will need, before it is compiled: disk, memory and time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from glmcompile.calibrate.samples import recipe_samples
from glmcompile.checkpoint import open_checkpoint
from glmcompile.compiler.geometry import geometry
from glmcompile.compiler.needs import load_of, prompt_of, space
from glmcompile.compiler.timing import latency, measure, stages
from glmcompile.quantize.schemes import DEFAULT_RECIPE, load_recipe
from glmcompile.targets.cpu import default_threads

PRECISIONS = ("fp32", "int8")


def predict(
    checkpoint: str | Path,
    image: tuple[int, int] = (1080, 2400),
    threads: int | None = None,
    recipe: str | Path = DEFAULT_RECIPE,
    calibration: str | Path | None = None,
) -> dict[str, Any]:
    """Everything of a checkpoint, JSON-serialisable; takes a few seconds.

    image: width and height of the screenshot that latency is predicted for. recipe, calibration: as
    they are to be compiled with.
    Raises CheckpointError, UnsupportedArchitectureError or CalibrationError as compiling would.
    """
    source = open_checkpoint(checkpoint)
    shapes, model = geometry(source), source.model
    prompt = prompt_of(source, image)
    plan = load_recipe(recipe)
    load = load_of(source, plan, recipe_samples(source.model, plan, calibration))
    on = measure(source, shapes, prompt, image, threads or default_threads())
    precisions = {}
    for precision in PRECISIONS:
        needs = space(shapes, model, precision, prompt, load)
        time = latency(shapes, model, precision, prompt, on)
        compiling = stages(source, shapes, precision, load, on)
        precisions[precision] = {
            "space": {**asdict(needs), "serve_memory": needs.serve_memory},
            "time": {"compile": sum(compiling.values()), **asdict(time)},
            "stages": compiling,
        }
    return {
        "parameters": shapes.parameters,
        "prompt": asdict(prompt),
        "calibration": asdict(load),
        "machine": asdict(on),
        "precisions": precisions,
    }
