"""Where weights come from and in what precision: causal LMs, reward models, tokenizers.

Safetensors only, no remote code, dropout off, no gradient unless asked for.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

Quantization = Literal["fp8", "int8", "nf4"]


@dataclass(frozen=True)
class ModelSpec:
    """A model by name, with what the name alone does not say.

    Args:
        path: hub id or folder.
        revision: branch, tag or commit of a hub id.
        dtype: "auto" is bfloat16 on CUDA and float32 elsewhere; else "bfloat16", "float16", "float32".
        quantization: None keeps `dtype`.
        compile: compile scoring by decoder layer; "auto" is on for CUDA.
    """

    path: str | Path
    revision: str | None = None
    dtype: str | torch.dtype = "auto"
    quantization: Quantization | None = None
    compile: bool | Literal["auto"] = "auto"


ModelLike = str | Path | ModelSpec | PreTrainedModel


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
            f"reward model {_name(model)}: must have exactly one label, got num_labels={loaded.config.num_labels}; "
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


def load_tokenizer(model: str | Path | ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; a missing pad token is stood in for by eos (padding is told by masks).

    Raises:
        ValueError: it has neither pad nor eos, or cannot be opened.
    """
    spec = _spec(model, "auto")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(spec.path), revision=spec.revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer of {spec.path}: cannot be opened ({_first_line(error)})") from error
    return with_pad(tokenizer)


def with_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`tokenizer`, its pad token set to eos if it has none.

    Raises:
        ValueError: it has neither pad nor eos.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: must have a pad or an eos token, got neither; set tokenizer.eos_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, model: ModelLike, what: str) -> None:
    """Refuse a model that was trained on other ids (trap 5). Chat templates are not compared.

    Args:
        tokenizer: the one whose ids will be scored.
        model: a live model has no tokenizer to compare with, and is not checked; nor is a folder without one.
        what: who it is, for the message: "reward model", "reference".
    Raises:
        ValueError: the vocabularies differ.
    """
    if isinstance(model, PreTrainedModel):
        return
    spec = _spec(model, "auto")
    if Path(spec.path).is_dir() and not any(Path(spec.path).glob("token*")):
        return
    theirs = load_tokenizer(spec).get_vocab()
    ours = tokenizer.get_vocab()
    if ours == theirs:
        return
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    example = differing[0]
    raise ValueError(
        f"{what} {spec.path}: must have the policy's tokenizer ({len(ours)} tokens), got another with {len(theirs)}; "
        f"{len(differing)} differ, for one {example!r} ({ours.get(example)} against {theirs.get(example)}). Token ids "
        f"of one mean nothing to the other: use a {what} trained with this tokenizer, or score texts with HostReward"
    )


def context_length(model: ModelLike) -> int | None:
    """Positions that a model was built for, or None where its config does not say."""
    if isinstance(model, PreTrainedModel):
        config = model.config
    else:
        spec = _spec(model, "auto")
        try:
            config = AutoConfig.from_pretrained(str(spec.path), revision=spec.revision or "main", trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"model {spec.path}: its config cannot be opened ({_first_line(error)}); give a hub id or a "
                             "folder with config.json and safetensors weights") from error  # fmt: skip
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def stop_ids_of(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's eos and the eos ids of the model's generation config.

    Nothing else of a generation config is ever read (trap 18).
    """
    ids: list[int] = []
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is not None:
        ids += [int(i) for i in (eos if isinstance(eos, (list, tuple)) else [eos])]
    return tuple(dict.fromkeys(ids))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, so that `train()` (gradient checkpointing asks for it) changes nothing."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _load(
    auto: Any, model: ModelLike, device: torch.device | str, dtype: str | torch.dtype, trainable: bool
) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        disable_dropout(model)
        return model if trainable else model.eval()
    spec = _spec(model, dtype)
    device = torch.device(device)
    try:
        loaded: PreTrainedModel = auto.from_pretrained(
            str(spec.path),
            revision=spec.revision or "main",
            dtype=_dtype(spec.dtype, device),
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model {spec.path}: cannot be loaded ({_first_line(error)}); give a hub id or a folder with "
                         "config.json and safetensors weights") from error  # fmt: skip
    disable_dropout(loaded)
    loaded.eval().requires_grad_(trainable)
    setattr(loaded, "torchbandit_compile", spec.compile)  # noqa: B010 (a name that no module declares)
    return loaded


def _empty(
    auto: Any, model: str | Path | ModelSpec, device: torch.device | str, dtype: str | torch.dtype
) -> PreTrainedModel:
    spec = _spec(model, dtype)
    device, revision = torch.device(device), spec.revision or "main"
    try:
        config = AutoConfig.from_pretrained(str(spec.path), revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {spec.path}: its config cannot be opened ({_first_line(error)}); give a hub id or a "
                         "folder with config.json and safetensors weights") from error  # fmt: skip
    with no_init_weights(), device:
        made: PreTrainedModel = auto.from_config(config, dtype=_dtype(spec.dtype, device), trust_remote_code=False)
    # from_config knows nothing of generation_config.json, whose eos ids end a response.
    with contextlib.suppress(OSError):
        made.generation_config = GenerationConfig.from_pretrained(str(spec.path), revision=revision)
    disable_dropout(made)
    made.eval().requires_grad_(False)
    setattr(made, "torchbandit_compile", spec.compile)  # noqa: B010
    return made


def wants_compile(model: nn.Module) -> bool:
    """What `ModelSpec.compile` said of a model; a live model that said nothing is compiled on CUDA."""
    choice = getattr(model, "torchbandit_compile", "auto")
    if choice == "auto":
        return next(model.parameters()).is_cuda
    return bool(choice)


def _spec(model: str | Path | ModelSpec, dtype: str | torch.dtype) -> ModelSpec:
    return model if isinstance(model, ModelSpec) else ModelSpec(model, dtype=dtype)


def _name(model: ModelLike) -> str:
    return type(model).__name__ if isinstance(model, PreTrainedModel) else str(_spec(model, "auto").path)


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f'dtype: must be "auto", "bfloat16", "float16" or "float32", got {dtype!r}')
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
