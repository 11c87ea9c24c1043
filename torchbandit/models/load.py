"""A named model to a module on its device, straight in its target precision."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from torchbandit.models import adapters, experts, quantize, text, weights
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
    """The name of a dropout above 0, or of a router's jitter in train mode; or None."""
    for at, module in model.named_modules():
        if isinstance(module, _DROPOUTS) and module.p > 0:
            return str(at)
        for name, value in vars(module).items():
            random = "dropout" in name or ("jitter" in name and module.training)
            if random and isinstance(value, float) and value > 0:
                return f"{at}.{name}"
    return None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode inside the block; after it every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def keep_steady(model: nn.Module) -> None:
    """Eval mode, save where gradient checkpointing asks for train mode: the layers that it recomputes, and the model.

    Train mode switches more than dropout: routers of experts add jitter or sample (trap 36). These sit inside layers,
    and stay in eval mode.
    """
    model.eval()
    again = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    for module in [model, *again] if again else []:
        module.training = True


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


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` opens; of a model with an adapter, the adapter."""
    with quiet_bars():
        if getattr(model, "peft_config", None):
            adapters.save(model, folder)
        else:
            model.save_pretrained(folder)


HEAD = "value_head.safetensors"


def save_value_head(head: nn.Linear, folder: Path) -> None:
    """Write a value head beside its model."""
    save_file({name: weight.contiguous() for name, weight in head.state_dict().items()}, folder / HEAD)


def load_value_head(model: str | Path | ModelSpec, head: nn.Linear) -> None:
    """Fill `head` with the one saved beside a model (or its adapter), if there is one.

    Raises:
        ValueError: it is of another size, or the folder has a critic of its own instead.
    """
    spec = as_spec(model)
    folder = fetch(spec if spec.adapter is None else ModelSpec(spec.adapter), weights=True)
    if not (folder / HEAD).is_file():
        if (folder / "critic").is_dir():
            raise ValueError(f'critic: {folder} was saved with a critic of its own, got critic="head"; name it: '
                             f"critic={str(folder / 'critic')!r}")  # fmt: skip
        return
    state = load_file(folder / HEAD)
    want = {name: list(weight.shape) for name, weight in head.state_dict().items()}
    got = {name: list(weight.shape) for name, weight in state.items()}
    if got != want:
        raise ValueError(f"{folder / HEAD}: must hold {want}, got {got}; it was saved with another model")
    head.load_state_dict(state)


def _load(
    auto: Any, model: ModelLike, device: torch.device | str, dtype: str | torch.dtype, trainable: bool
) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        if trainable:
            quantize.check_trainable(model)
        if auto is AutoModelForCausalLM and text.whole_class(model.config) is not None:
            model = text.text_side(model, name_of(model))
        _complete(model)
        disable_dropout(model)
        return model if trainable else model.eval()
    spec, device = as_spec(model, dtype), torch.device(device)
    if spec.adapter is not None:
        base = _load(AutoModelForCausalLM, replace(spec, adapter=None), device, dtype, False)
        lay = adapters.causal_lm_on if auto is AutoModelForCausalLM else adapters.reward_model_on
        adapted = lay(base, spec.adapter, trainable=trainable)
        for config in getattr(adapted, "peft_config", {}).values():
            config.base_model_name_or_path = str(spec.path)  # the one in use, which its own config need not name
        disable_dropout(adapted)
        return adapted
    target = dtype_on(spec.dtype, device)
    options: dict[str, Any] = {}
    if spec.quantization is not None:
        if trainable:
            raise quantize.not_trainable(str(spec.path), spec.quantization)
        quantize.require_available(spec.quantization, device)
    folder = fetch(spec, weights=True)
    over_base = adapters.over_base(spec, folder)
    if over_base is not None:
        return _load(auto, over_base, device, dtype, trainable)
    config = _config(spec)
    saved_as = quantize.saved_as(config)
    if saved_as is not None and trainable:
        raise quantize.not_trainable(str(spec.path), saved_as)
    whole = text.whole_class(config) if auto is AutoModelForCausalLM else None
    if whole is not None:
        text.text_config(config, str(spec.path))  # refused before anything is read, if at all
        if spec.quantization is not None:
            raise ValueError(f"model {spec.path}: quantization must be None for a model of more than text, got "
                             f"{spec.quantization!r}; save its text side first: load_causal_lm({str(spec.path)!r}, "
                             "device).save_pretrained(folder)")  # fmt: skip
        auto = whole
    skeleton = _skeleton(auto, config, torch.device("meta"), target, str(spec.path))
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
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: shapes that differ
        raise ValueError(f"model {spec.path}: cannot be loaded ({first_line(error)}); give a hub id or a folder with "
                         "config.json and safetensors weights") from error  # fmt: skip
    assert isinstance(loaded, PreTrainedModel)
    _check_keys(info, loaded, str(spec.path))
    if spec.quantization is not None:
        experts.quantise(loaded, spec.quantization)
        quantize.check(loaded, keep, str(spec.path))
        quantize.tell_plain(loaded, skeleton, str(spec.path), spec.quantization)
    if whole is not None:
        loaded = text.text_side(loaded, str(spec.path))
        warnings.warn(f"model {spec.path}: holds more than text; its text side alone is used, and saved, as a "
                      f"{type(loaded).__name__}", stacklevel=3)  # fmt: skip
    _complete(loaded)
    disable_dropout(loaded)
    loaded.eval().requires_grad_(trainable)
    setattr(loaded, "torchbandit_compile", spec.compile)  # noqa: B010 (a name that no module declares)
    return loaded


def _complete(model: PreTrainedModel) -> None:
    """What some architectures leave out, and others read."""
    text.name_base(model)
    for config in (model.config, model.config.get_text_config()):
        if not hasattr(config, "pad_token_id"):
            config.pad_token_id = None


def _check_keys(info: dict[str, Any], loaded: PreTrainedModel, name: str) -> None:
    """That the checkpoint holds this model's weights, all of them, and no others.

    transformers would draw what is missing at random, so that a language model opened as a reward model scores noise;
    and leave out what it does not know, such as a bias of the head (trap 38).
    """
    kind = type(loaded).__name__
    if info["missing_keys"]:
        raise ValueError(f"model {name}: must hold all weights of a {kind}, got none for "
                         f"{_some(info['missing_keys'])}; give the folder of a model trained as one")  # fmt: skip
    unknown = [key for key in info["unexpected_keys"] if not key.endswith(_HARMLESS)]
    if unknown:
        raise ValueError(f"model {name}: must hold the weights of a {kind} alone, got {_some(unknown)} as well, which "
                         "it would not use; open it as the class that it was saved as, or take them out")  # fmt: skip


_HARMLESS = ("inv_freq", "masked_bias", "attn.bias", "attention.bias", "position_ids")
"""Ends of names under which older checkpoints keep what a model computes by itself: frequencies, masks, positions."""


def _some(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def _empty(
    auto: Any, model: str | Path | ModelSpec, device: torch.device | str, dtype: str | torch.dtype
) -> PreTrainedModel:
    spec, device = as_spec(model, dtype), torch.device(device)
    config = _config(spec)
    if auto is AutoModelForCausalLM and text.whole_class(config) is not None:
        config = text.text_config(config, str(spec.path))
    made = _skeleton(auto, config, device, dtype_on(spec.dtype, device), str(spec.path))
    made.tie_weights()  # left out with the initialisation
    # from_config knows nothing of generation_config.json, whose eos ids end a response.
    with contextlib.suppress(OSError):
        made.generation_config = GenerationConfig.from_pretrained(fetch(spec))
    _complete(made)
    disable_dropout(made)
    made.eval().requires_grad_(False)
    setattr(made, "torchbandit_compile", spec.compile)  # noqa: B010
    return made


def _skeleton(auto: Any, config: Any, device: torch.device, dtype: torch.dtype, name: str) -> PreTrainedModel:
    """The architecture, its weights never written.

    Raises:
        ValueError: transformers has no such class of this architecture, or cannot build it.
    """
    kind = "sequence classifier" if auto is AutoModelForSequenceClassification else "causal language model"
    if type(config) not in auto._model_mapping:
        raise ValueError(f"model {name}: transformers has no {kind} of architecture {config.model_type}; use a "
                         "model of another architecture")  # fmt: skip
    try:
        with no_init_weights(), device:
            made: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # a config that its own architecture cannot be built from, a package that it asks for
        raise ValueError(f"model {name}: cannot be built as a {kind} of architecture {config.model_type} "
                         f"({first_line(error)}); check its config.json") from error  # fmt: skip
    return made


def _config(spec: ModelSpec) -> Any:
    folder = fetch(spec)
    over_base = adapters.over_base(spec, folder)
    if over_base is not None:
        return _config(over_base)
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
