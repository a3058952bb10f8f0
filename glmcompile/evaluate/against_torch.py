"""An engine's outputs against its checkpoint's torch modules, which need memory for one layer only.

For models whose float32 engine does not fit. Needs the extra `compile`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.artifact import Artifact
from glmcompile.bench.machine import available_memory
from glmcompile.checkpoint import Checkpoint, open_checkpoint
from glmcompile.compiler import reference
from glmcompile.compiler.activations import Activations
from glmcompile.compiler.calls import DECODER, OUTPUTS, TORCH, VISION
from glmcompile.compiler.comparison import relative_error
from glmcompile.compiler.geometry import geometry
from glmcompile.compiler.needs import Load, prompt_of, space
from glmcompile.compiler.samples import Sample
from glmcompile.compiler.timing import HASHING_CHECKPOINT, RUNNING_TORCH
from glmcompile.errors import InputError
from glmcompile.evaluate import metrics
from glmcompile.evaluate.samples import EvaluationSample
from glmcompile.progress import Progress
from glmcompile.runtime.engine import Engine
from glmcompile.runtime.teacher_forcing import AnswerEncoder, TeacherForcing

# Texts are cut here, and a compared sample costs logits of a whole vocabulary for every token.
TEXT_TOKENS = 256


def open_baseline(artifact: Artifact, checkpoint: Path, progress: Progress) -> Checkpoint:
    """The checkpoint that an engine was compiled from; its files are hashed for that.

    Raises CheckpointError as compiling would, and InputError for another one.
    """
    source = open_checkpoint(checkpoint)
    total = sum(file.stat().st_size for file in source.files)
    found = source.hash(progress.stage(HASHING_CHECKPOINT, total))
    if (adapter := artifact.manifest.get("adapter")) is not None:
        raise InputError(
            f"{artifact.path} has the adapter {adapter} merged into it, which {checkpoint} has "
            "not; give an fp32 engine that was compiled with it as the baseline."
        )
    if found != artifact.manifest["source"]["sha256"]:
        raise InputError(
            f"{artifact.path} was compiled from another checkpoint than {checkpoint} "
            f"({artifact.manifest['source']['name']}); give the engine's own as the baseline."
        )
    return source


def compare_with_torch(
    engine: Engine, source: Checkpoint, samples: Sequence[EvaluationSample], progress: Progress
) -> dict[str, Any]:
    """Errors of the engine's outputs on the known answers of `samples`, JSON-serialisable.

    "relative_error": of "image_features" and "logits", root mean squares of the difference over
    those of torch's. "memory": bytes that a float32 engine would need and that are available.
    "teacher_forcing": perplexities, top-1 agreement and KL, as evaluate gives them; left out where
    torch itself predicts as if by chance, which is what random weights do.
    """
    encode = AnswerEncoder(engine.path, engine.model)
    encoded = [encode(each.prompt, each.answer, each.images) for each in samples]
    cut = [
        (ids if images else ids[: max(TEXT_TOKENS, first + 1)], images, first)
        for ids, images, first in encoded
    ]
    expected = _torch_outputs(source, cut, progress)
    model = TeacherForcing(engine.path, engine.model, engine.options.threads)
    done = progress.stage("Comparing with torch", len(cut))
    features, logits = [], []
    for number, (ids, images, first) in enumerate(cut, 1):
        outputs = model(ids, images, range(first - 1, len(ids) - 1))
        logits.append(outputs[OUTPUTS[DECODER]])
        if images:
            features.append(outputs[OUTPUTS[VISION]])
        done(number)
    actual = {OUTPUTS[DECODER]: np.concatenate(logits)}
    if features:
        actual = {OUTPUTS[VISION]: np.concatenate(features)} | actual
    needed = space(geometry(source), source.model, "fp32", prompt_of(source, None), Load())
    targets = np.concatenate([np.asarray(ids[first:], np.int64) for ids, _, first in cut])
    return {
        "samples": len(cut),
        "tokens": len(targets),
        "relative_error": {
            name: relative_error(expected[name], value, expected[name])
            for name, value in actual.items()
        },
        "memory": {"fp32_engine": needed.serve_memory, "available": available_memory()},
    } | predictions(expected[OUTPUTS[DECODER]], actual[OUTPUTS[DECODER]], targets)


def _torch_outputs(
    source: Checkpoint, encoded: Sequence[tuple[list[int], list[Any], int]], progress: Progress
) -> dict[str, NDArray[np.float32]]:
    """Torch's image features, where there are images, and its logits of the answers' tokens."""
    packed = [Sample(np.asarray(ids, np.int64), tuple(images)) for ids, images, _ in encoded]
    starts = np.cumsum([0, *(len(ids) for ids, _, _ in encoded)])
    rows = np.concatenate(
        [
            start + np.arange(first - 1, len(ids) - 1)
            for start, (ids, _, first) in zip(starts[:-1], encoded, strict=True)
        ]
    )
    wanted = [OUTPUTS[DECODER]]
    if any(images for _, images, _ in encoded):
        wanted.append(OUTPUTS[VISION])
    with tempfile.TemporaryDirectory() as folder:
        values = Activations(Path(folder))
        advance = progress.stage(RUNNING_TORCH, reference.layer_count(source))
        reference.compute(source, packed, values, advance, layers=False, rows=rows)
        return {name: np.array(values.read(TORCH, name)) for name in wanted}


def predictions(
    expected: NDArray[np.float32], actual: NDArray[np.float32], targets: NDArray[np.int64]
) -> dict[str, Any]:
    scores = metrics.score(expected, actual, targets)
    perplexity = metrics.perplexity(metrics.negative_log_likelihood(expected, targets))
    if perplexity > expected.shape[1] / 2:
        return {}
    return {
        "teacher_forcing": {
            "perplexity": {"torch": perplexity, "engine": metrics.perplexity(scores.nll)},
            "top1_agreement": float(scores.agrees.mean()),
            "kl_divergence": float(scores.kl.mean()),
        }
    }
