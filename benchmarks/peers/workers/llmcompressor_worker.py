"""llm-compressor: writes the W8A8 checkpoint that vLLM loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from protocol import sees, serve


class LlmCompressor:
    def prepare(self, checkpoint: str, model: str, precision: str) -> None:
        """Weights of 8 bits a channel, activations of 8 bits a token, scaled as they come."""
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

        kind = AutoModelForImageTextToText if sees(checkpoint) else AutoModelForCausalLM
        network = kind.from_pretrained(checkpoint, dtype="auto")
        recipe = QuantizationModifier(
            targets="Linear", scheme=precision.upper(), ignore=["re:.*lm_head", "re:.*visual.*"]
        )
        oneshot(model=network, recipe=recipe)
        network.save_pretrained(model, save_compressed=True)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(model)
        for settings in Path(checkpoint).glob("*processor_config.json"):  # of image models
            shutil.copy(settings, model)


if __name__ == "__main__":
    serve(LlmCompressor())
