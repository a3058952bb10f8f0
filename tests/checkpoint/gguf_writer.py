"""Writes a tiny Llama as a GGUF file, as llama.cpp's convert_hf_to_gguf.py does."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, TokenType

from tests.checkpoints import CHATML_TEMPLATE, SPECIAL_TOKENS, fill_weights, tokenizer

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama(tied: bool = False) -> transformers.LlamaForCausalLM:
    """Its channels are whole blocks of any GGML type of 32 values."""
    config = transformers.LlamaConfig(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=257,
        eos_token_id=258,
        pad_token_id=256,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config)
    fill_weights(model)
    return model.eval()


def write_gguf(
    file: Path,
    model: transformers.LlamaForCausalLM,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    rope_freqs: torch.Tensor | None = None,
    **metadata: int | float | str,
) -> Path:
    """kind: of the matrices; vectors stay float32. metadata: more of llama.*."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    for key, value in metadata.items():
        key = key.replace("__", ".")
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"llama.{key}" if not key.startswith("split") else key, value)
    _add_tokenizer(writer, config)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = value.float()
        for part, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if part in name:
                data = data.view(heads, 2, -1, data.shape[1]).transpose(1, 2).reshape(data.shape)
        stored = kind if data.ndim == 2 else GGMLQuantizationType.F32
        array = gguf.quantize(data.numpy(), stored)
        writer.add_tensor(_name(name), array, raw_dtype=stored)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _name(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, index, rest = module.split(".", 3)
        return f"blk.{index}.{NAMES[rest]}.{suffix}"
    return f"{NAMES[module]}.{suffix}"


def _add_tokenizer(writer: gguf.GGUFWriter, config: transformers.LlamaConfig) -> None:
    vocabulary = tokenizer("llama").get_vocab()
    merges = ["h e", "l l"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += [merge.replace(" ", "") for merge in merges]
    padding = [f"[PAD{index}]" for index in range(len(tokens), config.vocab_size)]
    special = set(SPECIAL_TOKENS["llama"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens + padding)
    writer.add_token_types(
        [TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens]
        + [TokenType.UNUSED] * len(padding)
    )
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(CHATML_TEMPLATE)
