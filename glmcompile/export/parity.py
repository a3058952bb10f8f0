"""Compare exported components with their torch modules and say where they differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from glmcompile.checkpoint import Checkpoint
from glmcompile.errors import ParityError
from glmcompile.export import reference
from glmcompile.export.reference import Sample, default_samples
from glmcompile.export.tolerances import PARITY
from glmcompile.targets.cpu import open_session

BLOCK_SIZE = 32
# Where the chunked check cuts each sequence: a step boundary in the middle of an image is fine.
CHUNKS = (7, 40)

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Difference:
    """One output compared: errors relative to the root mean square of the torch output.

    where: index of the largest error; expected and actual: the two values there.
    """

    component: str
    output: str
    max_error: float
    mean_error: float
    where: tuple[int, ...]
    expected: float
    actual: float

    @property
    def within_tolerance(self) -> bool:
        bound = PARITY[self.component]
        return self.max_error <= bound.max_error and self.mean_error <= bound.mean_error


@dataclass(frozen=True)
class ParityReport:
    """Every comparison made, in the order of the components."""

    differences: tuple[Difference, ...]

    def to_json(self) -> list[dict[str, Any]]:
        return [vars(difference) for difference in self.differences]


def check_parity(
    checkpoint: Checkpoint, directory: Path, samples: Sequence[Sample] | None = None
) -> ParityReport:
    """Compare the lowered graphs `<component>.onnx` of a directory with transformers.

    Each component gets the torch outputs of the one before it, so an error stays where it arises.
    The vision encoder and the decoder take all samples packed in one call; the decoder also takes
    them in chunks over a paged cache. transformers takes each sample alone.
    Raises ParityError naming the component, the output and the place of the largest error.
    """
    samples = default_samples(checkpoint) if samples is None else list(samples)
    differences = []
    features = [np.empty((0, checkpoint.model.hidden_size), np.float32) for _ in samples]
    if checkpoint.model.vision is not None:
        features = reference.vision_features(checkpoint, samples)
        session = open_session(directory / "vision_encoder.onnx")
        [actual] = session.run(["image_features"], _vision_inputs(checkpoint, samples))
        expected = np.concatenate(features)
        differences.append(compare("vision_encoder", "image_features", expected, actual))
    embeds = reference.embeddings(checkpoint, samples, features)
    session = open_session(directory / "embedding.onnx")
    [actual] = session.run(["inputs_embeds"], _embedding_inputs(checkpoint, samples, features))
    differences.append(compare("embedding", "inputs_embeds", np.concatenate(embeds), actual))

    logits = reference.logits(checkpoint, samples, embeds)
    session = open_session(directory / "decoder.onnx")
    longest = max(len(sample.token_ids) for sample in samples)
    for name, cuts in (("logits", (longest,)), ("logits (in chunks)", CHUNKS)):
        actual = run_decoder(session, checkpoint, samples, embeds, cuts)
        differences.append(compare("decoder", name, np.concatenate(logits), actual))

    for difference in differences:
        if not difference.within_tolerance:
            raise ParityError(_describe(difference))
    return ParityReport(tuple(differences))


def compare(
    component: str, output: str, expected: NDArray[np.float32], actual: NDArray[np.float32]
) -> Difference:
    """Errors of one output. Raises ParityError when the shapes differ."""
    if expected.shape != actual.shape:
        raise ParityError(
            f"{component}: {output} has shape {list(actual.shape)}; "
            f"torch gives {list(expected.shape)}"
        )
    error = np.abs(actual.astype(np.float64) - expected)
    error[~np.isfinite(actual)] = np.inf
    scale = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64)))) or 1.0
    where = np.unravel_index(int(error.argmax()), error.shape)
    return Difference(
        component,
        output,
        max_error=float(error[where]) / scale,
        mean_error=float(error.mean()) / scale,
        where=tuple(int(index) for index in where),
        expected=float(expected[where]),
        actual=float(actual[where]),
    )


def _describe(difference: Difference) -> str:
    bound = PARITY[difference.component]
    return (
        f"{difference.component}: {difference.output} differs from torch by up to "
        f"{difference.max_error:.2g} (mean {difference.mean_error:.2g}) of its root mean square, "
        f"allowed {bound.max_error:.2g} (mean {bound.mean_error:.2g}); worst at "
        f"{list(difference.where)}: {difference.actual:.6g} instead of {difference.expected:.6g}"
    )


def _vision_inputs(checkpoint: Checkpoint, samples: Sequence[Sample]) -> Arrays:
    family, vision = checkpoint.family, checkpoint.model.vision
    assert family.vision_inputs is not None
    assert vision is not None
    grids = np.concatenate([sample.grid_thw for sample in samples])
    pixels = [sample.pixel_values for sample in samples if len(sample.grid_thw)]
    return {"pixel_values": np.concatenate(pixels), **family.vision_inputs(grids, vision)}


def _embedding_inputs(
    checkpoint: Checkpoint, samples: Sequence[Sample], features: Sequence[NDArray[np.float32]]
) -> Arrays:
    ids = np.concatenate([sample.token_ids for sample in samples])
    if checkpoint.model.vision is None:
        return {"input_ids": ids}
    indices = np.flatnonzero(ids == checkpoint.model.image_token_id).astype(np.int64)
    return {
        "input_ids": ids,
        "image_features": np.concatenate(features),
        "image_token_indices": indices,
    }


def run_decoder(
    session: ort.InferenceSession,
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    embeds: Sequence[NDArray[np.float32]],
    cuts: Sequence[int],
) -> NDArray[np.float32]:
    """Logits [all tokens, vocab] of the samples packed together, prefilled up to each cut in turn.

    The cache's blocks are handed out in a shuffled order, the block table padded with -1.
    """
    model = checkpoint.model
    lengths = [len(sample.token_ids) for sample in samples]
    positions = [
        checkpoint.family.position_ids(sample.token_ids, sample.grid_thw, model)[0]
        for sample in samples
    ]
    table, num_blocks = _block_table(lengths)
    shape = (num_blocks, BLOCK_SIZE, model.num_kv_heads, model.head_size)
    caches = {
        argument.name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
        for argument in session.get_inputs()
        if "_cache." in argument.name
    }
    pieces: list[list[NDArray[np.float32]]] = [[] for _ in samples]
    done = np.zeros(len(samples), np.int32)
    for cut in (*cuts, max(lengths)):
        stop = np.minimum(cut, lengths).astype(np.int32)
        active = [index for index in range(len(samples)) if stop[index] > done[index]]
        if not active:
            continue
        spans = [slice(done[index], stop[index]) for index in active]
        counts = stop[active] - done[active]
        axes = np.concatenate([positions[i][:, s] for i, s in zip(active, spans, strict=True)], 1)
        feeds: Arrays = {
            "inputs_embeds": np.concatenate(
                [embeds[i][s] for i, s in zip(active, spans, strict=True)]
            ),
            "position_ids": axes if model.position_axes > 1 else axes[0],
            "cumulative_sequence_length": np.concatenate([[0], counts.cumsum()]).astype(np.int32),
            "past_seqlens": done[active],
            "block_table": table[active],
            "logits_indices": np.arange(counts.sum(), dtype=np.int64),
        }
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in feeds.items()
        }
        [output] = session.run_with_ort_values(["logits"], values | caches)
        rows = np.split(output.numpy(), counts.cumsum()[:-1])
        for index, piece in zip(active, rows, strict=True):
            pieces[index].append(piece)
        done = np.maximum(done, stop)
    return np.concatenate([piece for sample in pieces for piece in sample])


def _block_table(lengths: Sequence[int]) -> tuple[NDArray[np.int32], int]:
    """A block table int32 [sequences, most blocks] over shuffled blocks, and their number."""
    needed = [-(-length // BLOCK_SIZE) for length in lengths]
    blocks = np.random.default_rng(0).permutation(sum(needed)).astype(np.int32)
    table = np.full((len(lengths), max(needed)), -1, np.int32)
    for row, (start, count) in enumerate(zip(np.cumsum([0, *needed]), needed, strict=False)):
        table[row, :count] = blocks[start : start + count]
    return table, sum(needed)
