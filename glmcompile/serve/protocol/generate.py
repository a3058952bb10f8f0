"""One text, with or without images, and its continuation: a form without a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from glmcompile.errors import InputError
from glmcompile.runtime.input_processor import Prompt
from glmcompile.runtime.sampling_params import SamplingParams
from glmcompile.serve.protocol.common import Body, Sampling, TokenUsage


class GenerateInputs(Body):
    """text: the user's words. image: base64 of an image's file or a data URL, or a list of them."""

    text: str
    image: str | Annotated[list[str], Field(min_length=1)] | None = None


class GenerateParameters(Sampling):
    """multimodal: whether there are images. do_sample: false takes the likeliest token always."""

    multimodal: bool | None = None
    max_new_tokens: int | None = None
    do_sample: bool | None = None
    mm_processor_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> GenerateParameters:
        if self.do_sample is False and self.temperature:
            raise ValueError("`do_sample` is false, but a `temperature` is given; leave one out")
        return self


class GenerateRequest(Body):
    """`POST /v1/generate`."""

    inputs: GenerateInputs
    parameters: GenerateParameters = Field(
        default_factory=lambda: GenerateParameters.model_validate({})
    )

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """defaults: see Sampling. Raises InputError naming an option that is out of range."""
        options = self.parameters
        if options.do_sample is False:
            defaults = {**defaults, "temperature": 0.0}
        return options.sampling_params(defaults, max_tokens=options.max_new_tokens, logprobs=None)

    def prompt(self) -> Prompt:
        """Raises InputError where `multimodal` says otherwise than the inputs do."""
        image = self.inputs.image
        images = [] if image is None else [image] if isinstance(image, str) else image
        if self.parameters.multimodal is not None and self.parameters.multimodal != bool(images):
            raise InputError(
                f"parameters.multimodal is {str(bool(not images)).lower()} but inputs.image "
                f"{'is missing' if not images else 'is given'}; make them agree"
            )
        return Prompt(
            prompt=self.inputs.text,
            images=[_data_url(each) for each in images],
            mm_processor_kwargs=self.parameters.mm_processor_kwargs,
        )


class Generated(BaseModel):
    model_config = ConfigDict(strict=True)

    generated_text: str
    finish_reason: str
    usage: TokenUsage


def _data_url(image: str) -> str:
    return image if image.startswith("data:") else f"data:image/*;base64,{image}"
