"""The key-value cache: as many places as rows run at a time, filled by prefill, extended in place by decoding.

A row stands in its place left-compact: prompt and response from position 0 on, without padding. Which place a lane
of the batch reads, and how far, are tensors; so a batch shrinks or is refilled without moving a key.

Axis letters beside batch.py's: S places, n lanes of a step, L capacity of a place, K key-value heads, D head size.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class Unfit(Exception):
    """A model that the fast path cannot take; the reason is its text."""


class LayerShape(NamedTuple):
    """What one layer keeps of a token."""

    heads: int
    size: int
    dtype: torch.dtype


class LayerCache:
    """One layer's keys and values, and where the lanes of the current step stand in them.

    [S+1, L, K, 2, D]. On CUDA a token's lie side by side, one stretch to read, for which attention takes 1% less on an
    H100 than for keys and values apart; on a CPU each head's keys do, for which a call takes a fifth less.
    `update` is what transformers' attention calls with the new token's key and value.
    """

    def __init__(self, shape: LayerShape, places: int, capacity: int, device: torch.device) -> None:
        S, L, K, D = places + 1, capacity, shape.heads, shape.size  # the last place is scratch, for rehearsals
        # Zeros, since an unwritten NaN under a mask would still spoil a sum.
        zeros = functools.partial(torch.zeros, dtype=shape.dtype, device=device)
        self.both = zeros(S, L, K, 2, D) if device.type == "cuda" else zeros(2, S, K, L, D).permute(1, 3, 2, 0, 4)
        self.keys, self.values = keys_and_values(self.both)
        self.place: Tensor = torch.empty(0)
        self.length: Tensor = torch.empty(0)
        self.used: int | None = None
        self.in_order = False

    def update(self, key: Tensor, value: Tensor, layer_idx: int = 0, *_: object, **__: object) -> tuple[Any, Any]:
        """Write [n, K, 1, D] at each lane's length; return what the attention reads.

        Where it goes by lengths on the device, `used` is None, and it writes them itself, on its way.
        """
        if self.used is None:
            return (key, self.both), (value, self.both)
        self.keys[self.place, :, self.length] = key[:, :, 0]
        self.values[self.place, :, self.length] = value[:, :, 0]
        keys, values = self.keys[:, :, : self.used], self.values[:, :, : self.used]
        if self.in_order:
            return keys[: len(key)], values[: len(key)]
        return keys.index_select(0, self.place), values.index_select(0, self.place)


def keys_and_values(both: Tensor) -> tuple[Tensor, Tensor]:
    """[S+1, L, K, 2, D] -> views [S+1, K, L, D] each."""
    keys, values = both.transpose(1, 2).unbind(3)
    return keys, values


class Cache:
    """All layers'; stands where a transformers model expects its `past_key_values`."""

    def __init__(self, shapes: list[LayerShape], places: int, capacity: int, device: torch.device) -> None:
        self.layers = [LayerCache(shape, places, capacity, device) for shape in shapes]

    def aim(self, place: Tensor, length: Tensor, used: int | None, in_order: bool) -> None:
        """Set what the next step works on: place [n] int64, length [n] int64; `used`: the host's bound on lengths."""
        for layer in self.layers:
            layer.place, layer.length, layer.used, layer.in_order = place, length, used, in_order

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Any, Any]:
        return self.layers[layer_idx].update(key, value)


class Prefill(DynamicCache):
    """Passes keys and values through to the attention of a prompt, and keeps them in places on the way.

    Args:
        cache: where they are kept.
        places: [r] int64; which: [r] int64, the prompt of the batch that each place gets (siblings share one).
    """

    def __init__(self, cache: Cache, places: Tensor, which: Tensor) -> None:
        super().__init__()
        self._cache, self._places, self._which = cache, places, which

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        layer, P = self._cache.layers[layer_idx], key_states.shape[2]
        layer.keys[:, :, :P].index_copy_(0, self._places, key_states.index_select(0, self._which))
        layer.values[:, :, :P].index_copy_(0, self._places, value_states.index_select(0, self._which))
        return key_states, value_states


def layer_shapes(model: PreTrainedModel, capacity: int) -> list[LayerShape]:
    """What each layer keeps of a token, found by running one.

    Raises:
        Unfit: the model does not keep plain keys and values for every token, or cannot see `capacity` of them.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"} or not getattr(model, "_supports_attention_backend", False):
        raise Unfit(f"{type(model).__name__} has attention that is not plain ({', '.join(sorted(kinds))})")
    window = getattr(config, "sliding_window", None)
    if isinstance(window, int) and getattr(config, "use_sliding_window", True) and window < capacity:
        raise Unfit(f"{type(model).__name__} has a sliding window of {window}, less than prompt and response need")
    probe = DynamicCache()
    one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model(input_ids=one, position_ids=one, past_key_values=probe, use_cache=True, logits_to_keep=1)
    shapes = []
    for layer in probe.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.shape != values.shape:
            raise Unfit(f"{type(model).__name__} does not keep keys and values of one shape in every layer")
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], keys.dtype))
    if len(shapes) != config.num_hidden_layers:
        raise Unfit(f"{type(model).__name__} keeps {len(shapes)} layers, its config says {config.num_hidden_layers}")
    return shapes


def bytes_per_place(shapes: list[LayerShape], capacity: int) -> int:
    """Memory that one more place takes."""
    return sum(2 * shape.heads * shape.size * shape.dtype.itemsize for shape in shapes) * capacity
