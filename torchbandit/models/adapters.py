"""PEFT adapters: several models over one copy of a backbone's weights.

Each model has modules of its own over the same tensors, so none of them has to switch an adapter on or off, and
compiled layers stay apart. `torchbandit[lora]`.

    reference = load_causal_lm("base", "cuda")
    reward = [RewardModel(reward_model_on(reference, "reward-adapter")), KLPenalty(reference)]
"""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from torchbandit.models.hub import fetch
from torchbandit.models.spec import ModelSpec, first_line

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base"


def causal_lm_on(backbone: PreTrainedModel, adapter: str | Path, *, trainable: bool = False) -> PreTrainedModel:
    """A causal LM: `backbone` with an adapter over it. `backbone` stays as it is, and its weights are shared.

    Args:
        backbone: a live causal LM that is not trained itself.
        adapter: folder or hub id with adapter_config.json and adapter_model.safetensors.
        trainable: the adapter's weights require gradient.
    Raises:
        ImportError: peft is missing; names the extra.
        ValueError: the adapter cannot be opened, or is no safetensors file.
    """
    return _adapted(twin(backbone), adapter, trainable)


def reward_model_on(backbone: PreTrainedModel, adapter: str | Path, *, trainable: bool = False) -> PreTrainedModel:
    """A one-label classifier: the backbone of a causal LM with an adapter and its score head; arguments as above.

    Raises:
        ValueError: as above, or the adapter brings no score head (`modules_to_save=["score"]`).
    """
    config = copy.deepcopy(backbone.config)
    config.num_labels = 1
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=backbone.dtype)
    prefix = model.base_model_prefix
    setattr(model, prefix, twin(backbone).base_model)
    heads = [name for name, module in model.named_children() if name != prefix]
    for name in heads:
        model.get_submodule(name).to_empty(device=backbone.device)
    if not any(name in _saved(adapter) for name in heads):
        raise ValueError(f"adapter {adapter}: must bring the score head of a reward model, got none; train it with "
                         f"modules_to_save={heads}")  # fmt: skip
    return _adapted(model, adapter, trainable)


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The frozen base under a model with adapters, over the same weights: the reference of a LoRA policy, for free.

    Raises:
        ImportError: peft is missing; names the extra.
    """
    _peft()
    layers = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    wrapper = importlib.import_module("peft.utils.other").ModulesToSaveWrapper
    base: PreTrainedModel = twin(model)
    for name, module in list(base.named_modules()):
        if isinstance(module, layers):
            _replace(base, name, module.get_base_layer())
        elif isinstance(module, wrapper):
            _replace(base, name, module.original_module)
    base.eval()
    return base


def over_base(spec: ModelSpec, folder: Path) -> ModelSpec | None:
    """Of a folder that holds an adapter alone, its base with the adapter over it; None of any other folder.

    The base is `folder/base`, or what adapter_config.json names: a folder or a hub id.
    """
    if not (folder / CONFIG).is_file() or any(folder.glob("model*.safetensors*")):
        return None
    own = folder / BASE
    named = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    base = own if own.is_dir() else named
    return replace(spec, path=base, revision=None, adapter=spec.path) if base else None


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter over a model, in peft's format; the base is named, and written to `folder/base` if it has no
    name.

    Raises:
        ValueError: several adapters lie over the model.
    """
    peft, configs = _peft(), cast(Any, model).peft_config
    if len(configs) != 1:
        raise ValueError(f"adapters: save_pretrained writes one, got {', '.join(configs)}; delete the others")
    ((name, config),) = configs.items()
    config = copy.copy(config)
    state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    # Modules that are trained whole stand in the model without peft's wrapper, see `_adapted`.
    for at, module in model.named_modules():
        if at.rpartition(".")[2] in (config.modules_to_save or ()) and not hasattr(module, "modules_to_save"):
            state |= {f"{at}.{key}": weight for key, weight in module.state_dict().items()}
    base = config.base_model_name_or_path or model.name_or_path
    if not base:
        base = folder / BASE
        without_adapter(model).save_pretrained(base)
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else str(base)
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    prefix = "base_model.model."
    save_file(
        {prefix + key.removeprefix(prefix): weight.detach().contiguous().clone() for key, weight in state.items()},
        folder / WEIGHTS, metadata={"format": "pt"},
    )  # fmt: skip


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own over the same tensors."""
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    shared += [t.quant_state for t in shared if getattr(t, "quant_state", None) is not None]  # bitsandbytes' scales
    other: PreTrainedModel = copy.deepcopy(model, {id(x): x for x in shared})
    return other


def _adapted(model: PreTrainedModel, adapter: str | Path, trainable: bool) -> PreTrainedModel:
    peft, folder = _peft(), _folder(adapter)
    try:
        # The adapter takes the base's dtype, as what it is added to.
        peft.PeftModel.from_pretrained(
            model, str(folder), is_trainable=trainable, autocast_adapter_dtype=False, torch_device=str(model.device)
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"adapter {adapter}: does not fit {type(model).__name__} ({first_line(error)}); name the base "
                         "that it was trained on") from error  # fmt: skip
    wrapper = importlib.import_module("peft.utils.other").ModulesToSaveWrapper
    for name, module in list(model.named_modules()):
        if isinstance(module, wrapper):
            _replace(model, name, module.modules_to_save["default"])
    model.eval()
    return model


def _folder(adapter: str | Path) -> Path:
    folder = fetch(ModelSpec(adapter), "adapter", weights=True)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(f"adapter {adapter}: must have {CONFIG} and {WEIGHTS}, got {_names(folder)}; save it with "
                             "peft's save_pretrained, in safetensors")  # fmt: skip
    return folder


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())) or "an empty folder"


def _saved(adapter: str | Path) -> set[str]:
    """The modules that an adapter holds whole."""
    from safetensors import safe_open

    with safe_open(_folder(adapter) / WEIGHTS, framework="pt") as file:
        return {part for key in file.keys() for part in key.split(".") if "lora_" not in key}


def _replace(root: nn.Module, name: str, module: Any) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError("adapters need peft: pip install 'torchbandit[lora]'") from error
