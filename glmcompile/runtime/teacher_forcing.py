"""A whole known sequence through an engine's graphs at once: to calibrate, evaluate and trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from glmcompile.config import ModelConfig
from glmcompile.errors import InputError
from glmcompile.families import supported
from glmcompile.runtime.feeds import (
    Stretch,
    decoder_feeds,
    embedding_feeds,
    is_cache,
    vision_feeds,
)
from glmcompile.runtime.image_processor import ProcessedImage
from glmcompile.runtime.input_processor import InputProcessor, Prompt
from glmcompile.runtime.model_runner import cache_dtype
from glmcompile.targets.cpu import open_session

BLOCK_SIZE = 32


class AnswerEncoder:
    """Prompts with known answers to tokens, through a directory's prompt and image processing."""

    def __init__(self, directory: Path, model: ModelConfig) -> None:
        self._inputs = InputProcessor(directory, supported()[model.family], model)
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
        model: ModelConfig,
        threads: int | None = None,
        profile: Path | None = None,
    ) -> None:
        """profile: a folder for the sessions' traces, see open_session.

        Raises NativeLibraryError where the native operators cannot be loaded.
        """
        self.model = model
        self.family = supported()[model.family]
        self.sessions = {
            component: open_session(
                directory / f"{component}.onnx", threads, profile and profile / component
            )
            for component in self.family.components
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
        embedding = embedding_feeds(self.model, ids, outputs.get("image_features"))
        outputs |= _run(self.sessions["embedding"], embedding)
        positions, _ = self.family.position_ids(ids, grids, self.model)
        blocks = np.arange(-(-len(ids) // BLOCK_SIZE), dtype=np.int32)
        wanted = None if rows is None else np.asarray(rows, np.int64)
        inputs = decoder_feeds(self.model, [Stretch(0, len(ids), positions, blocks)], wanted)
        decoder = self.sessions["decoder"]
        shape = (len(blocks), BLOCK_SIZE, self.model.num_kv_heads, self.model.head_size)
        dtype = cache_dtype(decoder)
        caches = {
            each.name: np.zeros(shape, dtype)
            for each in decoder.get_inputs()
            if is_cache(each.name)
        }
        inputs["inputs_embeds"] = outputs["inputs_embeds"]
        return outputs | _run(decoder, inputs | caches)

    def encode(self, images: Sequence[ProcessedImage]) -> dict[str, NDArray[Any]]:
        """Every output of the vision encoder; empty without images."""
        if not images:
            return {}
        grids = np.array([image.grid_thw for image in images], np.int64)
        pixels = np.concatenate([image.pixel_values for image in images])
        feeds = {"pixel_values": pixels, **vision_feeds(self.family, self.model, grids)}
        return _run(self.sessions["vision_encoder"], feeds)


def _run(session: ort.InferenceSession, inputs: dict[str, Any]) -> dict[str, NDArray[Any]]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))
