"""onnxruntime-genai: models of its builder, several requests as one batch."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from protocol import Clock, run_tool, serve

# accuracy_level 4: products of INT8 activations. The logits of a prompt are wanted for its last
# token alone.
BUILDER_OPTIONS = {
    "int4": ("accuracy_level=4", "prune_lm_head=true"),
    "int8": ("accuracy_level=4", "prune_lm_head=true"),
    "fp32": ("prune_lm_head=true",),
}


class OnnxruntimeGenai:
    def prepare(self, checkpoint: str, model: str, precision: str) -> None:
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        files = ["-i", checkpoint, "-o", model, "-c", f"{model}/cache"]
        target = ["-p", precision, "-e", "cpu", "--extra_options", *BUILDER_OPTIONS[precision]]
        run_tool([*builder, *files, *target])

    def load(self, checkpoint: str, model: str, threads: int, precision: str) -> dict[str, Any]:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config = onnxruntime_genai.Config(model)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = onnxruntime_genai.Model(config)
        return {"precision": precision, "builder_options": BUILDER_OPTIONS[precision]}

    def generate(self, requests: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
        """The requests have prompts of one length, so that a batch needs no padding."""
        prompts = np.array([request["token_ids"] for request in requests], np.int32)
        length = prompts.shape[1] + tokens
        params = self._genai.GeneratorParams(self._model)
        # As long as the answer is too short, the end-of-sequence token is not chosen.
        params.set_search_options(
            batch_size=len(requests), max_length=length, min_length=length, do_sample=False
        )
        clock = Clock()
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(prompts)
        seconds = []
        for _ in range(tokens):
            generator.generate_next_token()
            generator.get_next_tokens()
            seconds.append(clock())
        return [
            {"tokens": generator.get_sequence(i)[-tokens:].tolist(), "seconds": seconds}
            for i in range(len(requests))
        ]


if __name__ == "__main__":
    serve(OnnxruntimeGenai())
