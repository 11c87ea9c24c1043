"""A named model to a module on its device, straight in its target precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging

from torchbandit.models import adapters, quantize, weights
from torchbandit.models.estimate import check_fits
from torchbandit.models.hub import fetch
from torchbandit.models.mapped import given_back
from torchbandit.models.spec import ModelLike, ModelSpec, as_spec, dtype_on, first_line, name_of


def load_causal_lm(
    model: ModelLike, device: torch.device | str, *, dtype: str | torch.dtype = "auto", trainable: bool = False
) -> PreTrainedModel:
    """A causal language model, ready to score or to train.

    Args:
        model: hub id, folder, `ModelSpec`, or a live model, which is used where it is and as it is typed.
        device: where a named model is put.
        dtype: for a model named by path alone; a `ModelSpec` brings its own.
        trainable: parameters require gradient; else none does (a live model's flags are left alone).
    Returns:
        the model in eval mode with every dropout at 0.
    Raises:
        ValueError: the folder or hub id cannot be opened, or has no safetensors weights.
    """
    return _load(AutoModelForCausalLM, model, device, dtype, trainable)


def load_reward_model(
    model: ModelLike, device: torch.device | str, *, dtype: str | torch.dtype = "auto", trainable: bool = False
) -> PreTrainedModel:
    """A sequence classifier with exactly one label; arguments as in `load_causal_lm`.

    Raises:
        ValueError: the model has another number of labels.
    """
    loaded = _load(AutoModelForSequenceClassification, model, device, dtype, trainable)
    if loaded.config.num_labels != 1:
        raise ValueError(
            f"reward model {name_of(model)}: must have exactly one label, got num_labels={loaded.config.num_labels}; "
            "train or save it with num_labels=1"
        )
    return loaded


def empty_causal_lm(
    model: str | Path | ModelSpec, device: torch.device | str, *, dtype: str | torch.dtype = "auto"
) -> PreTrainedModel:
    """The architecture of `load_causal_lm` with uninitialised weights, for a process that is sent them.

    Raises:
        ValueError: the config cannot be opened.
    """
    return _empty(AutoModelForCausalLM, model, device, dtype)


def empty_reward_model(
    model: str | Path | ModelSpec, device: torch.device | str, *, dtype: str | torch.dtype = "auto"
) -> PreTrainedModel:
    """The architecture of `load_reward_model` with uninitialised weights, as `empty_causal_lm`."""
    return _empty(AutoModelForSequenceClassification, model, device, dtype)


def context_length(model: ModelLike) -> int | None:
    """Positions that a model was built for, or None where its config does not say."""
    config = model.config if isinstance(model, PreTrainedModel) else _config(as_spec(model))
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, so that `train()` (gradient checkpointing asks for it) changes nothing."""
    for module in model.modules():
        if isinstance(module, _DROPOUTS):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def dropout_in(model: nn.Module) -> str | None:
    """The name of a dropout above 0, or None."""
    for at, module in model.named_modules():
        if isinstance(module, _DROPOUTS) and module.p > 0:
            return str(at)
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float) and value > 0:
                return f"{at}.{name}"
    return None


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Without transformers' bars for reading and writing weights, which last a moment and break into ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load(
    auto: Any, model: ModelLike, device: torch.device | str, dtype: str | torch.dtype, trainable: bool
) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        disable_dropout(model)
        return model if trainable else model.eval()
    spec, device = as_spec(model, dtype), torch.device(device)
    if spec.adapter is not None:
        base = _load(AutoModelForCausalLM, replace(spec, adapter=None), device, dtype, False)
        lay = adapters.causal_lm_on if auto is AutoModelForCausalLM else adapters.reward_model_on
        adapted = lay(base, spec.adapter, trainable=trainable)
        disable_dropout(adapted)
        return adapted
    target = dtype_on(spec.dtype, device)
    options: dict[str, Any] = {}
    if spec.quantization is not None:
        if trainable:
            raise ValueError(f"model {spec.path}: quantization must be None for a model that is trained, "
                             f"got {spec.quantization!r}")  # fmt: skip
        quantize.require_available(spec.quantization, device)
    folder = fetch(spec, weights=True)
    skeleton = _skeleton(auto, _config(spec), torch.device("meta"), target)
    if spec.quantization is not None:
        quantize.check_shapes(spec.quantization, skeleton, device, str(spec.path))
    files = weights.check_files(folder, str(spec.path))
    check_fits(spec, skeleton, target, device)
    keep = quantize.outside_layers(skeleton)
    if spec.quantization is not None:
        options["quantization_config"] = quantize.config(spec.quantization, keep, target)
    # On the CPU the mapped pages may become the model itself, and stay.
    mapping = contextlib.nullcontext() if device.type == "cpu" else given_back(files)
    try:
        with mapping, quiet_bars():
            loaded, info = auto.from_pretrained(
                folder,
                dtype=target,
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"model {spec.path}: cannot be loaded ({first_line(error)}); give a hub id or a folder with "
                         "config.json and safetensors weights") from error  # fmt: skip
    assert isinstance(loaded, PreTrainedModel)
    if info["missing_keys"]:
        # transformers would draw them at random and warn: a language model opened as a reward model scores noise.
        missing = sorted(info["missing_keys"])
        raise ValueError(f"model {spec.path}: must hold all weights of a {type(loaded).__name__}, got none for "
                         f"{', '.join(missing[:3])}; give the folder of a model that was trained as one")  # fmt: skip
    if spec.quantization is not None:
        quantize.check(loaded, keep, str(spec.path))
    disable_dropout(loaded)
    loaded.eval().requires_grad_(trainable)
    setattr(loaded, "torchbandit_compile", spec.compile)  # noqa: B010 (a name that no module declares)
    return loaded


def _empty(
    auto: Any, model: str | Path | ModelSpec, device: torch.device | str, dtype: str | torch.dtype
) -> PreTrainedModel:
    spec, device = as_spec(model, dtype), torch.device(device)
    made = _skeleton(auto, _config(spec), device, dtype_on(spec.dtype, device))
    made.tie_weights()  # left out with the initialisation
    # from_config knows nothing of generation_config.json, whose eos ids end a response.
    with contextlib.suppress(OSError):
        made.generation_config = GenerationConfig.from_pretrained(fetch(spec))
    disable_dropout(made)
    made.eval().requires_grad_(False)
    setattr(made, "torchbandit_compile", spec.compile)  # noqa: B010
    return made


def _skeleton(auto: Any, config: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture, its weights never written."""
    with no_init_weights(), device:
        made: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    return made


def _config(spec: ModelSpec) -> Any:
    folder = fetch(spec)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        needs_code = "trust_remote_code" in str(error)
        why = "it asks to run code of its own (auto_map in config.json), which torchbandit never does"
        raise ValueError(f"model {spec.path}: cannot be loaded: its config cannot be opened ("
                         f"{why if needs_code else first_line(error)}); give a hub id or a folder with config.json "
                         "and safetensors weights, of an architecture that transformers has") from error  # fmt: skip


def wants_compile(model: nn.Module) -> bool:
    """What `ModelSpec.compile` said of a model; a live model that said nothing is compiled on CUDA."""
    choice = getattr(model, "torchbandit_compile", "auto")
    if choice == "auto":
        return next(model.parameters()).is_cuda
    return bool(choice)
