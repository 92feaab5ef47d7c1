"""configs/: files for `vllm serve --config`, and shapes without weights.

The CPU file is started in engine/test_serving.py. Those for GPUs are read by vLLM's own parser and
checked as a whole up to where a device is needed; no test starts them.
"""

import pytest
from dockerfiles import ROOT

SHAPES = {"llama-1b": (16, 64, 1.2e9), "llama-8b": (32, 128, 8.0e9)}
FILES = sorted(path.name for path in (ROOT / "configs" / "serve").glob("*.yaml"))


def engine_config(file, model):
    """What vLLM makes of a file, given a model as on the command line, before anything starts."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    path = str(ROOT / "configs" / "serve" / file)
    dummy = ["--load-format", "dummy", "--skip-tokenizer-init"]
    args = parser.parse_args(["serve", model, "--config", path, *dummy])
    validate_parsed_serve_args(args)
    args.model = args.model_tag
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("file", FILES)
def test_every_file_is_accepted_up_to_where_a_device_is_needed(file, shape):
    from entmaxkv_vllm.config import from_vllm
    from entmaxkv_vllm.plugin import chosen_backends, is_entmaxkv

    config = engine_config(file, str(ROOT / "configs" / "models" / shape))
    assert is_entmaxkv(chosen_backends(config)[0])
    resolved = from_vllm(config)
    assert (resolved.alpha, resolved.sources["alpha"]) == (1.5, "config.json entmax_alpha")
    assert resolved.sources["selector"] == "--additional-config"


def test_the_files_differ_in_what_their_names_say():
    from entmaxkv_vllm.config import from_vllm

    assert FILES == ["cpu.yaml", "gpu.yaml", "long-context.yaml", "tensor-parallel.yaml"]
    model = str(ROOT / "configs" / "models" / "llama-8b")
    gpu = engine_config("gpu.yaml", model)
    assert (gpu.parallel_config.world_size, from_vllm(gpu).selector) == (1, "exact")
    parallel = engine_config("tensor-parallel.yaml", model)
    assert parallel.parallel_config.tensor_parallel_size == 2
    long = engine_config("long-context.yaml", model)
    assert long.model_config.max_model_len == 131072
    assert (from_vllm(long).selector, from_vllm(long).exact_below) == ("gaussian", 8192)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_the_model_it_is_called(shape):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(ROOT / "configs" / "models" / shape, local_files_only=True)
    layers, head_size, parameters = SHAPES[shape]
    assert (config.num_hidden_layers, config.head_dim) == (layers, head_size)
    assert (config.num_attention_heads, config.num_key_value_heads) == (32, 8)
    assert config.entmax_alpha == 1.5
    assert config.max_position_embeddings > 2**20
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.05)
