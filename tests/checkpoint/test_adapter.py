"""LoRA adapters are merged as PEFT computes with them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from glmcompile.checkpoint import open_checkpoint
from glmcompile.errors import CheckpointError
from tests.checkpoints import write_checkpoint

RANK = 4
LAYER = "model.layers.0."
Q, DOWN = f"{LAYER}self_attn.q_proj", f"{LAYER}mlp.down_proj"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_checkpoint("llama", tmp_path / "llama", dtype=torch.float32)


def write_adapter(directory: Path, tensors: dict[str, torch.Tensor], **settings: object) -> Path:
    directory.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "base_model_name_or_path": "x"}
    (directory / "adapter_config.json").write_text(json.dumps(config | settings))
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors")
    return directory


def factors(out_features: int, in_features: int, rank: int = RANK) -> list[torch.Tensor]:
    return [torch.randn(rank, in_features), torch.randn(out_features, rank)]


def lora(module: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 4.0),
        ({"use_rslora": True}, 8.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, 4.0),
        ({"alpha_pattern": {r"layers\.\d.*q_proj": 2}, "use_rslora": True}, 1.0),
    ],
)
def test_the_product_is_added(
    llama: Path, tmp_path: Path, settings: dict[str, Any], scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("glmcompile.checkpoint.opened.ROWS_BYTES", 1000)
    a, b = factors(96, 96)
    adapter = write_adapter(tmp_path / "adapter", lora(Q, a, b), **settings)
    base, merged = open_checkpoint(llama), open_checkpoint(llama, adapter)
    expected = base.tensor(f"{Q}.weight") + scale * (b @ a)
    assert torch.allclose(merged.tensor(f"{Q}.weight"), expected, atol=1e-5)
    blocks = list(merged.float32_rows(f"{Q}.weight"))
    assert len(blocks) > 1
    assert torch.allclose(torch.cat(blocks), expected, atol=1e-5)
    other = f"{LAYER}self_attn.o_proj.weight"
    assert torch.equal(merged.tensor(other), base.tensor(other))
    assert merged.tied == base.tied


def test_ranks_differ_by_module(llama: Path, tmp_path: Path) -> None:
    a, b = factors(96, 96, rank=2)
    adapter = write_adapter(tmp_path / "a", lora(Q, a, b), rank_pattern={"q_proj": 2})
    merged = open_checkpoint(llama, adapter).tensor(f"{Q}.weight")
    expected = open_checkpoint(llama).tensor(f"{Q}.weight") + 8 * (b @ a)
    assert torch.allclose(merged, expected, atol=1e-5)
    write_adapter(tmp_path / "a", lora(Q, a, b))
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A.*gives rank 4"):
        open_checkpoint(llama, adapter)


def test_it_is_a_part_of_the_hash(llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", lora(Q, *factors(96, 96)))
    plain, merged = open_checkpoint(llama), open_checkpoint(llama, adapter)
    names = [file.name for file in merged.files]
    assert names == [
        "config.json", "adapter_config.json", "adapter_model.safetensors", "model.safetensors",
    ]  # fmt: skip
    before = merged.hash()
    assert before != plain.hash()
    write_adapter(adapter, lora(Q, *factors(96, 96)))
    assert open_checkpoint(llama, adapter).hash() != before


@pytest.mark.parametrize("settings", [{}, {"ensure_weight_tying": True}])
def test_a_tied_head_stays_as_it_was_unless_told(
    llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    a, b = torch.randn(RANK, 288), torch.randn(96, RANK)
    tensors = {f"{EMBEDDING}.lora_embedding_A": a, f"{EMBEDDING}.lora_embedding_B": b}
    adapter = write_adapter(tmp_path / "adapter", tensors, **settings)
    base, merged = open_checkpoint(llama), open_checkpoint(llama, adapter)
    table = base.tensor(f"{EMBEDDING}.weight")
    expected = table + 4 * (b @ a).T
    assert torch.allclose(merged.tensor(f"{EMBEDDING}.weight"), expected, atol=1e-5)
    together = bool(settings)
    assert bool(merged.tied) is together
    head = expected if together else table
    assert torch.allclose(merged.tensor(f"{HEAD}.weight"), head, atol=1e-5)


def test_whole_modules_replace_the_checkpoints(llama: Path, tmp_path: Path) -> None:
    head, norm = torch.randn(288, 96), torch.randn(96)
    tensors = {f"{HEAD}.weight": head, "model.norm.modules_to_save.default.weight": norm}
    tensors |= lora(Q, *factors(96, 96))
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["lm_head", "norm"])
    merged = open_checkpoint(llama, adapter)
    assert torch.equal(merged.tensor("lm_head.weight"), head)
    assert torch.equal(merged.tensor("model.norm.weight"), norm)
    assert merged.tied == {}


def test_an_adapter_of_older_names(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen2_vl")
    base = open_checkpoint(path)
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    a, b = factors(*base.parameters[name].shape)
    patch = "model.visual.patch_embed.proj.weight"
    shape = base.parameters[patch].shape
    c, d = torch.randn(RANK, *shape[1:]), torch.randn(shape[0], RANK, 1, 1, 1)
    tensors = lora("model.layers.1.self_attn.q_proj", a, b)
    tensors |= lora("visual.patch_embed.proj", c, d)
    merged = open_checkpoint(path, write_adapter(tmp_path / "adapter", tensors))
    expected = base.tensor(name).float() + 4 * (b @ a)
    assert torch.allclose(merged.tensor(name), expected, atol=1e-5)
    delta = (d.flatten(1) @ c.flatten(1)).view(shape)
    assert torch.allclose(merged.tensor(patch), base.tensor(patch).float() + 4 * delta, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft_type": "IA3"}, "is of type IA3"),
        ({"use_dora": True}, "is a DoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16, which changes"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "sets target_parameters"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication"),
        ({"use_something_new": True}, "sets use_something_new"),
        ({"r": None}, "has no number r"),
    ],
)
def test_other_adapters_are_refused(
    llama: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", lora(Q, *factors(96, 96)), **settings)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(llama, adapter)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (lora("model.layers.7.mlp.up_proj", *factors(160, 96)), r"layers\.7.*to no parameter"),
        ({"model.layers.0.other.weight": torch.zeros(2)}, r"other\.weight belong to no parameter"),
        (lora(DOWN, *factors(160, 96)), r"shape \[160, 96\].*has \[96, 160\]"),
        ({f"{Q}.lora_A.weight": torch.zeros(RANK, 96)}, "stands alone"),
        ({f"{Q}.lora_magnitude_vector": torch.zeros(96)}, r"lora_magnitude_vector.*no DoRA"),
        ({f"{Q}.lora_B.bias": torch.zeros(96)}, r"lora_B\.bias is of no LoRA"),
        ({"model.norm.weight": torch.zeros(95)}, r"shape \[95\].*has \[96\]"),
        ({}, "holds no tensors"),
    ],
)
def test_tensors_that_do_not_belong_are_named(
    llama: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], reason: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(llama, adapter)


def test_names_and_files_that_are_none_of_an_adapter(llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", lora(Q, *factors(96, 96)))
    file = adapter / "adapter_model.safetensors"
    save_file({f"{Q}.lora_A.weight": torch.zeros(RANK, 96)}, file)
    with pytest.raises(CheckpointError, match=r"begins with base_model\.model\."):
        open_checkpoint(llama, adapter)
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(adapter_model\.bin\)"):
        open_checkpoint(llama, adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        open_checkpoint(llama, adapter)
    shutil.rmtree(adapter)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        open_checkpoint(llama, adapter)


def test_another_tokenizer_is_a_note(llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", lora(Q, *factors(96, 96)))
    shutil.copy(llama / "tokenizer.json", adapter)
    assert open_checkpoint(llama, adapter).notes == ()
    (adapter / "tokenizer.json").write_text("{}")
    (note,) = open_checkpoint(llama, adapter).notes
    assert note.startswith("adapter: its tokenizer.json differs")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}},
        {"target_modules": "all-linear", "use_rslora": True, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    ],
)
def test_logits_are_those_of_peft(
    llama: Path, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM.from_pretrained(llama)
    config = peft.LoraConfig(r=RANK, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    tuned = peft.get_peft_model(base, config)
    for name, value in tuned.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            value.data.add_(0.1 * torch.randn(value.shape))
    tuned.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 70, 257, 33]])
    with torch.no_grad():
        expected = tuned.eval()(ids).logits
    merged = open_checkpoint(llama, tmp_path / "adapter")
    config = transformers.AutoConfig.from_pretrained(llama)
    config.tie_word_embeddings = bool(merged.tied)
    model = transformers.LlamaForCausalLM(config).eval()
    state = {name: merged.tensor(name) for name in (*merged.parameters, *merged.tied)}
    model.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert math.prod(next(iter(keys.values())).shape) > 0


def test_experts_are_adapted_before_they_are_merged(tmp_path: Path) -> None:
    from glmcompile.checkpoint.adapter import open_adapter
    from glmcompile.checkpoint.conversions import Conversion, complete, parameters_of
    from glmcompile.checkpoint.safetensors_files import stored_tensors
    from glmcompile.checkpoint.sources import Source, WeightFiles

    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=3,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    a, b = factors(24, 32)
    module = "model.layers.0.mlp.experts.1.up_proj"
    adapter = open_adapter(write_adapter(tmp_path / "adapter", lora(module, a, b)))
    with torch.device("meta"):
        conversion = Conversion(transformers.Qwen3MoeForCausalLM._from_config(config))
    stored: dict[str, Source] = dict(stored_tensors(tmp_path))
    parameters = parameters_of(adapter.merged_into_stored(stored, conversion), conversion)
    parameters, tied = complete(parameters, conversion, tmp_path)
    parameters, _ = adapter.merged(parameters, tied, conversion, stored)
    expected = model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"].clone()
    expected[1, 24:] += 4 * (b @ a)
    found = parameters["model.layers.0.mlp.experts.gate_up_proj"].read(WeightFiles())
    assert torch.allclose(found, expected, atol=1e-5)
