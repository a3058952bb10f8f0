"""glmcompile's own engines, through its public interface."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Clock, serve

import glmcompile
from glmcompile.artifact import open_artifact
from glmcompile.bench.workloads import open_engine
from glmcompile.families import supported
from glmcompile.runtime.image_processor import ImageProcessor
from glmcompile.runtime.sequence import SamplingParams
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
        artifact = open_artifact(self._path, verify=False)
        vision, family = artifact.model.vision, supported()[artifact.model.family]
        session = open_session(artifact.graph("vision_encoder"), self._threads)
        process = ImageProcessor(family, vision)
        inputs = []
        for image in map(process, images):
            grid = np.array([image.grid_thw], np.int64)
            inputs.append(
                {**family.vision_inputs(grid, vision), "pixel_values": image.pixel_values}
            )
        began = time.perf_counter()
        for each in inputs:
            session.run(["image_features"], each)
        return time.perf_counter() - began


if __name__ == "__main__":
    serve(Glmcompile())
