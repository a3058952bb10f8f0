"""The reference model from nothing: tokenizer, processor and an untrained small GLM-4V."""

import json
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Glm4vConfig, Glm4vForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

from calibration.layouts import LAYOUTS
from calibration.processor import ImageTextProcessor
from calibration.screens import draw
from calibration.tasks import ask, kinds_for
from calibration.words import TYPED, WORDS

VOCABULARY = 768
CONTEXT = 4096
IMAGE_TOKENS = 648  # of 504x1008 pixels; larger screenshots are to be scaled down to no more
PAD = "<|endoftext|>"
END = "<|user|>"  # a turn ends where the next one of the user begins
SPECIAL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>",
    "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>",
)  # fmt: skip
CHAT_TEMPLATE = """[gMASK]<sop>
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '<|assistant|>\\n' }}
{%- elif message.role == 'system' %}{{ '<|system|>\\n' }}
{%- else %}{{ '<|user|>\\n' }}{% endif %}
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}
{%- if part.type in ('image', 'image_url') or 'image' in part %}
{{- '<|begin_of_image|><|image|><|end_of_image|>' }}
{%- elif part.type == 'video' or 'video' in part %}
{{- '<|begin_of_video|><|video|><|end_of_video|>' }}
{%- elif 'text' in part %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
PREFIX = "[gMASK]<sop><|user|>\n<|begin_of_image|>"  # the template's text before the image
TURN = "<|assistant|>\n"


def _corpus(count: int = 4000):
    """Questions and answers about training screens, and the words alone."""
    rng = Random("tokenizer")
    for _ in range(count):
        layout = rng.choice(LAYOUTS["train"])
        screen = draw(layout, rng)
        for kind in kinds_for(layout):
            sample = ask(screen, kind, rng)
            yield sample.prompt
            yield sample.answer
    for word in (*WORDS, *TYPED):
        yield from (word, f" {word}") * 50


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Trains the byte-level BPE: digits stay single, GLM-4V's special tokens come last."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=PAD,
        additional_special_tokens=[token for token in SPECIAL if token != PAD],
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_processor(
    tokenizer: PreTrainedTokenizerFast, image_tokens: int = IMAGE_TOKENS
) -> ImageTextProcessor:
    """The processor of GLM-4V, which scales larger pictures down to `image_tokens` visual tokens.

    A picture counts as two frames of a video, so the limit on pixels is twice the picture's.
    """
    size = {"shortest_edge": 112 * 112, "longest_edge": 2 * 28 * 28 * image_tokens}
    return ImageTextProcessor(Glm4vImageProcessorPil(size=size), tokenizer, CHAT_TEMPLATE)


def make_config(tokenizer: PreTrainedTokenizerFast) -> Glm4vConfig:
    """Short and wide: head size 64, every GEMM dimension a multiple of 64."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [4, 6, 6],
        },
    }
    vision = {
        "depth": 4,
        "initializer_range": 0.04,
        "hidden_size": 256,
        "num_heads": 4,
        "out_hidden_size": 384,  # also the width of the encoder's MLPs
        "intermediate_size": 1024,  # of the merger
        "image_size": 336,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    }
    return glm4v_config(tokenizer, text, vision)


def glm4v_config(tokenizer: PreTrainedTokenizerFast, text: dict, vision: dict) -> Glm4vConfig:
    """A GLM-4V of this text and vision geometry that knows the tokenizer's special tokens."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    return Glm4vConfig(
        text_config={**text, "pad_token_id": ids[PAD]},
        vision_config=vision,
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        image_start_token_id=ids["<|begin_of_image|>"],
        image_end_token_id=ids["<|end_of_image|>"],
        video_start_token_id=ids["<|begin_of_video|>"],
        video_end_token_id=ids["<|end_of_video|>"],
        tie_word_embeddings=False,
    )


def _cosines(size: int) -> torch.Tensor:
    """The orthonormal DCT-II basis [size, size], lowest frequency first."""
    angle = torch.outer(torch.arange(size), torch.arange(size) + 0.5) * torch.pi / size
    basis = angle.cos() * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    return basis


def _cosine_filters(like: torch.Tensor) -> torch.Tensor:
    """Patch filters [width, 3, 2, 14, 14]: all of the brightness, the low frequencies of colour.

    Random filters mostly see whether a patch is light or dark and learn to read only slowly. The
    means are damped for the same reason.
    """
    width, _, frames, side, _ = like.shape
    basis = _cosines(side)
    frequency = torch.arange(side)
    order = (frequency[:, None] + frequency[None]).flatten().argsort(stable=True)
    planes = torch.einsum("ay,bx->abyx", basis, basis).flatten(0, 1)[order]
    planes[0] *= 0.25
    colours = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]])
    colours = colours / colours.norm(dim=1, keepdim=True)
    filters = torch.einsum("kc,pyx->pkcyx", colours, planes)
    brightness, colour = filters[0, 1:], filters[1:, 1:].transpose(0, 1).flatten(0, 1)
    chosen = torch.cat((filters[:, 0], brightness, colour))[:width]
    return chosen[:, :, None].expand(-1, -1, frames, -1, -1) / frames


def _smooth_positions(count: int, width: int) -> torch.Tensor:
    """Position embeddings [count, width] of a square table: random mixtures of slow waves."""
    side = round(count**0.5)
    waves = _cosines(side)[1:9] * (side / 2) ** 0.5
    down, across = waves[:, :, None].expand(-1, -1, side), waves[:, None].expand(-1, side, -1)
    features = torch.cat((down, across)).flatten(1).T
    return features @ torch.randn(features.shape[1], width) * 0.08


def make_model(config: Glm4vConfig, tokenizer: PreTrainedTokenizerFast, seed: int = 0):
    """An untrained model in float32 with its generation config."""
    torch.manual_seed(seed)
    model = Glm4vForConditionalGeneration(config).float()
    visual = model.model.visual
    with torch.no_grad():
        visual.patch_embed.proj.weight.copy_(_cosine_filters(visual.patch_embed.proj.weight))
        table = visual.embeddings.position_embedding.weight
        table.copy_(_smooth_positions(*table.shape))
    ends = (PAD, END, "<|observation|>")
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in ends]
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids(PAD)
    model.generation_config.do_sample = False
    return model


def save(model, processor: ImageTextProcessor, folder: Path) -> None:
    """Writes the checkpoint in bfloat16 the way `from_pretrained` reads it; `model` stays float32.

    Raises OSError if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    (folder / "model.safetensors").chmod(0o644)
    config = _read(folder / "config.json")
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "bfloat16"
    _write(folder / "config.json", config)
    save_processor(processor, folder)


def save_processor(processor: ImageTextProcessor, folder: Path) -> None:
    """Writes tokenizer, processor and chat template under the names of a published checkpoint."""
    processor.save_pretrained(folder)
    _name_processor(folder)


def _name_processor(folder: Path) -> None:
    """Has the files name GLM-4V's own processor classes, as a published checkpoint does."""
    for name in ("processor_config.json", "tokenizer_config.json"):
        _write(folder / name, _read(folder / name) | {"processor_class": "Glm4vProcessor"})
    image = _read(folder / "processor_config.json")["image_processor"]
    image |= {"processor_class": "Glm4vProcessor"}
    _write(folder / "preprocessor_config.json", image)
    video = {key: value for key, value in image.items() if key != "image_processor_type"}
    video |= {"video_processor_type": "Glm4vVideoProcessor"}
    _write(folder / "video_preprocessor_config.json", video)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
