"""What transformers computes for a component: the module alone, eager, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoImageProcessor

from glmcompile.checkpoint import Checkpoint
from glmcompile.export.skeleton import build_skeleton

# Width and height of the images of the default samples; two of them share a prompt.
SAMPLE_IMAGES = ((140, 224), (336, 196), (84, 84))
SAMPLE_PROMPTS = (
    "The settings screen lists the networks nearby.",
    "What is shown here, and where would you tap to open it?",
    "Yes.",
)


@dataclass(frozen=True)
class Sample:
    """One prompt: token ids int64 [T] and the patches and grids of its images in order.

    pixel_values: float32 [patches, patch values]; grid_thw: int64 [images, 3]; both may be empty.
    """

    token_ids: NDArray[np.int64]
    pixel_values: NDArray[np.float32]
    grid_thw: NDArray[np.int64]


def default_samples(checkpoint: Checkpoint) -> list[Sample]:
    """Prompts of several lengths; for an image model one holds two images and one holds one."""
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
    texts = [np.array(tokenizer.encode(text).ids, np.int64) for text in SAMPLE_PROMPTS]
    vision = checkpoint.model.vision
    if vision is None:
        no_grid = np.empty((0, 3), np.int64)
        return [Sample(ids, np.empty((0, 0), np.float32), no_grid) for ids in texts]
    processor = AutoImageProcessor.from_pretrained(
        checkpoint.path, local_files_only=True, backend="pil"
    )
    noise = np.random.default_rng(0)
    samples = []
    for ids, sizes in zip(texts, (SAMPLE_IMAGES[:2], SAMPLE_IMAGES[2:], ()), strict=True):
        pieces, pixels, grids = [ids[:1]], [], []
        for index, (width, height) in enumerate(sizes, start=1):
            coarse = noise.integers(0, 256, (height // 14, width // 14, 3), np.uint8)
            image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            processed = processor([image], return_tensors="np")
            pixels.append(processed["pixel_values"])
            grids.append(processed["image_grid_thw"][0])
            count = checkpoint.family.image_tokens(grids[-1], vision)
            image_tokens = np.full(count, checkpoint.model.image_token_id, np.int64)
            pieces += [image_tokens, ids[index : index + 1]]
        samples.append(
            Sample(
                np.concatenate([*pieces, ids[len(sizes) + 1 :]]),
                np.concatenate(pixels) if pixels else np.empty((0, 0), np.float32),
                np.array(grids, np.int64).reshape(-1, 3),
            )
        )
    return samples


def load_component(checkpoint: Checkpoint, paths: Sequence[str]) -> nn.Module:
    """The transformers model with real weights in the modules at `paths` only, eager attention."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = build_skeleton(checkpoint, mode, symbolic_attention=False)
    for path in paths:
        for name, _ in list(model.get_submodule(path).named_parameters(prefix=path)):
            owner, _, attribute = name.rpartition(".")
            value = checkpoint.tensor(name).to(torch.float32)
            setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    return model


@torch.inference_mode()
def vision_features(checkpoint: Checkpoint, samples: Sequence[Sample]) -> list[NDArray[np.float32]]:
    """Image features [image tokens, hidden] of each sample."""
    path = checkpoint.family.modules.vision
    assert path is not None
    visual = load_component(checkpoint, [path]).get_submodule(path)
    return [
        visual(torch.from_numpy(s.pixel_values), grid_thw=torch.from_numpy(s.grid_thw))
        .pooler_output.float()
        .numpy()
        if len(s.grid_thw)
        else np.empty((0, checkpoint.model.hidden_size), np.float32)
        for s in samples
    ]


@torch.inference_mode()
def embeddings(
    checkpoint: Checkpoint, samples: Sequence[Sample], features: Sequence[NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    """Input embeddings [T, hidden] of each sample, image tokens replaced by the features."""
    path = checkpoint.family.modules.embed_tokens
    embed_tokens = load_component(checkpoint, [path]).get_submodule(path)
    results = []
    for sample, image in zip(samples, features, strict=True):
        embeds = embed_tokens(torch.from_numpy(sample.token_ids))
        mask = torch.from_numpy(sample.token_ids == checkpoint.model.image_token_id)
        results.append(embeds.masked_scatter(mask[:, None], torch.from_numpy(image)).numpy())
    return results


@torch.inference_mode()
def logits(
    checkpoint: Checkpoint, samples: Sequence[Sample], embeds: Sequence[NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    """Logits [T, vocab] of every position of each sample, computed alone and in one piece."""
    modules = checkpoint.family.modules
    model = load_component(checkpoint, [modules.decoder, modules.lm_head])
    decoder, lm_head = (model.get_submodule(p) for p in (modules.decoder, modules.lm_head))
    results = []
    for sample, values in zip(samples, embeds, strict=True):
        positions, _ = checkpoint.family.position_ids(
            sample.token_ids, sample.grid_thw, checkpoint.model
        )
        position_ids = torch.from_numpy(positions)
        hidden = decoder(
            inputs_embeds=torch.from_numpy(values)[None],
            position_ids=position_ids if len(position_ids) == 1 else position_ids[:, None],
            use_cache=False,
        ).last_hidden_state
        results.append(lm_head(hidden[0]).numpy())
    return results
