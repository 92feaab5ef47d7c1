"""The page: its layout, and views of it that share its memory."""

import pytest
import torch

from entmaxkv_kernels import PageLayout, allocate_pages, split_pages

BOX = ("center", "half_width")

LAYOUTS = [
    PageLayout(16, 64),
    PageLayout(16, 64, ("mean", "std")),
    PageLayout(64, 128, ("mean", "std")),
    PageLayout(1, 3, ("mean", "std")),
]
BOXED = [PageLayout(16, 128, BOX), PageLayout(32, 80, BOX), PageLayout(1, 3, BOX)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_parts_tile_a_page_without_gap_or_overlap(layout):
    pages = allocate_pages(3, 2, layout)
    pages.copy_(torch.arange(pages.numel()).view(pages.shape))
    cache = split_pages(pages, layout)
    parts = [part.flatten(2) for part in (cache.key, cache.value, cache.statistics)]
    assert torch.equal(torch.cat(parts, 2), pages.flatten(2))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_parts_are_views_whatever_the_order_of_pages_and_heads(layout):
    shape = (2, 5, layout.page_size, layout.elements_per_token)
    storage = torch.zeros(3, 2, *shape[1:])  # heads outermost, after another layer's pages
    pages = storage[1].transpose(0, 1)
    cache = split_pages(pages, layout)
    cache.key.fill_(1), cache.value.fill_(2), cache.statistics.fill_(3)
    size, head = layout.page_size, layout.head_size
    flat = pages.reshape(5, 2, -1)
    assert (flat[..., : size * head] == 1).all()
    assert (flat[..., size * head : 2 * size * head] == 2).all()
    assert (flat[..., 2 * size * head :] == 3).all()
    assert (storage[0] == 0).all() and (storage[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", BOXED, ids=str)
def test_a_box_lies_behind_the_values_and_its_scales_at_the_end(layout, dtype):
    shape = (2, 5, layout.page_size, layout.elements_per_token)
    storage = torch.zeros(3, 2, *shape[1:], dtype=dtype)
    pages = storage[1].transpose(0, 1)
    cache = split_pages(pages, layout)
    assert cache.statistics.dtype == torch.int8 and cache.scales.dtype == torch.float32
    cache.key.fill_(1), cache.value.fill_(2), cache.scales.fill_(3)
    cache.statistics[:, :, 0], cache.statistics[:, :, 1] = 4, 5
    size, head = layout.page_size, layout.head_size
    assert (pages.flatten(2)[..., : size * head] == 1).all()
    assert (pages.flatten(2)[..., size * head : 2 * size * head] == 2).all()
    rest = pages.flatten(2)[..., 2 * size * head :].contiguous().view(torch.int8)
    scales = torch.tensor([3.0, 3.0, 3.0]).view(torch.int8)
    expected = [torch.full((head,), 4), torch.full((head,), 5)]
    expected += [torch.zeros(rest.shape[-1] - 2 * head - 12), scales]
    assert (rest == torch.cat(expected)).all()
    assert (storage[0] == 0).all() and (storage[2] == 0).all()


@pytest.mark.parametrize("layout", BOXED, ids=str)
def test_pages_with_boxes_are_aligned_for_reading(layout):
    assert layout.elements_per_page * 2 % 128 == 0
    assert layout.elements_per_page == layout.elements_per_token * layout.page_size


def test_scales_that_would_not_be_aligned_are_refused():
    layout = PageLayout(16, 64, BOX)
    memory = torch.zeros(layout.elements_per_page + 1, dtype=torch.bfloat16)[1:]
    with pytest.raises(ValueError, match=r"pages has storage offset 1 .* expected multiples of 2"):
        split_pages(memory.view(1, 1, 16, -1), layout)


def test_elements_per_token_count_the_statistics():
    assert PageLayout(16, 64).elements_per_token == 128
    assert PageLayout(16, 64, ("mean", "std")).elements_per_token == 136
    # 8192 bytes of keys and values, 256 of the box, 12 of its scales, padding to 67 * 128.
    assert PageLayout(16, 128, BOX).elements_per_token * 16 * 2 == 8576
    assert PageLayout(32, 80, BOX).elements_per_token == 164


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 64), r"page_size is 0; expected at least 1"),
        ((16, 0), r"head_size is 0; expected at least 1"),
        ((16, 64, ("mean",)), r"statistics is \('mean',\); expected one of"),
        ((64, 80, ("mean", "std")), r"page_size is 64; expected a divisor of the 2 \* 80"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PageLayout(*arguments)


def test_pages_of_another_shape_are_refused():
    pages = allocate_pages(3, 2, PageLayout(16, 64))
    with pytest.raises(ValueError, match=r"pages has shape \(3, 2, 16, 128\); expected .* 16, 136"):
        split_pages(pages, PageLayout(16, 64, ("mean", "std")))


def test_pages_that_are_not_one_run_of_memory_are_refused():
    pages = torch.zeros(3, 16, 2, 128).transpose(1, 2)
    with pytest.raises(ValueError, match=r"pages has strides .*; expected its last two dimensions"):
        split_pages(pages, PageLayout(16, 64))
