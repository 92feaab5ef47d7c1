"""The kernels compile for Hopper, which the interpreter does not show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import entmaxkv_kernels.triton

FOLDER = Path(entmaxkv_kernels.triton.__file__).parent
TRAINING = "training*.py"


def test_every_kernel_compiles_for_hopper(tmp_path):
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-m", "compiled.hopper"], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    files = set(FOLDER.glob("*.py")) - set(FOLDER.glob(TRAINING))
    kernels = re.findall(r"^def (\w+_kernel)\(", "".join(f.read_text() for f in files), re.M)
    assert set(kernels) <= set(run.stdout.split())
