"""What docker/ says, read by tests that run it outside a container."""

import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMES = ("Dockerfile", "Dockerfile.cpu")


def instructions(name):
    """[(INSTRUCTION, the rest)] of a Dockerfile, with lines joined and without comments."""
    lines = (ROOT / "docker" / name).read_text().splitlines()
    text = "\n".join(line for line in lines if line and not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", text)
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def last(name, instruction):
    """What the last instruction of a kind says."""
    return [rest for word, rest in instructions(name) if word == instruction][-1]


def shell_commands(name):
    """Every command of the RUN instructions."""
    runs = [rest for word, rest in instructions(name) if word == "RUN"]
    return [command.strip() for rest in runs for command in re.split("&&|\\|\\|", rest)]


def copied(name):
    """The files and folders of the clone that go into the image."""
    sources = [rest.split() for word, rest in instructions(name) if word == "COPY"]
    return [part for parts in sources for part in parts[:-1] if not part.startswith("--")]


def health_check(name):
    """The health check's command, as a list of arguments."""
    return json.loads(last(name, "HEALTHCHECK").partition("CMD ")[2])


def run(command, **options):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, **options
    )
