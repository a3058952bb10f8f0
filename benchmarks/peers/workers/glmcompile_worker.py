"""glmcompile's own engines, through its public interface."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import InferenceSession
from protocol import Clock, serve

import glmcompile
from glmcompile.artifact import open_artifact
from glmcompile.bench.workloads import open_engine
from glmcompile.runtime.feeds import grid_feeds
from glmcompile.runtime.image_processor import ImageProcessor, image_processor
from glmcompile.runtime.input_processor import Prompt
from glmcompile.runtime.request import RequestOutput
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
        answers: list[dict[str, Any]] = [{"tokens": [], "seconds": []} for _ in requests]
        finished: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()

        def listen(answer: dict[str, Any]) -> Callable[[RequestOutput], None]:
            def deliver(output: RequestOutput) -> None:
                answer["tokens"] += output.token_ids
                answer["seconds"] += [clock()] * len(output.token_ids)
                if output.completion is not None and output.completion.timings.vision:
                    answer["vision_seconds"] = output.completion.timings.vision
                if output.finished:
                    finished.put(output)

            return deliver

        prepared = [
            self._engine.prepare(
                Prompt(token_ids=request["token_ids"], images=request.get("images", ())), sampling
            )
            for request in requests
        ]
        for request, answer in zip(prepared, answers, strict=True):
            self._engine.submit(request, listen(answer))
        for _ in requests:
            if (error := finished.get().error) is not None:
                raise error
        return answers

    def encode(self, images: list[str]) -> float:
        """Seconds in the vision encoder for the images, one after the other."""
        vision = self._engine.model.vision
        inputs = [
            image.inputs | grid_feeds(vision, np.array([image.grid_thw], np.int64))
            for image in map(self._image_processor, images)
        ]
        session = self._vision_session
        began = time.perf_counter()
        for each in inputs:
            session.run(None, each)
        return time.perf_counter() - began

    @cached_property
    def _image_processor(self) -> ImageProcessor:
        return image_processor(self._engine.model.vision, self._path)

    @cached_property
    def _vision_session(self) -> InferenceSession:
        graph = open_artifact(self._path, verify=False).graph("vision_encoder")
        return open_session(graph, self._threads)


if __name__ == "__main__":
    serve(Glmcompile())
