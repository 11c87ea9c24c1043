"""Run one compiled decode step on the CPU and print how many of its graphs were found ready: a process of its own."""

from __future__ import annotations

import json

import torch
from fakes import tiny_lm
from torch._dynamo.utils import counters

from torchbandit.generation.attention import decode_mode
from torchbandit.generation.body import compiled_body
from torchbandit.generation.cache import Cache, layer_shapes
from torchbandit.generation.lanes import Lanes
from torchbandit.generation.step import Stepper

if __name__ == "__main__":
    model, cpu = tiny_lm(), torch.device("cpu")
    with torch.no_grad():
        stepper = Stepper(Cache(layer_shapes(model, 64), 20, 64, cpu), Lanes(20, 8, cpu), host_bound=False)
        with decode_mode(model):
            plain = stepper._logits(model, 8, None, False)
            with compiled_body(model, stepper.cache, at_once=2, combos=True):
                torch.testing.assert_close(stepper._logits(model, 8, None, False), plain)
    print(json.dumps({name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")}))
