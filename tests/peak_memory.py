"""A process that loads a model and says what memory that took on the host.

    python peak_memory.py WARM_UP_FOLDER FOLDER DEVICE DTYPE [QUANTIZATION | wrong]

`private` is the peak of private memory above the start, `all` that of private memory and mapped files together;
`weights` is what of the model stays on the host. "wrong" reads the checkpoint whole before it converts it.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import torch
from transformers import AutoModelForCausalLM

from torchbandit.models import ModelSpec, load_causal_lm
from torchbandit.models.offload import plain_tensors

torch.set_num_threads(1)


def resident() -> tuple[int, int]:
    """Bytes in memory of this process: private, and all."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    private, mapped = (int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))
    return private, private + mapped


def main(warm_up: str, folder: str, device: str, dtype: str, how: str = "") -> None:
    kind = how if how not in ("", "wrong") else None
    load_causal_lm(ModelSpec(warm_up, dtype=dtype, quantization=kind), device)  # libraries and the device
    base = resident()
    peak, over = list(base), threading.Event()

    def watch() -> None:
        while not over.is_set():
            peak[:] = map(max, peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if how == "wrong":
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, disable_mmap=True)
        model = whole.to(device, getattr(torch, dtype))
    else:
        model = load_causal_lm(ModelSpec(folder, dtype=dtype, quantization=kind), device)
    over.set()
    watcher.join()
    kept = sum(t.numel() * t.element_size() for t in plain_tensors(model) if t.device.type == "cpu")
    print(json.dumps({"private": peak[0] - base[0], "all": peak[1] - base[1], "weights": kept}))


if __name__ == "__main__":
    main(*sys.argv[1:])
