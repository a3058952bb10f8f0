"""OpenVINO GenAI: the continuous batching pipeline with paged attention."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Clock, run_tool, sees, serve


class OpenVino:
    def prepare(self, checkpoint: str, model: str, precision: str) -> None:
        """Export with weights of 8 bits (optimum-intel and nncf)."""
        export = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"]
        task = "image-text-to-text" if sees(checkpoint) else "text-generation-with-past"
        options = ["--model", checkpoint, "--task", task, "--weight-format", precision]
        run_tool([*export, *options, model])

    def load(
        self, checkpoint: str, model: str, threads: int, precision: str, **properties: Any
    ) -> dict[str, Any]:
        """properties: of the CPU plugin, beside the threads."""
        import openvino_genai

        self._genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = 1
        scheduler.max_num_batched_tokens = 4096
        scheduler.max_num_seqs = 16
        folder = Path(model)
        gguf = next(iter(folder.glob("*.gguf")), folder)
        properties = {"INFERENCE_NUM_THREADS": threads, **properties}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(gguf), scheduler, "CPU", properties
        )
        self._requests = 0
        return {
            "precision": precision,
            **properties,
            "prefix_caching": False,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        }

    def generate(self, requests: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
        import openvino

        config = self._genai.GenerationConfig(
            max_new_tokens=tokens, ignore_eos=True, do_sample=False
        )
        clock = Clock()
        handles = []
        for request in requests:
            ids = openvino.Tensor(np.array([request["token_ids"]], np.int64))
            handles.append(self._pipeline.add_request(self._requests, ids, config))
            self._requests += 1
        answers: list[dict[str, Any]] = [{"tokens": [], "seconds": []} for _ in requests]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for handle, answer in zip(handles, answers, strict=True):
                if handle.can_read():
                    for output in handle.read().values():
                        answer["tokens"] += output.generated_ids
                        answer["seconds"] += [clock()] * len(output.generated_ids)
        return answers


if __name__ == "__main__":
    serve(OpenVino())
