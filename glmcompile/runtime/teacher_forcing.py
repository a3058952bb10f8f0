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
        outputs: dict[str, NDArray[Any]] = {}
        embedding_inputs = {"input_ids": ids}
        grids = np.array([image.grid_thw for image in images], np.int64).reshape(-1, 3)
        if self.model.vision is not None:
            outputs |= self.encode(images)
            features = outputs.get(
                "image_features", np.empty((0, self.model.hidden_size), np.float32)
            )
            embedding_inputs["image_features"] = features
            embedding_inputs["image_token_indices"] = np.flatnonzero(
                ids == self.model.image_token_id
            ).astype(np.int64)
        outputs |= _run(self.sessions["embedding"], embedding_inputs)
        positions, _ = self.family.position_ids(ids, grids, self.model)
        blocks = -(-len(ids) // BLOCK_SIZE)
        inputs = {
            "inputs_embeds": outputs["inputs_embeds"],
            "position_ids": positions if self.model.position_axes > 1 else positions[0],
            "cumulative_sequence_length": np.array([0, len(ids)], np.int32),
            "past_seqlens": np.zeros(1, np.int32),
            "block_table": np.arange(blocks, dtype=np.int32)[None],
            "logits_indices": np.asarray(range(len(ids)) if rows is None else rows, np.int64),
        }
        decoder = self.sessions["decoder"]
        dtype = cache_dtype(decoder)
        shape = (blocks, BLOCK_SIZE, self.model.num_kv_heads, self.model.head_size)
        inputs |= {
            each.name: np.zeros(shape, dtype)
            for each in decoder.get_inputs()
            if "_cache." in each.name
        }
        return outputs | _run(decoder, inputs)

    def encode(self, images: Sequence[ProcessedImage]) -> dict[str, NDArray[Any]]:
        """Every output of the vision encoder; empty without images."""
        if not images:
            return {}
        assert self.family.vision_inputs is not None and self.model.vision is not None
        grids = np.array([image.grid_thw for image in images], np.int64)
        pixels = np.concatenate([image.pixel_values for image in images])
        inputs = self.family.vision_inputs(grids, self.model.vision)
        return _run(self.sessions["vision_encoder"], {"pixel_values": pixels, **inputs})


def _run(session: ort.InferenceSession, inputs: dict[str, Any]) -> dict[str, NDArray[Any]]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))
