"""glmcompile's own engines, through its public interface."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import InferenceSession
from protocol import Clock, serve

import glmcompile
from glmcompile.artifact import open_artifact
from glmcompile.bench.workloads import open_engine
from glmcompile.families import supported
from glmcompile.runtime.image_processor import ImageProcessor
from glmcompile.runtime.sampling_params import SamplingParams
from glmcompile.targets.cpu import open_session


class Glmcompile:
    def prepare(self, checkpoint: str, model: str, precision: str) -> None:
        glmcompile.compile(checkpoint, model, precision=precision, overwrite=True)

    def load(self, checkpoint: str, model: str, threads: int, precision: str) -> dict[str, Any]:
        self._path, self._threads = Path(model), threads
        self._engine = open_engine(self._path, threads)
        return {"precision": precision, "prefix_caching": False}

    def generate(self, requests: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
        self._engine.clear_caches()
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        clock = Clock()
        answers: dict[int, dict[str, Any]] = {}
        for request in requests:
            prompt = {"token_ids": request["token_ids"], "images": request.get("images", ())}
            answers[self._engine.add_request(sampling, **prompt)] = {"tokens": [], "seconds": []}
        while self._engine.has_work:
            for output in self._engine.step():
                if output.error is not None:
                    raise output.error
                answer = answers[output.id]
                answer["tokens"] += output.token_ids
                answer["seconds"] += [clock()] * len(output.token_ids)
                if output.completion is not None and output.completion.timings.vision:
                    answer["vision_seconds"] = output.completion.timings.vision
        return list(answers.values())

    def encode(self, images: list[str]) -> float:
        """Seconds in the vision encoder for the images, one after the other."""
        model = self._engine.model
        family, process = supported()[model.family], self._image_processor
        inputs = []
        for image in map(process, images):
            grid = np.array([image.grid_thw], np.int64)
            pixels = {"pixel_values": image.pixel_values}
            inputs.append({**family.vision_inputs(grid, model.vision), **pixels})
        session = self._vision_session
        began = time.perf_counter()
        for each in inputs:
            session.run(["image_features"], each)
        return time.perf_counter() - began

    @cached_property
    def _image_processor(self) -> ImageProcessor:
        model = self._engine.model
        return ImageProcessor(supported()[model.family], model.vision)

    @cached_property
    def _vision_session(self) -> InferenceSession:
        graph = open_artifact(self._path, verify=False).graph("vision_encoder")
        return open_session(graph, self._threads)


if __name__ == "__main__":
    serve(Glmcompile())
