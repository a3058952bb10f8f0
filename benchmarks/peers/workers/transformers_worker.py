"""Hugging Face transformers on torch: sdpa attention, KV cache, several requests as one batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from protocol import Clock, sees, serve
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.generation import StoppingCriteria
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TokenTimes(StoppingCriteria):
    """Never stops; generation asks it after every token."""

    def __init__(self) -> None:
        self._clock = Clock()
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seconds.append(self._clock())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Transformers:
    def load(self, checkpoint: str, model: str, threads: int, precision: str) -> dict[str, Any]:
        torch.set_num_threads(threads)
        vision = sees(checkpoint)
        kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        self._model = kind.from_pretrained(
            checkpoint, dtype=DTYPES[precision], attn_implementation="sdpa"
        ).eval()
        # Every answer has its full length, and is what the weights say.
        self._model.generation_config.eos_token_id = None
        self._vision_seconds = 0.0
        if vision:
            self._images = Glm4vImageProcessorPil.from_pretrained(checkpoint)
            self._encoder = self._model.model.visual
            self._encoder.register_forward_pre_hook(self._vision_begins)
            self._encoder.register_forward_hook(self._vision_ends)
        return {"dtype": precision, "attention": "sdpa", "kv_cache": "dynamic"}

    @torch.inference_mode()
    def generate(self, requests: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
        """The requests have prompts of one length, so that a batch needs no padding."""
        self._vision_seconds = 0.0
        times = TokenTimes()
        ids = torch.tensor([request["token_ids"] for request in requests])
        output = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **self._pictures(ids, [path for r in requests for path in r.get("images", ())]),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[times],
        )
        shared = {"seconds": times.seconds}
        if self._vision_seconds:
            shared["vision_seconds"] = self._vision_seconds
        return [{"tokens": row.tolist(), **shared} for row in output[:, ids.shape[1] :]]

    @torch.inference_mode()
    def encode(self, images: list[str]) -> float:
        """Seconds in the vision encoder for the images, one after the other."""
        inputs = [self._process([path]) for path in images]
        began = time.perf_counter()
        for each in inputs:
            pixels = each["pixel_values"].to(self._model.dtype)
            self._encoder(pixels, grid_thw=each["image_grid_thw"])
        return time.perf_counter() - began

    def _process(self, paths: list[str]) -> Any:
        return self._images([Image.open(Path(path)) for path in paths], return_tensors="pt")

    def _pictures(self, ids: torch.Tensor, paths: list[str]) -> dict[str, torch.Tensor]:
        if not paths:
            return {}
        kinds = (ids == self._model.config.image_token_id).int()
        return {**self._process(paths), "mm_token_type_ids": kinds}

    def _vision_begins(self, *_: Any) -> None:
        self._vision_began = time.perf_counter()

    def _vision_ends(self, *_: Any) -> None:
        self._vision_seconds += time.perf_counter() - self._vision_began


if __name__ == "__main__":
    serve(Transformers())
