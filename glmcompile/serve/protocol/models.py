"""The list of models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class Model(BaseModel):
    """max_model_len: tokens of a prompt and its answer together."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "glmcompile"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
