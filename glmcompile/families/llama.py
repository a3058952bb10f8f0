"""Llama and the text models built like it (SmolLM2, TinyLlama): one position axis, no images."""

from __future__ import annotations

from glmcompile.config import ModelConfig
from glmcompile.families.base import Config, Family, ModulePaths, decoder_fields, text_positions


def read_config(config: Config, processor: Config, generation: Config) -> ModelConfig:
    """See Family.read_config."""
    return ModelConfig(family="llama", **decoder_fields(config, generation))


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    modules=ModulePaths(embed_tokens="model.embed_tokens", decoder="model"),
    read_config=read_config,
    positions=text_positions,
)
