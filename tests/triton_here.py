"""Where Triton kernels run in tests: on CUDA, or in Triton's interpreter where Triton is installed.

To be imported before what holds kernels; a test file that imports it is skipped where there is no way.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes with CUDA builds of torch", allow_module_level=True)
if not torch.cuda.is_available():
    if tuple(int(part) for part in importlib.metadata.version("numpy").split(".")[:2]) >= (2, 4):
        pytest.skip("no CUDA, and Triton's interpreter needs numpy below 2.4", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
