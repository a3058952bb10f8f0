"""transformers' own processor for a model whose images the engine has no processor of its own for.

On Pillow and NumPy, without torch: the parts of it that need torch (videos, sound) are left out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glmcompile.errors import ArtifactError, InputError

# What a processor is read from; an engine holds copies.
PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_EXTRA = "install glmcompile's extra `processors`: pip install 'glmcompile[processors]'"


@dataclass(frozen=True)
class ImageArrays:
    """One image as transformers' processor gives it.

    inputs: what the vision encoder may take, by the processor's names. token_ids: what stands in
    the prompt for it. num_tokens: of these the image tokens, one for each feature.
    grid_thw: frames, patch rows and patch columns, where there is such a grid.
    digest: SHA-256 of the inputs.
    """

    inputs: dict[str, NDArray[Any]]
    token_ids: tuple[int, ...]
    num_tokens: int
    grid_thw: tuple[int, ...]
    digest: bytes


class TransformersProcessor:
    """A Processor class of transformers on one directory's files.

    image_token_id: of the tokens that take an image's features.
    """

    def __init__(self, directory: Path, name: str, placeholder: str, image_token_id: int) -> None:
        """Raises ArtifactError where transformers, or what the processor needs, is missing."""
        self._processor = load_processor(directory, name)
        self._placeholder = placeholder
        self._token = image_token_id

    def __call__(self, image: Image.Image, where: str = "") -> ImageArrays:
        """Process one RGB image. Raises InputError where the processor refuses it."""
        try:
            made = self._processor(
                text=[self._placeholder],
                images=[image],
                return_tensors="np",
                add_special_tokens=False,
            )
        except Exception as error:  # its own kinds
            raise InputError(f"{where}: {' '.join(str(error).split())[:300]}") from error
        ids = np.asarray(made["input_ids"]).reshape(-1)
        arrays = image_arrays(made)
        digest = hashlib.sha256()
        for name, array in arrays.items():
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return ImageArrays(
            arrays,
            tuple(int(id) for id in ids),
            int((ids == self._token).sum()),
            grid_of(arrays),
            digest.digest(),
        )


def image_arrays(made: Any) -> dict[str, NDArray[Any]]:
    """What a processor gives beside the text's tokens."""
    text = ("input_ids", "attention_mask", "labels", *TOKEN_KINDS)
    return {
        name: np.asarray(value)
        for name, value in made.items()
        if name not in text and not isinstance(value, str)
    }


def grid_of(arrays: dict[str, NDArray[Any]]) -> tuple[int, ...]:
    """The only image's grid of patches; () where the processor gives none."""
    for name in GRIDS:
        if name in arrays:
            return tuple(int(side) for side in arrays[name].reshape(-1))
    return ()


TOKEN_KINDS = ("token_type_ids", "mm_token_type_ids")
GRIDS = ("image_grid_thw", "grid_thw", "target_sizes", "image_grid_hws")


class _Absent(dict[str, Any]):
    """Stands for a part that is not used: of videos, of sound. A dict, as some are written out."""

    model_input_names: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return {"merge_size": 2, "temporal_patch_size": 2, "patch_size": 14}.get(name)


def load_processor(directory: Path, name: str) -> Any:
    """A Processor class of transformers by its name, made of the files in a directory.

    Raises ArtifactError where transformers, or a package that the class needs, is missing.
    """
    try:
        import transformers
        from transformers import AutoImageProcessor, AutoTokenizer
        from transformers.processing_utils import ProcessorMixin
    except ImportError as error:
        raise ArtifactError(f"images of this model need transformers; {_EXTRA}") from error
    own = getattr(transformers, name)
    try:
        parts: list[Any] = []
        for part in own.get_attributes():
            if "tokenizer" in part:
                parts.append(AutoTokenizer.from_pretrained(directory, local_files_only=True))
            elif part == "image_processor":
                parts.append(
                    AutoImageProcessor.from_pretrained(
                        directory, local_files_only=True, backend="pil"
                    )
                )
            else:
                parts.append(_Absent())
        settings, _ = own.get_processor_dict(directory, local_files_only=True)
        check = ProcessorMixin.check_argument_for_proper_class
        own.check_argument_for_proper_class = lambda self, label, part: (
            type(part) if isinstance(part, _Absent) else check(self, label, part)
        )
        try:
            return own.from_args_and_dict(parts, settings)
        finally:
            del own.check_argument_for_proper_class
    except Exception as error:  # transformers raises many kinds
        raise ArtifactError(
            f"{directory}: transformers' {name} cannot be made of the files there "
            f"({' '.join(str(error).split())[:300]})"
        ) from error


def processor_name(directory: Path, model_type: str) -> str | None:
    """The Processor class that a checkpoint's files name, or transformers for its type."""
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = directory / file
        if path.is_file():
            name = json.loads(path.read_text(encoding="utf-8")).get("processor_class")
            if name:
                return str(name)
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    found = PROCESSOR_MAPPING_NAMES.get(model_type)
    return str(found) if isinstance(found, str) else None
