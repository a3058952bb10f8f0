"""vLLM's CPU build: its engine in this process, paged attention, continuous batching."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from protocol import Clock, sees, serve

# See there; vLLM looks into models in processes of their own.
WITHOUT_CUDA = Path(__file__).with_name("without_cuda")


class Vllm:
    def load(self, checkpoint: str, model: str, threads: int, precision: str) -> dict[str, Any]:
        settings = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # Without it vLLM takes one thread for what it compiles.
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        os.environ.update(settings)
        os.environ["PYTHONPATH"] = str(WITHOUT_CUDA)
        sys.path.insert(0, str(WITHOUT_CUDA))
        import sitecustomize  # noqa: F401
        from vllm import LLM

        options = {
            "dtype": "bfloat16",
            "enable_prefix_caching": False,
            "max_model_len": 8192,
            "max_num_seqs": 16,
        }
        # Without profiling, which computes the largest image allowed: it is for memory alone.
        images = {"limit_mm_per_prompt": {"image": 1, "video": 0}, "skip_mm_profiling": True}
        self._engine = LLM(
            model, mm_processor_cache_gb=0, **(images if sees(model) else {}), **options
        ).llm_engine
        self._requests = 0
        return {"precision": precision, **settings, **options}

    def generate(self, requests: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
        from PIL import Image
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        clock = Clock()
        answers: dict[str, dict[str, Any]] = {}
        for request in requests:
            prompt: dict[str, Any] = {"prompt_token_ids": request["token_ids"]}
            if request.get("images"):
                # The processor repeats the placeholder of an image itself.
                images = [Image.open(path) for path in request["images"]]
                prompt = {"prompt": request["text"], "multi_modal_data": {"image": images}}
            name = str(self._requests)
            self._requests += 1
            self._engine.add_request(name, prompt, sampling)
            answers[name] = {"tokens": [], "seconds": []}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                # Each output holds all tokens so far.
                ids, answer = list(output.outputs[0].token_ids), answers[output.request_id]
                answer["seconds"] += [clock()] * (len(ids) - len(answer["tokens"]))
                answer["tokens"] = ids
        return list(answers.values())


if __name__ == "__main__":
    serve(Vllm())
