"""Checkpoints open whole or not at all, and each refusal says what is wrong."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmcompile.checkpoint import open_checkpoint
from glmcompile.errors import CheckpointError, UnsupportedArchitectureError
from tests.checkpoints import write_checkpoint


@pytest.fixture
def llama(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "llama"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A tiny Llama checkpoint in several shards."""
    directory = write_checkpoint("llama", tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_every_parameter_is_found(tiny_checkpoint: Callable[[str], Path], family_name: str) -> None:
    import transformers

    path = tiny_checkpoint(family_name)
    checkpoint = open_checkpoint(path)
    model = getattr(transformers, checkpoint.architecture).from_pretrained(path)
    for name, value in model.named_parameters():
        assert torch.equal(checkpoint.tensor(name), value), name


def test_tied_lm_head_reads_the_embedding(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    embedding = checkpoint.tensor("model.embed_tokens.weight")
    assert torch.equal(checkpoint.tensor("lm_head.weight"), embedding)
    assert open_checkpoint(tiny_checkpoint("glm4v")).tied == {}


@pytest.mark.parametrize(("offset", "is_tied"), [(0.0, True), (1.0, False)])
def test_head_stored_beside_its_embedding_is_tied_only_as_a_copy(
    llama: Path, offset: float, is_tied: bool
) -> None:
    file = llama / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + offset
    save_file(tensors, file)
    checkpoint = open_checkpoint(llama)
    assert ("lm_head.weight" in checkpoint.tied) == is_tied
    assert torch.equal(checkpoint.tensor("lm_head.weight"), tensors["lm_head.weight"])


def test_opening_uses_no_network(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint("glm4v")

    def refuse(*args: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert open_checkpoint(path).architecture == "Glm4vForConditionalGeneration"


def test_shards_hold_what_one_file_holds(sharded: Path, llama: Path) -> None:
    split, whole = open_checkpoint(sharded), open_checkpoint(llama)
    assert split.parameters.keys() == whole.parameters.keys()
    for name in whole.parameters:
        assert torch.equal(split.tensor(name), whole.tensor(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float32_rows_are_the_whole_tensor(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmcompile.checkpoint.opened.ROWS_BYTES", 1000)
    checkpoint = open_checkpoint(write_checkpoint("llama", tmp_path / "c", dtype=dtype))
    name = "model.layers.0.mlp.up_proj.weight"
    blocks = list(checkpoint.float32_rows(name))
    assert len(blocks) > 1
    assert checkpoint.tensor(name).dtype == dtype
    assert torch.equal(torch.cat(blocks), checkpoint.tensor(name).float())


def test_hash_follows_the_weights_and_the_configuration(llama: Path) -> None:
    before = open_checkpoint(llama).hash()
    assert open_checkpoint(llama).hash() == before
    edit_json(llama / "config.json", rms_norm_eps=1e-5)
    reconfigured = open_checkpoint(llama).hash()
    assert reconfigured != before
    file = llama / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert open_checkpoint(llama).hash() != reconfigured


def test_chat_template_is_found_in_either_place(llama: Path) -> None:
    template = (llama / "chat_template.jinja").read_text()
    assert open_checkpoint(llama).chat_template == template
    (llama / "chat_template.jinja").unlink()
    assert open_checkpoint(llama).chat_template is None
    edit_json(llama / "tokenizer_config.json", chat_template="plain")
    assert open_checkpoint(llama).chat_template == "plain"
    named = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    edit_json(llama / "tokenizer_config.json", chat_template=named)
    assert open_checkpoint(llama).chat_template == "b"


def test_not_a_directory(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        open_checkpoint(llama / "config.json")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_missing_file_is_named(llama: Path, name: str) -> None:
    (llama / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        open_checkpoint(llama)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_configuration_that_is_no_json_object(llama: Path, text: str) -> None:
    (llama / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json (is not valid JSON|holds a list)"):
        open_checkpoint(llama)


def test_configuration_with_a_field_of_the_wrong_type(llama: Path) -> None:
    edit_json(llama / "config.json", hidden_size="wide")
    with pytest.raises(CheckpointError, match="does not describe a LlamaForCausalLM"):
        open_checkpoint(llama)


def test_configuration_of_a_decoder_without_layers(llama: Path) -> None:
    edit_json(llama / "config.json", num_hidden_layers=-1)
    with pytest.raises(UnsupportedArchitectureError, match="no layer calls"):
        open_checkpoint(llama)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"image_mean": "grey"}, "image_mean and image_std need 3 values"),
        ({"image_mean": [0.5]}, "image_mean and image_std need 3 values"),
        ({"size": None, "min_pixels": 9000000, "max_pixels": 3136}, "9000000 is above .* 3136"),
    ],
    ids=str,
)
def test_settings_that_describe_no_image_processor(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    settings: dict[str, object],
    complaint: str,
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint("qwen2_vl"), tmp_path / "copy"))
    edit_json(copy / "preprocessor_config.json", **settings)
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json: .*{complaint}"):
        open_checkpoint(copy)


def test_settings_that_no_processor_can_use(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint("glm4v"), tmp_path / "copy"))
    edit_json(copy / "preprocessor_config.json", size=[1, 2])
    with pytest.raises(UnsupportedArchitectureError, match="Glm4vProcessor takes no image at a"):
        open_checkpoint(copy)


@pytest.mark.parametrize("ends", ["end", ["end"]], ids=str)
def test_an_end_token_that_is_none(llama: Path, ends: object) -> None:
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json.*eos_token_id"):
        open_checkpoint(llama)


def test_an_image_token_outside_the_vocabulary(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint("glm4v"), tmp_path / "copy"))
    edit_json(copy / "config.json", image_token_id=5000)
    with pytest.raises(CheckpointError, match="image_token_id 5000 is not in the vocabulary"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("architectures", "named"),
    [
        (["BertModel"], "architecture BertModel is not supported"),
        (["NoSuchForCausalLM"], "architecture NoSuchForCausalLM is not supported"),
        ([["LlamaForCausalLM"]], "is not supported"),
        ([], "names no architecture"),
        ("LlamaForCausalLM", "names no architecture"),
        (None, "names no architecture"),
    ],
    ids=str,
)
def test_unsupported_architecture_is_named(llama: Path, architectures: object, named: str) -> None:
    edit_json(llama / "config.json", architectures=architectures)
    with pytest.raises(UnsupportedArchitectureError, match=named):
        open_checkpoint(llama)


def test_pickled_weights_are_refused_unread(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        open_checkpoint(llama)


def test_no_weights_at_all(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        open_checkpoint(llama)


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        open_checkpoint(sharded)


def test_index_that_does_not_belong_to_the_shards(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = next(iter(weight_map.values()))
    edit_json(index, weight_map=weight_map | {"model.extra": first})
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.extra"):
        open_checkpoint(sharded)
    edit_json(index, weight_map={"model.extra": "../secret.safetensors"})
    with pytest.raises(CheckpointError, match="expected a file name"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights(llama: Path, kept: int) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors"):
        open_checkpoint(llama)


def test_header_that_is_no_json(llama: Path) -> None:
    file = llama / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:12] = b"####"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not a whole safetensors"):
        open_checkpoint(llama)


def test_missing_tensor_is_named(llama: Path) -> None:
    file = llama / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj"):
        open_checkpoint(llama)


def test_tensor_of_the_wrong_shape(llama: Path) -> None:
    edit_json(llama / "config.json", intermediate_size=176)
    with pytest.raises(CheckpointError, match=r"has shape \[160, 96\].*asks for \[176, 96\]"):
        open_checkpoint(llama)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "bitsandbytes"}, r"\(bitsandbytes\); .*it was loaded from"),
        ({"quant_method": "hqq"}, r"\(hqq\); awq, .* are read"),
        ("gptq", r"\(gptq, without settings\)"),
        ({"bits": 4}, r"\(by no named method\)"),
    ],
)
def test_unread_quantization_is_refused(llama: Path, settings: object, reason: str) -> None:
    edit_json(llama / "config.json", quantization_config=settings)
    with pytest.raises(CheckpointError, match=f"already quantized {reason}"):
        open_checkpoint(llama)


def test_image_model_needs_its_processor(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = shutil.copytree(tiny_checkpoint("qwen2_vl"), tmp_path / "qwen2_vl")
    (path / "preprocessor_config.json").rename(path / "moved.json")
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        open_checkpoint(path)
    settings = json.loads((path / "moved.json").read_text())
    (path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    vision = open_checkpoint(path).model.vision
    assert vision is not None
    assert vision.processor.arguments["max_pixels"] == 28 * 28 * 64
