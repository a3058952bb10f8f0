"""A whole known sequence through an engine's graphs at once: to calibrate, evaluate and trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from glmcompile.contract import DECODER, VISION, Contract
from glmcompile.errors import InputError
from glmcompile.rules import position_ids
from glmcompile.runtime.feeds import Stretch, decoder_feeds, vision_feeds
from glmcompile.runtime.image_processor import ProcessedImage
from glmcompile.runtime.input_processor import InputProcessor, Prompt
from glmcompile.runtime.kv_cache import KVCacheShape
from glmcompile.runtime.model_runner import cache_dtype
from glmcompile.targets.cpu import open_session

BLOCK_SIZE = 32


class AnswerEncoder:
    """Prompts with known answers to tokens, through a directory's prompt and image processing."""

    def __init__(self, directory: Path, model: Contract) -> None:
        self._inputs = InputProcessor(directory, model)
        self._limit = model.context_length

    def __call__(
        self, prompt: str, answer: str, images: Sequence[Any] = ()
    ) -> tuple[list[int], list[ProcessedImage], int]:
        """Token ids of prompt and answer, the images, and where the predicted tokens begin.

        Cut where the context ends. Without prompt and images the answer is plain text, of which
        every token but the first is predicted.
        Raises InputError for what an engine would refuse.
        """
        prompts = self._inputs.prompts
        if not prompt and not images:
            ids = prompts.encode(prompts.whole(answer))
            if len(ids) < 2:
                raise InputError(f"the text {answer!r} has nothing to predict; leave it out")
            return ids[: self._limit], [], 1
        ready = self._inputs(Prompt(prompt=prompt, images=images))
        # An engine, too, ends the prompt's last token before the answer begins.
        ids = ready.token_ids + prompts.tokenizer.encode(answer, add_special_tokens=False).ids
        return ids[: self._limit], [span.image for span in ready.images], len(ready.token_ids)


class TeacherForcing:
    """Runs the component graphs of a directory on one sequence a call, with a cache of its own."""

    def __init__(
        self,
        directory: Path,
        model: Contract,
        threads: int | None = None,
        profile: Path | None = None,
    ) -> None:
        """profile: a folder for the sessions' traces, see open_session.

        Raises NativeLibraryError where the native operators cannot be loaded.
        """
        self.model = model
        self.sessions = {
            component: open_session(
                directory / f"{component}.onnx", threads, profile and profile / component
            )
            for component in model.components
        }

    def __call__(
        self,
        token_ids: Sequence[int],
        images: Sequence[ProcessedImage] = (),
        rows: Sequence[int] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Every output of every component for `token_ids`, image placeholders included.

        rows: positions whose logits are wanted, all of them by default; `logits` comes out as
        float32 [rows, vocab_size].
        """
        ids = np.asarray(token_ids, np.int64)
        grids = np.array([image.grid_thw for image in images], np.int64).reshape(-1, 3)
        outputs = self.encode(images)
        features = outputs.get(self.model.encoder.outputs[0].name) if images else None
        positions, _ = position_ids(self.model, ids, grids)
        blocks = np.arange(-(-len(ids) // BLOCK_SIZE), dtype=np.int32)
        wanted = None if rows is None else np.asarray(rows, np.int64)
        stretch = Stretch(0, len(ids), ids, positions, blocks, features)
        decoder = self.sessions[DECODER]
        shape = KVCacheShape(self.model, BLOCK_SIZE, cache_dtype(decoder))
        caches = [*shape.pools(len(blocks)), *shape.states(1)]
        inputs = decoder_feeds(self.model, [stretch], wanted)
        return outputs | _run(decoder, inputs | dict(caches))

    def encode(self, images: Sequence[ProcessedImage]) -> dict[str, NDArray[Any]]:
        """Every output of the vision encoder, one image after the other; empty without images."""
        runs = []
        for image in images:
            runs.append(_run(self.sessions[VISION], vision_feeds(self.model, image)))
        if not runs:
            return {}
        return {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}


def _run(session: ort.InferenceSession, inputs: dict[str, Any]) -> dict[str, NDArray[Any]]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))
