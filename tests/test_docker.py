"""The images and the compose file, as far as they can be judged without a Docker engine."""

import json
import os
import shlex
import shutil
import sys

import dockerfiles
import pytest
import setup_cpu
import yaml
from dockerfiles import ROOT

from entmaxkv_vllm import compat

COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
EVERY_IMAGE = pytest.mark.parametrize("name", dockerfiles.NAMES)


def test_the_base_is_the_vllm_that_is_tested():
    version = dockerfiles.last("Dockerfile", "ARG").partition("=")[2]
    assert dockerfiles.last("Dockerfile", "FROM") == "vllm/vllm-openai:v${VLLM_VERSION}"
    assert version == setup_cpu.VLLM.partition("==")[2]
    compat.check_vllm_version(version)


@EVERY_IMAGE
def test_the_image_does_not_run_as_root(name):
    user, _, group = dockerfiles.last(name, "USER").partition(":")
    # A number, so that a cluster can see that it is not root.
    assert int(user) > 0
    assert f"--uid {user} --gid {group} " in dockerfiles.last(name, "RUN")


@EVERY_IMAGE
def test_the_image_is_made_of_files_that_are_there_and_that_dockerignore_lets_in(name):
    let_in = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for source in dockerfiles.copied(name):
        assert (ROOT / source).exists()
        assert source in let_in


@EVERY_IMAGE
def test_the_health_check_asks_the_port_that_is_exposed(name):
    port = dockerfiles.last(name, "EXPOSE")
    assert f"http://127.0.0.1:{port}/health" in dockerfiles.health_check(name)[-1]


@pytest.fixture
def image(tmp_path):
    """A folder with what the GPU image copies."""
    for source in dockerfiles.copied("Dockerfile"):
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        target = tmp_path / source
        target.parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / source, target)
    return tmp_path


def test_the_package_installs_from_what_the_image_copies(image):
    (install,) = [c for c in dockerfiles.shell_commands("Dockerfile") if " pip install " in c]
    python, *arguments = shlex.split(install)
    assert python == "python3"
    # Into a folder, and with the setuptools at hand, so that the test needs no network.
    options = ["--target", str(image / "site"), "--no-build-isolation", "--quiet"]
    done = dockerfiles.run([sys.executable, *arguments, *options], cwd=image)
    assert done.returncode == 0, done.stderr
    files = {str(path.relative_to(image / "site")) for path in image.glob("site/**/*")}
    assert {
        "entmaxkv_vllm/plugin.py",
        "entmaxkv_vllm/demo_model/model.safetensors",
        "entmaxkv_kernels/triton/decode.py",
        "bin/entmaxkv",
    } <= files
    (points,) = image.glob("site/entmaxkv_vllm-*.dist-info/entry_points.txt")
    assert "[vllm.general_plugins]" in points.read_text()


def test_the_build_stops_on_a_vllm_that_does_not_fit():
    (check,) = [c for c in dockerfiles.shell_commands("Dockerfile") if "check_vllm" in c]
    command = [sys.executable, *shlex.split(check)[1:]]
    assert dockerfiles.run(command).returncode == 0
    other = command[-1].replace("check_vllm_version()", "check_vllm_version('0.40.0')")
    assert "outside the supported range" in dockerfiles.run([*command[:-1], other]).stderr


def test_the_cpu_image_is_installed_by_the_script_that_tests_are_installed_by():
    assert "python scripts/setup_cpu.py" in dockerfiles.shell_commands("Dockerfile.cpu")
    version = dockerfiles.last("Dockerfile.cpu", "FROM").partition(":")[2].partition("-")[0]
    assert tuple(map(int, version.split("."))) in setup_cpu.PYTHONS


@pytest.fixture
def serve(tmp_path):
    """What docker/serve.sh asks vLLM for, parsed by vLLM's own `serve` command."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    vllm = tmp_path / "vllm"
    vllm.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    vllm.chmod(0o755)
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))

    def _serve(*arguments):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        script = str(ROOT / "docker" / "serve.sh")
        done = dockerfiles.run([script, *arguments], env=os.environ | {"PATH": path}, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return parser.parse_args(json.loads(done.stdout))

    return _serve


@pytest.mark.parametrize(
    ("arguments", "backend"),
    [
        pytest.param(["MODEL"], "ENTMAXKV", id="model"),
        pytest.param(["MODEL", "--max-model-len", "4096"], "ENTMAXKV", id="model-and-options"),
        pytest.param(
            ["MODEL", "--config", str(ROOT / "configs/serve/gpu.yaml")], "ENTMAXKV", id="file"
        ),
        pytest.param(
            ["MODEL", "--attention-backend", "FLASH_ATTN"], "FLASH_ATTN", id="another-backend"
        ),
        pytest.param(
            ["MODEL", "--attention-backend=FLASH_ATTN"], "FLASH_ATTN", id="with-equals-sign"
        ),
    ],
)
def test_what_follows_the_image_is_served_with_entmaxkv_unless_it_says_otherwise(
    serve, arguments, backend
):
    parsed = serve(*arguments)
    assert (parsed.model_tag, parsed.attention_backend) == ("MODEL", backend)


def test_compose_mounts_and_scrapes_what_is_there():
    server = COMPOSE["services"]["server"]
    assert (ROOT / "docker" / server["build"]["context"]).resolve() == ROOT
    assert server["build"]["dockerfile"] == "docker/Dockerfile"
    sources = [
        volume.split(":")[0]
        for service in COMPOSE["services"].values()
        for volume in service["volumes"]
    ]
    for source in sources:
        assert source in COMPOSE["volumes"] or (ROOT / "docker" / source).exists()
    models = [volume.split(":")[1] for volume in server["volumes"]]
    assert f"HF_HOME={models[0]}" in dockerfiles.last("Dockerfile", "ENV")
    scrape = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = scrape[0]["static_configs"][0]["targets"]
    assert target == f"server:{dockerfiles.last('Dockerfile', 'EXPOSE')}"


def test_compose_serves_with_a_file_that_the_image_holds(serve):
    command = COMPOSE["services"]["server"]["command"]
    given = {"${MODEL:?set MODEL to what is to be served}": "MODEL", "${CONFIG:-gpu}": "gpu"}
    for variable, value in given.items():
        command = [part.replace(variable, value) for part in command]
    assert not any("$" in part for part in command)
    parsed = serve(*command)
    assert (parsed.model_tag, parsed.attention_backend) == ("MODEL", "ENTMAXKV")


def test_ports_are_published_to_this_machine_alone():
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
