"""The last page of a budget, and the places of the chosen ones, against plain sorting."""

import pytest
import torch
import triton
import triton.language as tl

from entmaxkv_kernels.triton.decode import can_chain
from entmaxkv_kernels.triton.nearest import STEPS, find, place_nearest
from entmaxkv_kernels.triton.nearest_long import bracket
from entmaxkv_kernels.triton.pages import NEVER

from .device import DEVICE


@triton.jit
def choose_kernel(
    p_distance, p_place, p_found, wanted, slack,
    BL: tl.constexpr, STEPS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    b_distance = tl.load(p_distance + tl.arange(0, BL))
    found, nearer = find(b_distance, 0, STEPS, 0, BL, wanted, slack)
    b_place, chosen, _ = place_nearest(b_distance, found, wanted - nearer, 0, 0, BL, CHAINED)
    tl.store(p_place + tl.arange(0, BL), b_place)
    tl.store(p_found, found)
    tl.store(p_found + 1, nearer)
    tl.store(p_found + 2, chosen)


def choose(distance, wanted, *, slack=0, warps=4):
    """Places [BL], and what `find` found, how many are nearer, and how many `place_nearest` has."""
    place, found = torch.empty_like(distance), torch.empty(3, dtype=torch.int32, device=DEVICE)
    chained = can_chain(torch.device(DEVICE))
    choose_kernel[(1,)](
        distance, place, found, wanted, slack, len(distance), STEPS.value, chained, num_warps=warps
    )
    return place.cpu(), *found.tolist()


def distances(kind, pages):
    generator = torch.Generator().manual_seed(pages)
    drawn = torch.rand(pages, generator=generator)
    drawn = {"different": drawn, "crowded": drawn**8, "few": (drawn * 5).floor() / 5}[kind]
    return (drawn * STEPS.value).int().to(DEVICE)


@pytest.mark.parametrize("warps", [4, 8], ids="{} warps".format)
@pytest.mark.parametrize("pages", [32, 256, 4096], ids="{} pages".format)
@pytest.mark.parametrize("kind", ["different", "crowded", "few"])
def test_the_nearest_pages_have_a_place_each(kind, pages, warps):
    distance = distances(kind, pages)
    order = distance.cpu().sort(stable=True).indices
    for wanted in {0, 1, pages // 20, pages // 2 + 1, pages - 1, pages}:
        place, found, nearer, chosen = choose(distance, wanted, warps=warps)
        assert nearer == (distance < found).sum() <= wanted
        assert nearer == wanted or (distance <= found).sum() > wanted
        # Of pages as near the earlier ones, which a stable order has first.
        assert (place[order[:wanted]].sort().values == torch.arange(wanted)).all()
        assert (place[order[wanted:]] >= pages).all()
        assert chosen == nearer


@triton.jit
def choose_of_both_kernel(
    p_distance, p_place, wanted,
    BL: tl.constexpr, BR: tl.constexpr, STEPS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    o_page, o_rest = tl.arange(0, BL), BL + tl.arange(0, BR)
    b_distance, b_rest = tl.load(p_distance + o_page), tl.load(p_distance + o_rest)
    found, nearer = find(b_distance, 0, STEPS, 0, BL + BR, wanted, 0, b_rest)
    ties = wanted - nearer
    b_place, before, tied = place_nearest(b_distance, found, ties, 0, 0, BL, CHAINED)
    b_rest_place, _, _ = place_nearest(b_rest, found, ties, before, tied, BR, CHAINED)
    tl.store(p_place + o_page, b_place)
    tl.store(p_place + o_rest, b_rest_place)


@pytest.mark.parametrize("warps", [4, 8], ids="{} warps".format)
@pytest.mark.parametrize("kind", ["different", "crowded", "few"])
def test_pages_beyond_a_power_of_two_are_chosen_with_the_others(kind, warps):
    distance = distances(kind, 1280)
    order = distance.cpu().sort(stable=True).indices
    chained = can_chain(torch.device(DEVICE))
    for wanted in (1, 64, 1101, 1280):
        place = torch.empty_like(distance)
        choose_of_both_kernel[(1,)](
            distance, place, wanted, 1024, 256, STEPS.value, chained, num_warps=warps
        )
        assert (place.cpu()[order[:wanted]].sort().values == torch.arange(wanted)).all()
        assert (place.cpu()[order[wanted:]] >= 1280).all()


@pytest.mark.parametrize("slack", [3, 50], ids="{} less will do".format)
def test_a_distance_that_has_nearly_enough_pages_will_do(slack):
    distance = distances("different", 1024)
    _, found, nearer, _ = choose(distance, 300, slack=slack)
    assert 300 - slack <= nearer <= 300
    assert nearer == (distance < found).sum()


@triton.jit
def choose_in_tiles_kernel(
    p_distance, p_place, found, ties, pages, BL: tl.constexpr, CHAINED: tl.constexpr
):
    before, tied_before = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for i_l in range(0, pages, BL):
        o_page = i_l + tl.arange(0, BL)
        b_distance = tl.load(p_distance + o_page)
        b_place, before, tied_before = place_nearest(
            b_distance, found, ties, before, tied_before, BL, CHAINED
        )
        tl.store(p_place + o_page, b_place)


@pytest.mark.parametrize("kind", ["different", "few"])
def test_places_go_on_from_tile_to_tile(kind):
    """The last tile has room for more pages than there are."""
    distance = distances(kind, 300)
    room = torch.full((212,), NEVER.value, dtype=torch.int32, device=DEVICE)
    distance = torch.cat([distance, room])
    order = distance.cpu().sort(stable=True).indices
    chained = can_chain(torch.device(DEVICE))
    for wanted in (77, 200):
        found = distance[order[wanted]].item()
        ties = wanted - int((distance < found).sum())
        place = torch.empty_like(distance)
        choose_in_tiles_kernel[(1,)](distance, place, found, ties, 512, 128, chained)
        assert (place.cpu()[order[:wanted]].sort().values == torch.arange(wanted)).all()
        assert (place.cpu()[order[wanted:]] == NEVER.value).all()


def test_pages_that_are_none_are_not_counted():
    distance = distances("crowded", 256)
    distance[200:] = NEVER.value
    place, found, nearer, _ = choose(distance, 190)
    assert nearer == (distance < found).sum() == 190
    assert (place[200:] == NEVER.value).all()


@triton.jit
def bracket_kernel(p_distance, p_found, lower, upper, slack, BL: tl.constexpr):
    low, below, high = bracket(tl.load(p_distance + tl.arange(0, BL)), BL, lower, upper, slack)
    tl.store(p_found, low)
    tl.store(p_found + 1, below)
    tl.store(p_found + 2, high)


@pytest.mark.parametrize("kind", ["different", "crowded"])
def test_a_bracket_has_as_many_pages_before_and_within_as_were_asked_for(kind):
    distance, found = distances(kind, 2048), torch.empty(3, dtype=torch.int32, device=DEVICE)
    for lower, upper, slack in ((60, 150, 20), (2, 9, 3), (900, 1100, 30)):
        bracket_kernel[(1,)](distance, found, lower, upper, slack, len(distance))
        low, below, high = found.tolist()
        assert below == (distance < low).sum() <= lower
        # Fifths of even distances show one with at most 900 of 2048 before; else none may show.
        assert low > 0 or (kind, lower) != ("different", 900)
        assert upper - slack <= (distance < high).sum()
        assert (distance < high - 1).sum() <= upper
