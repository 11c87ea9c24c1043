"""What is said of a model before it is loaded: its name, its precision, its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

Quantization = Literal["fp8", "int8", "nf4"]


@dataclass(frozen=True)
class ModelSpec:
    """A model by name, with what the name alone does not say.

    Args:
        path: hub id or folder.
        revision: branch, tag or commit of a hub id.
        dtype: "auto" is bfloat16 on CUDA and float32 elsewhere; else "bfloat16", "float16", "float32".
        quantization: of the decoder layers' linear weights, for a model that only runs forward: "fp8" and "int8"
            (torchao), "nf4" (bitsandbytes). None keeps `dtype`, which embeddings, norms and heads have in any case.
        compile: compile scoring by decoder layer; "auto" is on for CUDA.
        adapter: folder or hub id of a PEFT adapter that is laid over `path`.
    Raises:
        ValueError: an unknown quantization.
    """

    path: str | Path
    revision: str | None = None
    dtype: str | torch.dtype = "auto"
    quantization: Quantization | None = None
    compile: bool | Literal["auto"] = "auto"
    adapter: str | Path | None = None

    def __post_init__(self) -> None:
        if self.quantization is not None and self.quantization not in get_args(Quantization):
            raise ValueError(
                f"quantization of {self.path}: must be None or one of {get_args(Quantization)}, "
                f"got {self.quantization!r}"
            )


ModelLike = str | Path | ModelSpec | PreTrainedModel


def as_spec(model: str | Path | ModelSpec, dtype: str | torch.dtype = "auto") -> ModelSpec:
    """A spec as it is; of a bare path, one with `dtype`."""
    return model if isinstance(model, ModelSpec) else ModelSpec(model, dtype=dtype)


def name_of(model: ModelLike) -> str:
    """For messages."""
    return type(model).__name__ if isinstance(model, PreTrainedModel) else str(as_spec(model).path)


def dtype_on(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The torch dtype that `ModelSpec.dtype` means on a device.

    Raises:
        ValueError: it is no floating dtype.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f'dtype: must be "auto", "bfloat16", "float16" or "float32", got {dtype!r}')
    return found


def first_line(error: BaseException) -> str:
    """Of another library's message, as much as fits in ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
