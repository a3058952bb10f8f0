"""GGUF tensors of other architectures become the parameters that transformers makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from glmcompile.checkpoint.conversions import Conversion, complete
from glmcompile.checkpoint.sources import Source, WeightFiles

gguf = pytest.importorskip("gguf")

from gguf import GGMLQuantizationType as Kind  # noqa: E402

from glmcompile.checkpoint.gguf import parameters, write_directory  # noqa: E402

WIDTH, HEADS, KV_HEADS, HEAD, INNER, TOKENS, EXPERTS = 64, 4, 2, 16, 96, 128, 4
COMMON = {
    "token_embd.weight": (TOKENS, WIDTH),
    "blk.{}.attn_norm.weight": (WIDTH,),
    "blk.{}.ffn_norm.weight": (WIDTH,),
    "blk.{}.attn_q.weight": (HEADS * HEAD, WIDTH),
    "blk.{}.attn_k.weight": (KV_HEADS * HEAD, WIDTH),
    "blk.{}.attn_v.weight": (KV_HEADS * HEAD, WIDTH),
    "blk.{}.attn_output.weight": (WIDTH, HEADS * HEAD),
    "blk.{}.attn_q_norm.weight": (HEAD,),
    "blk.{}.attn_k_norm.weight": (HEAD,),
}
EXPERT_LAYER = {
    "output_norm.weight": (WIDTH,),
    "output.weight": (TOKENS, WIDTH),
    "blk.{}.ffn_gate_inp.weight": (EXPERTS, WIDTH),
    "blk.{}.ffn_gate_exps.weight": (EXPERTS, INNER, WIDTH),
    "blk.{}.ffn_up_exps.weight": (EXPERTS, INNER, WIDTH),
    "blk.{}.ffn_down_exps.weight": (EXPERTS, WIDTH, INNER),
}
DENSE = {
    "blk.{}.ffn_gate.weight": (INNER, WIDTH),
    "blk.{}.ffn_up.weight": (INNER, WIDTH),
    "blk.{}.ffn_down.weight": (WIDTH, INNER),
}
GEMMA = {
    "output_norm.weight": (WIDTH,),
    "blk.{}.post_attention_norm.weight": (WIDTH,),
    "blk.{}.post_ffw_norm.weight": (WIDTH,),
}


def experts(writer: Any) -> dict[str, tuple[int, ...]]:
    writer.add_head_count_kv(KV_HEADS)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(INNER)
    return COMMON | EXPERT_LAYER


def gemma(writer: Any) -> dict[str, tuple[int, ...]]:
    writer.add_head_count_kv(KV_HEADS)
    writer.add_sliding_window(32)
    return COMMON | DENSE | GEMMA


def short_convolutions(writer: Any) -> dict[str, tuple[int, ...]]:
    writer.add_array("lfm2.attention.head_count_kv", [0, KV_HEADS])
    writer.add_uint32("lfm2.shortconv.l_cache", 3)
    layers = {
        name.format(index): shape
        for index in range(2)
        for name, shape in {**COMMON, **DENSE}.items()
        if index == 1 or "attn_" not in name or "attn_norm" in name
    }
    return layers | {
        "token_embd_norm.weight": (WIDTH,),
        "blk.0.shortconv.conv.weight": (WIDTH, 3),
        "blk.0.shortconv.in_proj.weight": (3 * WIDTH, WIDTH),
        "blk.0.shortconv.out_proj.weight": (WIDTH, WIDTH),
    }


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q5_1])
@pytest.mark.parametrize(
    ("architecture", "describe", "name"),
    [
        ("qwen3moe", experts, "Qwen3MoeForCausalLM"),
        ("gemma3", gemma, "Gemma3ForCausalLM"),
        ("lfm2", short_convolutions, "Lfm2ForCausalLM"),
    ],
)
def test_parameters_are_those_of_transformers(
    tmp_path: Path,
    kind: Kind,
    architecture: str,
    describe: Callable[[Any], dict[str, tuple[int, ...]]],
    name: str,
) -> None:
    if architecture == "lfm2" and kind is Kind.Q5_1:
        pytest.skip("transformers unpacks no Q5_1 of this architecture")
    file = tmp_path / "tiny.gguf"
    write(file, architecture, describe, kind)
    place: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32}
    if describe is experts:
        place["moe_intermediate_size"] = INNER  # which transformers leaves out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **place)
    assert type(model).__name__ == name
    with torch.device("meta"):
        network = type(model)._from_config(model.config)
    found, notes = parameters(file, network)
    complete_found, _ = complete(found, Conversion(network), file)
    files = WeightFiles()
    compared = {key: value for key, value in model.named_parameters() if key in complete_found}
    assert len(compared) >= 20
    for key, value in compared.items():
        source: Source = complete_found[key]
        assert torch.equal(source.read(files), value), key
        assert torch.equal(torch.cat(list(source.rows(files, 7))), value), key
    assert bool(notes) is (kind is not Kind.F32)


def test_the_width_of_experts_is_the_files(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write(file, "qwen3moe", experts, Kind.F32)
    with write_directory(file) as directory:
        config = transformers.AutoConfig.from_pretrained(directory)
    assert config.moe_intermediate_size == INNER
    assert config.architectures == ["Qwen3MoeForCausalLM"]


def write(
    file: Path, architecture: str, describe: Callable[[Any], dict[str, tuple[int, ...]]], kind: Kind
) -> None:
    torch.manual_seed(0)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_block_count(2)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", *(f"t{index}" for index in range(TOKENS - 2))])
    writer.add_token_merges(["t 1"])
    for pattern, shape in describe(writer).items():
        for name in dict.fromkeys(pattern.format(index) for index in range(2)):
            stored = kind if len(shape) > 1 and shape[-1] % 32 == 0 else Kind.F32
            values = torch.randn(shape).numpy()
            writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
