"""The compiled kernels through the public functions."""

import pytest
import torch
from reference.scene import make_scene

import entmaxkv_kernels as kernels
from entmaxkv_kernels.triton import decode_workspace_size, prefill_workspace_size
from entmaxkv_kernels.validation import check_alpha, head_alpha

from .device import DEVICE, on_device

ALPHA = 1.5


@pytest.fixture
def scene():
    return make_scene(lengths=[37, 1, 64], dtype=torch.float32)


def placed(scene):
    """Cache, block table and lengths of a scene on the device."""
    return on_device(scene.cache), scene.block_table.to(DEVICE), scene.seq_lens.to(DEVICE)


def test_decode_and_prefill_give_what_the_reference_gives(scene):
    cache, table, lengths = placed(scene)
    query = scene.last_queries.to(DEVICE)
    options = {"scale": scene.scale, "alpha": ALPHA}
    starts = torch.arange(len(query) + 1, dtype=torch.int32, device=DEVICE)
    exact = {"selector": kernels.Exact()}
    heads = query.shape[1], cache.key.shape[1], query.shape[2]
    longest = table.shape[1] * cache.layout.page_size
    decode_size = decode_workspace_size(
        len(query), *heads, cache.layout.page_size, query.dtype, longest, device=DEVICE, **exact
    )
    prefill_size = prefill_workspace_size(*heads, query.dtype, longest, device=DEVICE)
    for function, inputs, size, more in (
        (kernels.decode, (query, cache, table, lengths), decode_size, exact),
        (kernels.prefill, (query, cache, table, lengths, starts), prefill_size, {}),
    ):
        expected = function(*inputs, **options, **more)
        for workspace in (None, torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)):
            compiled = function(
                *inputs, **options, **more, workspace=workspace, implementation="triton"
            )
            torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)


def test_append_gives_what_the_reference_gives(scene):
    caches = [on_device(scene.cache) for _ in range(2)]
    page_size, (kv_heads, _, head_size) = scene.cache.layout.page_size, caches[0].key.shape[1:]
    slots = torch.arange(page_size + 3, device=DEVICE)
    key, value = torch.randn(2, len(slots), kv_heads, head_size, device=DEVICE)
    for cache, implementation in zip(caches, ("reference", "triton"), strict=True):
        kernels.append(cache, key, value, slots, implementation=implementation)
    for first, second in zip(caches[0][:3], caches[1][:3], strict=True):
        torch.testing.assert_close(second, first, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"implementation": "cuda"}, ValueError, "'reference' or 'triton'", id="name"),
        pytest.param(
            {"workspace": torch.empty(64, dtype=torch.uint8, device=DEVICE)},
            ValueError,
            "the reference needs no scratch memory",
            id="workspace-for-the-reference",
        ),
        pytest.param(
            {
                "workspace": torch.empty(64, dtype=torch.float32, device=DEVICE),
                "implementation": "triton",
            },
            TypeError,
            "workspace has dtype torch.float32; expected torch.uint8",
            id="workspace-of-another-type",
        ),
        pytest.param(
            {
                "workspace": torch.empty(8, dtype=torch.uint8, device=DEVICE),
                "implementation": "triton",
            },
            ValueError,
            "workspace has 8 bytes; expected at least",
            id="workspace-too-small",
        ),
    ],
)
def test_a_wrong_choice_is_refused_before_any_launch(scene, options, error, message):
    cache, table, lengths = placed(scene)
    query = scene.last_queries.to(DEVICE)
    with pytest.raises(error, match=message):
        kernels.decode(
            query,
            cache,
            table,
            lengths,
            scale=1.0,
            alpha=ALPHA,
            selector=kernels.Exact(),
            **options,
        )


def test_double_precision_is_left_to_the_reference():
    scene = make_scene(lengths=[20], dtype=torch.float64)
    cache, table, lengths = placed(scene)
    with pytest.raises(TypeError, match=r"float64; expected fp8, fp16, bf16 or fp32"):
        kernels.decode(
            scene.last_queries.to(DEVICE),
            cache,
            table,
            lengths,
            scale=1.0,
            alpha=ALPHA,
            selector=kernels.Exact(),
            implementation="triton",
        )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "query is strided by"),
        ("block_table", lambda x: x.repeat_interleave(2, 1)[:, ::2], "block_table is strided by 2"),
        ("seq_lens", lambda x: x[:1].expand(3), "seq_lens is strided by 0"),
        (
            "cache",
            lambda x: x._replace(value=x.value.contiguous()),
            "expected the views that split_pages gives",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_lies_otherwise_in_memory_than_the_kernels_read_is_refused(
    scene, name, change, message
):
    cache, table, lengths = placed(scene)
    query = scene.last_queries.to(DEVICE)
    given = {"query": query, "cache": cache, "block_table": table, "seq_lens": lengths}
    given[name] = change(given[name])
    options = {"scale": scene.scale, "alpha": ALPHA, "selector": kernels.Exact()}
    with pytest.raises(ValueError, match=message):
        kernels.decode(**given, **options, implementation="triton")


def test_alphas_of_heads_are_put_on_the_device_once():
    first, second = (
        head_alpha(check_alpha([1.0, 1.5, 2.0, 1.5], 4), torch.device(DEVICE)) for _ in range(2)
    )
    assert first is second
