"""Without a GPU the kernels run in Triton's interpreter, which has to be chosen before import."""

import os
from importlib import import_module

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    import triton.language as tl
    from triton.runtime import interpreter

    DTYPES = {
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.bfloat16: torch.bfloat16,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
    }
    BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}

    def convert(values, source, target, rounding_mode, original=interpreter._convert_float):
        """Bits of the values in another dtype. The interpreter's own rounding to fp8 loses carries,
        that to bf16 goes towards zero, and it takes the NaN of fp8 for 480."""
        if source not in DTYPES or target not in DTYPES:
            return original(values, source, target, rounding_mode)
        converted = torch.from_numpy(np.array(values)).view(DTYPES[source]).to(DTYPES[target])
        return converted.view(BITS[converted.itemsize]).numpy()

    interpreter._convert_float = convert


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    """Tests change numbers by which the chip is divided; steps find out once what follows."""
    workspace = import_module("entmaxkv_kernels.triton.workspace")
    decode = import_module("entmaxkv_kernels.triton.decode")
    monkeypatch.setattr(decode, "shape_of", workspace.Shape)
    for name in ("_capacity", "_places"):
        monkeypatch.setattr(workspace, name, getattr(workspace, name).__wrapped__)
