"""Quantized checkpoints hold the values that their published packings mean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from glmcompile.checkpoint import open_checkpoint
from glmcompile.checkpoint.quantized import awq, compressed, fp8, gptq
from glmcompile.checkpoint.quantized.layers import over, unpack
from glmcompile.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
GROUP = 32


def packed(values: torch.Tensor, bits: int, dim: int, order: list[int] | None = None) -> Any:
    """Unsigned integers into int32, one by one: `order` gives the channels of each place."""
    array = np.moveaxis(values.numpy().astype(np.uint32), dim, -1)
    count = 32 // bits
    array = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % count)])
    words = np.zeros((*array.shape[:-1], array.shape[-1] // count), np.uint32)
    for place, channel in enumerate(order or range(count)):
        words |= array[..., channel::count] << np.uint32(bits * place)
    return torch.from_numpy(np.moveaxis(words, -1, dim).view(np.int32).copy())


def drawn(high: int, *shape: int, low: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.int32)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape).half() / 64 + 0.001


def gptq_layer(out: int, rows: int, bits: int, offset: int, shuffled: bool) -> tuple[Tensors, Any]:
    groups = rows // GROUP
    values, zeros = drawn(1 << bits, rows, out), drawn((1 << bits), groups, out, low=offset)
    scale, g_idx = scales(groups, out), torch.arange(rows, dtype=torch.int32) // GROUP
    if shuffled:
        g_idx = g_idx[torch.randperm(rows)]
    stored = {
        "qweight": packed(values, bits, 0),
        "qzeros": packed(zeros - offset, bits, 1),
        "scales": scale,
        "g_idx": g_idx,
    }
    weight = (values - zeros[g_idx.long()]) * scale.float()[g_idx.long()]
    return stored, weight.T


def awq_layer(out: int, rows: int) -> tuple[Tensors, Any]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    groups = torch.arange(rows) // GROUP
    values, zeros = drawn(16, rows, out), drawn(16, rows // GROUP, out)
    scale = scales(rows // GROUP, out)
    stored = {
        "qweight": packed(values, 4, 1, order),
        "qzeros": packed(zeros, 4, 1, order),
        "scales": scale,
    }
    return stored, ((values - zeros[groups]) * scale.float()[groups]).T


def fp8_layer(out: int, rows: int, block: int) -> tuple[Tensors, Any]:
    weight = torch.randn(out, rows).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-out // block), -(-rows // block))
    expected = weight.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            expected[i * block : (i + 1) * block, j * block : (j + 1) * block] *= scale[i, j]
    return {"weight": weight, "weight_scale_inv": scale}, expected


def pack_quantized_layer(out: int, rows: int, bits: int, symmetric: bool) -> tuple[Tensors, Any]:
    middle, groups = 1 << (bits - 1), torch.arange(rows) // GROUP
    values = drawn(middle, out, rows, low=-middle)
    scale = scales(out, rows // GROUP)
    stored = {
        "weight_packed": packed(values + middle, bits, 1),
        "weight_scale": scale,
        "weight_shape": torch.tensor([out, rows]),
    }
    zeros = torch.zeros(out, rows // GROUP, dtype=torch.int32)
    if not symmetric:
        zeros = drawn(middle, out, rows // GROUP, low=-middle)
        stored["weight_zero_point"] = packed(zeros + middle, bits, 0)
    return stored, (values - zeros[:, groups]) * scale.float()[:, groups]


def int8_layer(out: int, rows: int) -> tuple[Tensors, Any]:
    values, scale = drawn(128, out, rows, low=-128).to(torch.int8), scales(out, 1)
    return {"weight": values, "weight_scale": scale}, values * scale.float()


def float8_layer(out: int, rows: int) -> tuple[Tensors, Any]:
    values, scale = torch.randn(out, rows).to(torch.float8_e4m3fn), scales(1)
    return {"weight": values, "weight_scale": scale}, values.float() * scale.float()


def group(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


COMPRESSED = {"quant_method": "compressed-tensors"}
PACKED = {**COMPRESSED, "format": "pack-quantized"}
CASES: dict[str, tuple[dict[str, Any], Callable[[int, int], tuple[Tensors, Any]]]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, lambda o, i: gptq_layer(o, i, 4, 1, False)),
    "gptq-order": ({"quant_method": "gptq"}, lambda o, i: gptq_layer(o, i, 4, 1, True)),
    "gptq-8": ({"quant_method": "gptq", "bits": 8}, lambda o, i: gptq_layer(o, i, 8, 1, False)),
    "gptq-v2": (
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
        lambda o, i: gptq_layer(o, i, 2, 0, True),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq_layer),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        lambda o, i: fp8_layer(o, i, 64),
    ),
    "int4": (
        PACKED | group(num_bits=4, group_size=GROUP),
        lambda o, i: pack_quantized_layer(o, i, 4, True),
    ),
    "int4-asymmetric": (
        PACKED | group(num_bits=4, group_size=GROUP),
        lambda o, i: pack_quantized_layer(o, i, 4, False),
    ),
    "int8-packed": (
        PACKED | group(num_bits=8, group_size=GROUP),
        lambda o, i: pack_quantized_layer(o, i, 8, True),
    ),
    "w8a8": (COMPRESSED | {"format": "int-quantized"} | group(num_bits=8), int8_layer),
    "float8": (COMPRESSED | {"format": "float-quantized"} | group(num_bits=8), float8_layer),
}


def quantize(path: Path, settings: Any, layer: Any) -> tuple[Path, Tensors]:
    """Quantize a checkpoint's projections in place; returns what their weights are then."""
    torch.manual_seed(0)
    tensors, expected = load_file(path / "model.safetensors"), {}
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        stored, expected[key] = layer(*tensors.pop(key).shape)
        prefix = key.removesuffix("weight")
        tensors |= {prefix + name: value.contiguous() for name, value in stored.items()}
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return path, expected


@pytest.fixture
def copy(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """family -> a copy of its tiny checkpoint."""
    return lambda family: Path(shutil.copytree(tiny_checkpoint(family), tmp_path / family))


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_they_stand_for(copy: Callable[[str], Path], case: str) -> None:
    settings, layer = CASES[case]
    path, expected = quantize(copy("llama"), settings, layer)
    checkpoint = open_checkpoint(path)
    assert len(expected) == 14
    for name, weight in expected.items():
        assert torch.allclose(checkpoint.tensor(name), weight, rtol=1e-6, atol=0), name
        assert torch.equal(torch.cat(list(checkpoint.float32_rows(name))), checkpoint.tensor(name))
    (note,) = checkpoint.notes
    assert note.startswith(f"llama: 14 weights are quantized ({settings['quant_method']}).")
    assert not hasattr(checkpoint.config, "quantization_config")


def test_an_image_model_whose_decoder_is_quantized(copy: Callable[[str], Path]) -> None:
    settings, layer = CASES["gptq"]
    path, expected = quantize(copy("qwen2_vl"), settings, layer)
    checkpoint = open_checkpoint(path)
    for name, weight in expected.items():
        name = name.replace("model.layers", "model.language_model.layers")  # stored as of old
        assert torch.allclose(checkpoint.tensor(name), weight), name
    assert checkpoint.model.vision is not None


def test_plain_weights_beside_them_stay_as_stored(copy: Callable[[str], Path]) -> None:
    path, _ = quantize(copy("llama"), *CASES["awq"])
    assert open_checkpoint(path).tensor("model.embed_tokens.weight").dtype == torch.bfloat16


def refused(path: Path, change: Callable[[Tensors], None], **settings: Any) -> str:
    """The message of a quantized checkpoint after a change."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= settings
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(path)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("case", "settings", "reason"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "packed as marlin of GPTQ"),
        ("awq", {"version": "gemv"}, "packed as gemv of AWQ in 4 bits"),
        ("awq", {"bits": 8}, "packed as gemm of AWQ in 8 bits"),
        ("fp8", {"weight_block_size": [16, 16]}, "are no blocks of [16, 16]"),
        ("int4", {"format": "nvfp4-pack-quantized"}, "are nvfp4-pack-quantized; pack-quantized"),
        ("int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "are sparse-24-bitmask"),
        ("int4", {"transform_config": {"config_groups": {"r": {}}}}, "are rotated weights"),
        ("int4", group(num_bits=3), "integers of 2, 4 or 8 bits was expected"),
    ],
)
def test_forms_that_are_not_read(
    copy: Callable[[str], Path], case: str, settings: dict[str, Any], reason: str
) -> None:
    path, _ = quantize(copy("llama"), *CASES[case])
    assert reason in refused(path, lambda tensors: None, **settings)


LAYER = "model.layers.1.mlp.up_proj."


@pytest.mark.parametrize(
    ("case", "name", "value", "reason"),
    [
        ("gptq", "scales", None, f"lacks {LAYER}scales"),
        ("gptq", "qzeros", torch.zeros(3, 7, dtype=torch.int32), "2, 4 or 8 bits were expected"),
        ("awq", "qzeros", None, f"lacks {LAYER}qzeros"),
        ("awq", "qzeros", torch.zeros(2, 20, dtype=torch.int32), "were expected; fetch the"),
        ("int4", "weight_shape", None, f"lacks {LAYER}weight_shape"),
        ("int4", "weight_scale", torch.zeros(160, 7), "are no scales for a weight of [160, 96]"),
        ("w8a8", "weight", torch.zeros(160, 96), "expected in int8 or float8"),
        ("fp8", "weight", torch.zeros(160, 96), "was expected in float8"),
        ("fp8", "weight_scale_inv", None, "nothing in config.json says how"),
    ],
)
def test_damaged_layers_are_named(
    copy: Callable[[str], Path], case: str, name: str, value: torch.Tensor | None, reason: str
) -> None:
    path, _ = quantize(copy("llama"), *CASES[case])

    def change(tensors: Tensors) -> None:
        if value is None:
            del tensors[LAYER + name]
        else:
            tensors[LAYER + name] = value

    message = refused(path, change)
    assert reason in message
    assert LAYER.removesuffix(".") in message


def test_integers_are_unpacked_along_either_axis() -> None:
    values = drawn(16, 24, 40)
    for dim in (0, 1, -1):
        assert torch.equal(unpack(packed(values, 4, dim), 4, dim), values)


def test_scales_reach_over_blocks_that_end_early() -> None:
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    spread = over(scale, (3, 5), (2, 4))
    assert spread.tolist() == [[1, 1, 1, 1, 2], [1, 1, 1, 1, 2], [3, 3, 3, 3, 4]]
    assert over(torch.tensor([2.0]), (3, 5)).shape == ()
    assert over(torch.tensor([1.0, 2.0, 3.0]), (3, 5)).tolist() == [[1], [2], [3]]


def test_exponents_of_two_may_be_scales() -> None:
    weight = torch.randn(4, 6).to(torch.float8_e4m3fn)
    scale = torch.tensor([[127, 128]], dtype=torch.uint8)
    expected = weight.float() * torch.tensor([1.0, 1, 1, 2, 2, 2])
    assert torch.equal(fp8.dequantize(weight, scale, (4, 3)), expected)


def test_experts_in_one_tensor_have_scales_each() -> None:
    weight, scale = torch.randn(3, 4, 6).to(torch.float8_e4m3fn), torch.rand(3, 2, 3)
    expected = weight.float() * scale.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(fp8.dequantize(weight, scale, (2, 2)), expected)


def test_a_stored_zero_point_of_fifteen_is_zero() -> None:
    ones = torch.full((1, 1), -1, dtype=torch.int32)  # eight times 15, to which 1 is added
    weight = gptq.dequantize(
        packed(drawn(16, 8, 8), 4, 0), ones, torch.ones(1, 8), bits=4, zero_offset=1
    )
    assert weight.min() >= 0


def test_input_channels_out_of_order_take_their_groups_scale() -> None:
    order = torch.tensor([1, 0, 1, 0])
    weight = compressed.dequantize(
        torch.ones(1, 4, dtype=torch.int8), torch.tensor([[2.0, 3.0]]), None, order
    )
    assert weight.tolist() == [[3, 2, 3, 2]]


@pytest.mark.parametrize(
    ("bits", "symmetric", "strategy", "columns"),
    [(4, True, "group", 96), (4, False, "group", 96), (8, False, "channel", 90)],
)
def test_packing_is_compressed_tensors_own(
    bits: int, symmetric: bool, strategy: str, columns: int, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from glmcompile.checkpoint.safetensors_files import tensors_of_file
    from glmcompile.checkpoint.sources import WeightFiles

    size = GROUP if strategy == "group" else None
    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    groups = columns // GROUP if size else 1
    half = 1 << (bits - 1)
    zeros = torch.zeros(40, groups, dtype=torch.int8)
    if not symmetric:
        zeros = drawn(half, 40, groups, low=-half).to(torch.int8)
    stored = PackedQuantizationCompressor.compress(
        {
            "weight": torch.randn(40, columns),
            "weight_scale": torch.rand(40, groups) / half + 0.01,
            "weight_zero_point": zeros,
        },
        scheme,
    )
    expected = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    save_file({f"x.{key}": value for key, value in stored.items()}, tmp_path / "x.safetensors")
    settings = {"config_groups": {"a": {"weights": {"num_bits": bits, "group_size": size or -1}}}}
    found = compressed.weights(tensors_of_file(tmp_path / "x.safetensors"), settings)
    assert list(found) == ["x.weight"]
    assert torch.allclose(found["x.weight"].read(WeightFiles()), expected, rtol=1e-6, atol=1e-7)


def test_awq_places_are_those_of_its_packing() -> None:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    assert [order[place] for place in awq.PLACES] == list(range(8))
