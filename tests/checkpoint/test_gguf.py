"""GGUF files are read as transformers reads them, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner

import glmcompile
from glmcompile.artifact import is_checkpoint, open_artifact
from glmcompile.checkpoint import open_checkpoint
from glmcompile.cli import main
from glmcompile.errors import CheckpointError

gguf = pytest.importorskip("gguf")

from gguf import GGMLQuantizationType as Kind  # noqa: E402

from tests.checkpoint.gguf_writer import tiny_llama, write_gguf  # noqa: E402
from tests.checkpoint.test_adapter import lora, write_adapter  # noqa: E402


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama(), Kind.Q8_0)


def as_transformers_reads(file: Path) -> transformers.LlamaForCausalLM:
    model = transformers.LlamaForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return model.eval()


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0]
)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_logits_are_those_of_transformers(
    tmp_path: Path, kind: Kind, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmcompile.checkpoint.opened.ROWS_BYTES", 1000)
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied), kind)
    checkpoint = open_checkpoint(file)
    expected = as_transformers_reads(file)
    assert bool(checkpoint.tied) is tied
    state = {}
    for name, value in expected.named_parameters():
        state[name] = checkpoint.tensor(name)
        assert torch.equal(state[name], value), name
        assert torch.equal(torch.cat(list(checkpoint.float32_rows(name))), value), name
    model = checkpoint.model_class(checkpoint.config).eval()
    model.load_state_dict(state, strict=not tied)
    ids = torch.tensor([[1, 70, 257, 33]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_blocks_are_a_note_and_whole_values_are_none(tmp_path: Path, file: Path) -> None:
    (note,) = open_checkpoint(file).notes
    assert note.startswith("tiny.gguf: 16 of 21 tensors are quantized (16 in Q8_0).")
    whole = write_gguf(tmp_path / "whole.gguf", tiny_llama(), Kind.F16)
    assert open_checkpoint(whole).notes == ()


def test_its_directory_may_be_given(file: Path) -> None:
    checkpoint = open_checkpoint(file.parent)
    assert checkpoint.files == [file]
    before = checkpoint.hash()
    write_gguf(file, tiny_llama(), Kind.Q4_0)
    assert open_checkpoint(file).hash() != before


def test_several_files_are_refused(file: Path) -> None:
    (file.parent / "other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(other\.gguf, tiny\.gguf\)"):
        open_checkpoint(file.parent)
    assert open_checkpoint(file).architecture == "LlamaForCausalLM"
    with pytest.raises(CheckpointError, match=r"none\.gguf does not exist"):
        open_checkpoint(file.parent / "none.gguf")


def test_tokenizer_and_settings_last_as_long_as_the_checkpoint(file: Path) -> None:
    checkpoint = open_checkpoint(file)
    directory = checkpoint.directory
    assert checkpoint.chat_template is not None
    assert checkpoint.model.eos_token_ids == (258,)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = "<|im_start|>user\nhello<|im_end|>"
    expected = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert tokenizer(text).input_ids == expected(text).input_ids
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == 258
    del checkpoint
    assert not directory.exists()


def test_a_file_compiles_in_one_command_with_an_adapter(file: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj"
    a, b = torch.randn(4, 64), torch.randn(64, 4)
    adapter = write_adapter(tmp_path / "adapter", lora(name, a, b))
    engine = tmp_path / "engine"
    arguments = ["compile", file, "-o", engine, "--precision", "fp32", "--adapter", adapter]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "note: tiny.gguf: 16 of 21 tensors are quantized" in result.stderr
    assert open_artifact(engine).manifest["adapter"] == "adapter"
    expected = as_transformers_reads(file)
    expected.get_parameter(f"{name}.weight").data += 4 * (b @ a)
    with glmcompile.load(engine) as loaded:
        answer = loaded.generate(prompt="hello", max_tokens=8, ignore_eos=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    generated = expected.generate(
        ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert list(answer.token_ids) == generated[0, ids.shape[1] :].tolist()


def test_it_is_told_from_an_engine(file: Path, tmp_path: Path) -> None:
    assert is_checkpoint(file)
    assert is_checkpoint(file.parent)
    (tmp_path / "empty").mkdir()
    assert not is_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize("kept", [0, 3, 30, 4000, -1])
def test_a_file_that_is_cut_off(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf.*fetch it again"):
        open_checkpoint(file)


def test_a_tensor_of_another_size(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data = torch.zeros(32, 64)
    file = write_gguf(tmp_path / "tiny.gguf", model)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight hold 2048 values.*6144"):
        open_checkpoint(file)


def test_a_part_of_a_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), split__count=3)
    with pytest.raises(CheckpointError, match=r"one of 3 parts.*--merge"):
        open_checkpoint(file)


def test_rotary_scaling_of_llama_3(tmp_path: Path) -> None:
    model = tiny_llama()
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    plain = model.model.rotary_emb.inv_freq
    model.config.rope_parameters = rope
    scaled = transformers.LlamaForCausalLM(model.config).model.rotary_emb.inv_freq
    file = write_gguf(tmp_path / "tiny.gguf", model, rope_freqs=plain / scaled)
    checkpoint = open_checkpoint(file)
    found = checkpoint.model_class(checkpoint.config).model.rotary_emb.inv_freq
    assert not torch.allclose(plain, scaled)
    assert torch.allclose(found, scaled)
    write_gguf(file, model, rope_freqs=2 * plain / scaled)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        open_checkpoint(file)


def test_rotary_scaling_in_the_metadata(tmp_path: Path) -> None:
    scaling = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    file = write_gguf(
        tmp_path / "tiny.gguf",
        tiny_llama(),
        rope__scaling__original_context_length=128,
        **scaling,
    )
    rope = open_checkpoint(file).config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("yarn", 4.0)
    assert rope["original_max_position_embeddings"] == 128
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), rope__scaling__type="other")
    with pytest.raises(CheckpointError, match="scales its rotary frequencies"):
        open_checkpoint(file)
