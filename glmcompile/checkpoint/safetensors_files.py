"""The tensors of a directory's safetensors files, from the files' headers."""

from __future__ import annotations

from pathlib import Path

import safetensors
import torch

from glmcompile.checkpoint.json_files import read_json
from glmcompile.checkpoint.sources import StoredTensor
from glmcompile.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# By their names in a header. Types that torch lacks cannot be parts of a parameter.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory's weight files by its name there.

    Raises CheckpointError for missing, damaged or pickled files.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        shards = _shards_of_index(index)
    elif (directory / SINGLE_FILE).is_file():
        shards = {SINGLE_FILE: []}
    else:
        refuse_pickles(directory)
        raise CheckpointError(f"{directory} has no weights: expected {SINGLE_FILE} or {INDEX_FILE}")
    tensors: dict[str, StoredTensor] = {}
    for shard, expected in shards.items():
        found = tensors_of_file(directory / shard)
        for key in expected:
            if key not in found:
                raise CheckpointError(
                    f"{directory / shard} lacks the tensor {key} that {INDEX_FILE} places there; "
                    "the shard and the index do not belong together"
                )
        tensors.update(found)
    return tensors


def refuse_pickles(directory: Path) -> None:
    """Raises CheckpointError where a directory has pickled weights."""
    pickled = sorted(f.name for f in directory.iterdir() if f.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise CheckpointError(
            f"{directory} has only pickled weights ({', '.join(pickled)}), which are refused: "
            "loading a pickle can run any code in it. Convert a checkpoint that you trust with "
            "transformers' `save_pretrained`, which writes safetensors, and give that directory"
        )


def tensors_of_file(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file by its name there. Raises CheckpointError for a damaged one."""
    try:
        with safetensors.safe_open(file, framework="pt") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
            described = {key: (s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}); fetch it again"
        ) from error
    return {
        key: StoredTensor(file, key, DTYPES[dtype], shape)
        for key, (dtype, shape) in described.items()
        if dtype in DTYPES
    }


def _shards_of_index(index: Path) -> dict[str, list[str]]:
    """Names of the tensors that the index places in each shard; every shard exists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map naming the shard of each tensor")
    shards: dict[str, list[str]] = {}
    for key, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index} places {key} in {shard!r}; expected a file name")
        shards.setdefault(shard, []).append(key)
    for shard in sorted(shards):
        if not (index.parent / shard).is_file():
            raise CheckpointError(
                f"{index.parent / shard} is missing, one of the {len(shards)} shards that "
                f"{INDEX_FILE} names; fetch the checkpoint again"
            )
    return shards
