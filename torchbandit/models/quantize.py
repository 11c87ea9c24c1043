"""Quantised weights: which layers become small, by whose kernels, and whether it came out so.

Only the linear layers inside the repeated decoder layers are quantised, and their experts (experts.py). Whatever stands
outside (embeddings, the score or LM head, projections beside them) and every norm keeps the model's dtype: a quantised
score head gives rewards that are all one number (trap 13).
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from torchbandit.models.offload import plain_tensors
from torchbandit.models.spec import Quantization

LIBRARY: dict[str, str] = {"fp8": "torchao", "int8": "torchao", "nf4": "bitsandbytes"}
BITS: dict[str, float] = {"fp8": 8, "int8": 8, "nf4": 4 + 32 / 64}
"""Bits a quantised weight takes, nf4's with its scales (a float32 for 64 weights)."""
SMALLER: tuple[Quantization, ...] = ("fp8", "int8", "nf4")
"""From the most exact and fastest to the smallest."""


def why_not(quantization: Quantization, device: torch.device) -> str | None:
    """What keeps a device from a quantisation; None if nothing does."""
    library = LIBRARY[quantization]
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed: pip install 'torchbandit[quant]'"
    if quantization == "fp8":
        if device.type != "cuda":
            return "fp8 matrix products need a CUDA device"
        if torch.cuda.get_device_capability(device) < (8, 9):
            return f"fp8 matrix products need compute capability 8.9, {torch.cuda.get_device_name(device)} has less"
    return None


def require_available(quantization: Quantization, device: torch.device) -> None:
    """Raises:
    ImportError: the library is missing; names the extra.
    ValueError: the device cannot.
    """
    reason = why_not(quantization, device)
    if reason is None:
        return
    message = f"quantization {quantization!r} on {device}: {reason}"
    raise ImportError(message) if "pip install" in reason else ValueError(message)


def check_shapes(quantization: Quantization, skeleton: nn.Module, device: torch.device, name: str) -> None:
    """Raises:
    ValueError: bitsandbytes' CPU kernel takes inputs 64 at a time, and a layer has another size.
    """
    if quantization != "nf4" or device.type != "cpu":
        return
    for layer in inside_layers(skeleton):
        module = skeleton.get_submodule(layer)
        if isinstance(module, nn.Linear) and module.in_features % 64:
            raise ValueError(f"model {name}: nf4 on the CPU needs layer inputs of a multiple of 64, got "
                             f"{module.in_features} in {layer}; use int8 there")  # fmt: skip


def config(quantization: Quantization, keep: list[str], dtype: torch.dtype) -> Any:
    """What `from_pretrained` takes to quantise while it loads, tensor by tensor.

    Args:
        keep: names of the modules that stay as they are.
        dtype: of the products.
    """
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=keep
        )
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int8WeightOnlyConfig, PerRow

    # int8: weights alone, a scale a row. torchao's product of int8 activations syncs with the host when not compiled.
    # And no advice for the compiler, which torchao would set for the whole process: all that is compiled later, the
    # policy's training with it, would be tuned for minutes.
    kind = Int8WeightOnlyConfig(set_inductor_config=False) if quantization == "int8" else (
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    )  # fmt: skip
    return TorchAoConfig(kind, modules_to_not_convert=keep)


def inside_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that quantisation takes, in the model's order: those of the repeated layers."""
    return [
        f"{at}.{name}"
        for at, layer in model.named_modules()
        if isinstance(layer, GradientCheckpointingLayer)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]


def outside_layers(model: nn.Module) -> list[str]:
    """Names of the modules with a weight matrix that stay in high precision: heads and embeddings."""
    taken = set(inside_layers(model))
    kinds = (nn.Linear, nn.Embedding)
    return sorted(name for name, module in model.named_modules() if isinstance(module, kinds) and name not in taken)


def is_quantized(weight: Any) -> bool:
    """Whether a weight is another thing than plain floating numbers."""
    return not weight.is_floating_point() or type(getattr(weight, "data", weight)) is not torch.Tensor


def saved_as(config: Any) -> str | None:
    """By what method a model's folder was quantised; None if it was not."""
    said = getattr(config, "quantization_config", None)
    if said is None:
        return None
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return str(getattr(method, "value", method) or "quantised")


def not_trainable(name: str, how: str) -> ValueError:
    """What is said to whoever would train quantised weights."""
    return ValueError(
        f"model {name}: quantization must be None for a model that is trained, got {how!r}: embeddings and norms alone "
        "would train; load it unquantised, or lay adapters over it (ModelSpec(path, quantization=..., adapter=...))"
    )


def check_trainable(model: PreTrainedModel) -> None:
    """Refuse a live model whose weights are quantised, unless adapters are what trains (trap 39).

    Raises:
        ValueError: says so, and names adapters.
    """
    if getattr(model, "peft_config", None):
        return
    if any(is_quantized(weight) for weight in model.parameters()):
        raise not_trainable(type(model).__name__, saved_as(model.config) or "quantised")


def compiler_options(model: nn.Module) -> dict[str, Any]:
    """What Inductor must be told of a model's weights.

    It knows the pattern of a product with int8 weights, and gives it to a kernel made for single tokens: for the tokens
    of a pack that is some hundred times slower, on CUDA, than the product in bfloat16 that stands there.
    """
    int8 = any(tensor.dtype == torch.int8 for tensor in plain_tensors(model))
    return {"pattern_matcher": False} if int8 else {}


def check(model: PreTrainedModel, keep: list[str], name: str) -> None:
    """That the heads are plain and the layers are not.

    Raises:
        ValueError: a module of `keep` was quantised, or nothing was.
    """
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), torch.Tensor)}
    wrong = [n for n in keep if n in weights and is_quantized(weights[n])]
    if wrong:
        raise ValueError(f"model {name}: {', '.join(wrong)} must stay in high precision, got quantised weights; this "
                         "version of transformers is not supported")  # fmt: skip
    if not any(is_quantized(weight) for weight in model.parameters()):
        raise ValueError(f"model {name}: {type(model).__name__} has no linear layers that can be quantised; load it "
                         "with quantization=None")  # fmt: skip


SAID_ABOVE = 0.1
"""Share of the layers' weights that stays plain above which it is said."""


def tell_plain(model: PreTrainedModel, skeleton: nn.Module, name: str, quantization: Quantization) -> None:
    """Warn of the share of the layers' weights that is not quantised, where that is much (trap 35)."""
    whole = sum(weight.numel() for weight in _matrices(skeleton).values())
    plain = {at: weight.numel() for at, weight in _matrices(model).items() if not is_quantized(weight)}
    share = sum(plain.values()) / max(whole, 1)
    if share > SAID_ABOVE:
        largest = max(plain, key=lambda at: plain[at])
        warnings.warn(f"model {name}: {quantization} leaves {share:.0%} of the weights of its layers as they were, the "
                      f"largest {largest}; they are no linear layers", stacklevel=4)  # fmt: skip


def _matrices(model: nn.Module) -> dict[str, Any]:
    """The weights of the repeated layers by name, norms and biases left out, and the scales of small ones."""
    return {
        f"{at}.{name}": weight
        for at, layer in model.named_modules()
        if isinstance(layer, GradientCheckpointingLayer)
        for name, weight in layer.named_parameters()
        if weight.dim() > 1 and not name.endswith(".original1")
    }
