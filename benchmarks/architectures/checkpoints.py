"""Writes a tiny checkpoint, and checks with transformers itself that it works."""

from __future__ import annotations

import importlib.util
import inspect
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from benchmarks.architectures.configs import tiny
from benchmarks.architectures.processors import (
    image_processor_name,
    load_processor,
    pillow_class,
    write_processor,
)
from benchmarks.architectures.tables import each, words

TEXT = words(
    "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next gemma gemma2 gemma3_text "
    "phi phi3 phimoe glm glm4 glm4_moe gpt_oss gpt2 gpt_neox gptj opt bloom falcon mpt stablelm "
    "starcoder2 cohere cohere2 olmo olmo2 olmoe granite granitemoe smollm3 exaone4 deepseek_v3 "
    "lfm2 mamba2 bamba"
)
# One image a prompt; the others take several of different sizes.
ONE_IMAGE = words(
    "blip blip-2 instructblip git kosmos-2 florence2 shieldgemma2 got_ocr2 kosmos-2.5 fuyu "
    "perception_lm pix2struct vision-encoder-decoder pp_formulanet"
)
OTHER_INPUTS = {
    "evolla": "reads proteins, no images",
    "instructblipvideo": "reads videos, no images",
    "pi0": "reads a robot's state and actions beside images, and writes no text",
}
NEEDS = each("mistral3 mistral_large4", "torchvision") | {  # with a Pillow image processor
    "smolvlm": "num2words",
    "fast_vlm": "timm",
    "gemma3n": "timm",
    "perception_lm": "timm",
    "udop": "pytesseract",
    "inkling_mm_model": "scipy",
}
IMAGE_SIZES = ((140, 112), (90, 200))  # width, height


def types() -> list[str]:
    """Every type a checkpoint can be asked for: image types, then text decoders."""
    return [*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *TEXT]


def architecture(model_type: str) -> str:
    """The class that published checkpoints name."""
    images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return images.get(model_type) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def write_checkpoint(model_type: str, directory: Path) -> Path:
    """Write config, float32 weights, tokenizer, processor and chat template; deterministic."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny(model_type)
    config.architectures = [architecture(model_type)]
    torch.manual_seed(0)
    kind = getattr(transformers, architecture(model_type))
    model = kind._from_config(config, dtype=torch.float32)
    fill_weights(model)
    model.save_pretrained(directory)
    write_processor(model_type, config, directory)
    return directory


def fill_weights(model: nn.Module, seed: int = 0) -> None:
    """Random weights that keep activations near unit size: N(0, 1/fan_in), norms near one.

    Vectors keep what the type initializes them to (one, or zero where a norm adds one itself), and
    gates and layer scales become one, so that every branch shows in the output.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = {
        f"{name}.weight" for name, each in model.named_modules() if isinstance(each, nn.Embedding)
    }
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        start, last = parameter.data, name.rpartition(".")[2]
        if name in tables or (parameter.ndim >= 2 and ("position" in last or "query" in last)):
            value = noise
        elif parameter.ndim == 3 and "experts" in name:  # stacked: fan-in is one expert's
            value = noise / math.sqrt(min(parameter.shape[1:]))
        elif parameter.ndim >= 2:
            value = noise / math.sqrt(parameter[0].numel())
        elif start.numel() > 1 and start.min() < start.max():  # such as Mamba's decays
            value = start + 0.1 * noise
        elif (
            start.numel() == 1
            or (start == 1).all()
            or any(part in last for part in ("scale", "gamma", "lambda"))
        ):
            value = 1 + 0.1 * noise
        else:
            value = 0.1 * noise
        parameter.data.copy_(value)


def needs(model_type: str) -> str | None:
    """The package that the type's processor or model needs beyond the compiler's own, or None."""
    name = image_processor_name(model_type)
    lacks_pillow = name is not None and pillow_class(name) is None
    return NEEDS.get(model_type) or ("torchvision" if lacks_pillow else None)


def check(model_type: str) -> str:
    """Run the type in transformers, from the written files: "ok", or why not."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            directory = write_checkpoint(model_type, Path(folder))
            size = sum(file.stat().st_size for file in directory.iterdir())
            if size > 30e6:
                return f"{size / 1e6:.0f} MB, over 30"
            kind = getattr(transformers, architecture(model_type))
            model = kind.from_pretrained(directory).eval()
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
            with torch.inference_mode():
                if model_type in TEXT:
                    inputs = tokenizer("A few words of text.", return_tensors="pt")
                    inputs.pop("token_type_ids", None)
                    return verdict(model(**inputs))
                if reason := OTHER_INPUTS.get(model_type):
                    return reason
                if (package := needs(model_type)) and not importlib.util.find_spec(package):
                    return f"needs {package}"
                processor = load_processor(directory)
                images = [picture(size, seed) for seed, size in enumerate(IMAGE_SIZES)]
                single = model_type in ONE_IMAGE
                for chosen in (images[:1], images[1:] if single else images):
                    text = prompt(tokenizer, len(chosen))
                    inputs = call(model, processor, text, chosen)
                    answer = verdict(model(**decoder_start(model) | inputs))
                    if answer != "ok":
                        return answer
                return "ok"
    except Exception as error:
        package = needs(model_type) if isinstance(error, ImportError) else None
        return f"needs {package}" if package else reason_of(error)


def reason_of(error: Exception) -> str:
    trace, where = error.__traceback__, ""
    while trace:
        path = Path(trace.tb_frame.f_code.co_filename)
        where = f"{path.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({where})"


def verdict(output: Any) -> str:
    finite = torch.isfinite(output.logits).all()
    return "ok" if finite else "the logits are not finite"


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def prompt(tokenizer: Any, images: int) -> str:
    """One user message with so many images before its text, and the start of an answer."""
    parts = [{"type": "image"}] * images + [{"type": "text", "text": "What is this?"}]
    message = {"role": "user", "content": parts}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


def call(model: nn.Module, processor: Any, text: str, images: list) -> dict[str, torch.Tensor]:
    """The processor's tensors; some want the images of each text as a list, some all in one."""
    settings: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        settings["return_mm_token_type_ids"] = True
    try:
        inputs = processor(images=[images], **settings)
    except (ValueError, TypeError):
        inputs = processor(images=images, **settings)
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    floating = {
        name for name, value in inputs.items() if getattr(value, "is_floating_point", bool)()
    }
    return {name: value.float() if name in floating else value for name, value in inputs.items()}


def decoder_start(model: nn.Module) -> dict[str, torch.Tensor]:
    """The first decoder token, where an encoder reads the prompt."""
    if not model.config.is_encoder_decoder:
        return {}
    configs = (model.config, model.config.get_text_config(decoder=True))
    names = ("decoder_start_token_id", "bos_token_id")
    found = [getattr(config, name, None) for name in names for config in configs]
    start = next(token for token in found if token is not None)
    return {"decoder_input_ids": torch.tensor([[start]])}
