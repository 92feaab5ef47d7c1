"""What the page selectors share: the pages they rank, and the lists of those they choose.

Every page but the last is ranked. What its query heads make of a page becomes one number per KV
head, its distance, an integer; the pages of the least distances are listed in their order, and the
last page after them.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from ..report import Counter
from .scores import allow_next, await_previous

SPARSE_STEPS = tl.constexpr(int(Counter.SPARSE_STEPS))
PAGES_READ = tl.constexpr(int(Counter.PAGES_READ))

# The distance of a page that is not to be read.
NEVER = tl.constexpr(1 << 30)
# More pages than any sequence has: what is above it in the key of a page goes before its number.
MOST_PAGES = tl.constexpr(1 << 20)
# Pages whose places are counted together, as rows of one warp's width: a scan along a row needs no
# other warp.
WARP = tl.constexpr(32)


@triton.jit
def ranked_pages(
    p_seq_lens, p_exact_rows, i_b, exact_below, P: tl.constexpr, EXACT_ROWS: tl.constexpr
):
    """Length of a sequence and how many of its pages are to be ranked, 0 if it is read whole."""
    n = tl.load(p_seq_lens + i_b).to(tl.int32)
    ranked = tl.maximum((n + P - 1) // P - 1, 0)
    sparse = n > exact_below
    if EXACT_ROWS:
        sparse = sparse & (tl.load(p_exact_rows + i_b).to(tl.int32) == 0)
    return n, tl.where(sparse, ranked, 0)


@triton.jit
def load_statistics(p_statistics, b_page, o_d, s_page, D: tl.constexpr):
    """The two statistics of pages, [BP, DP] each; s_page is in elements of them."""
    p_s = p_statistics + (b_page.to(tl.int64) * s_page)[:, None] + o_d[None, :]
    if o_d.shape[0] == D:
        return tl.load(p_s), tl.load(p_s + D)
    else:
        m_d = (o_d < D)[None, :]
        return tl.load(p_s, mask=m_d, other=0.0), tl.load(p_s + D, mask=m_d, other=0.0)


@triton.jit
def places(m_nearer, m_tied, BL: tl.constexpr):
    """How many nearer and tied pages lie before each page [BL], and how many there are in all."""
    # Both counts are at most BL <= 8192, so one scan serves both.
    b_both = tl.reshape(m_nearer.to(tl.int32) + (m_tied.to(tl.int32) << 16), [BL // WARP, WARP])
    b_row = tl.sum(b_both, 1)
    b_before = (tl.cumsum(b_row, 0) - b_row)[:, None] + tl.cumsum(b_both, 1) - b_both
    b_before = tl.reshape(b_before, [BL])
    both = tl.sum(b_row, 0)
    return b_before & 0xFFFF, b_before >> 16, both & 0xFFFF, both >> 16


@triton.jit
def list_rest(
    p_table, p_list, p_listed_count, p_counters, i_row, i_h, count, ranked, pages, list_stride,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Lists the last page after `count` ranked ones, counts, and counts all pages of a row that is
    read whole."""
    if ranked > 0:
        tl.store(p_list + count, tl.load(p_table + ranked).to(tl.int32))
        tl.store(p_list + list_stride + count, ranked)
    count += pages - ranked
    tl.store(p_listed_count + i_row, count)
    if COUNT:
        tl.atomic_add(p_counters + PAGES_READ, count.to(tl.int64), sem="relaxed")
        if (i_h == 0) & (ranked > 0):
            one = tl.minimum(ranked, 1).to(tl.int64)
            tl.atomic_add(p_counters + SPARSE_STEPS, one, sem="relaxed")


@triton.jit
def last_member(p_members, members, wanted, BM: tl.constexpr):
    """The key of the last one of `wanted` members, of the least keys; -1 for none.

    p_members: different keys of at least 0, in any order.
    """
    o_m = tl.arange(0, BM)
    if members <= BM:
        o_few = tl.arange(0, 16)
        b_key = tl.load(p_members + o_m, mask=o_m < members, other=NEVER)
        b_less = tl.zeros([BM, 16], tl.int32)
        for i_m in tl.range(0, members, 16, num_stages=1):
            b_few = tl.load(p_members + i_m + o_few, mask=i_m + o_few < members, other=NEVER)
            b_less += (b_few[None, :] < b_key[:, None]).to(tl.int32)
        m_wanted = (tl.sum(b_less, 1) < wanted) & (o_m < members)
        found = tl.max(tl.where(m_wanted, b_key, -1), 0)
    else:
        low, found = tl.full([], -1, tl.int32), tl.full([], NEVER, tl.int32)
        if wanted == 0:
            found = low
        while found - low > 1:
            middle = low + (found - low) // 2
            count = tl.full([], 0, tl.int32)
            for i_m in range(0, members, BM):
                b_key = tl.load(p_members + i_m + o_m, mask=i_m + o_m < members, other=NEVER)
                count += tl.sum((b_key <= middle).to(tl.int32), 0)
            reached = count >= wanted
            low = tl.where(reached, low, middle)
            found = tl.where(reached, middle, found)
    return found


# Rows that are not aligned have one element per thread in loads, as scattered stores have: what is
# loaded is stored without an exchange.
@triton.jit(do_not_specialize=["list_stride", "page_stride", "s_block_table"])
def list_kernel(
    p_seq_lens, p_exact_rows, p_block_table, p_distance, p_tile_count, p_rank, p_members,
    p_member_count, p_listed, p_listed_count, p_counters,
    s_block_table, list_stride, page_stride, exact_below, budget,
    HKV: tl.constexpr, P: tl.constexpr, BL: tl.constexpr, NT: tl.constexpr, BM: tl.constexpr,
    CLASS_STEPS: tl.constexpr, BUDGETED: tl.constexpr, EXACT_ROWS: tl.constexpr,
    COUNT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Lists the chosen pages of one tile of BL pages, and with the first tile the last page.

    They are those of a class of distances before the last one, which `p_tile_count` [rows, NT]
    counts for each tile; and, with a budget, as many members of the last class as it still allows,
    the nearest ones, and of those as near the earlier. Without a budget the classes are the
    distances, and class 0 alone is chosen.
    """
    await_previous(CHAINED)
    allow_next(CHAINED)
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    pages = (n + P - 1) // P
    p_table = p_block_table + i_b.to(tl.int64) * s_block_table
    p_list = p_listed + i_row.to(tl.int64) * (2 * list_stride)
    first = i_t * BL
    o_page = first + tl.arange(0, BL)
    chosen = tl.full([], 0, tl.int32)
    if ranked == 0:
        b_page = tl.load(p_table + o_page, mask=o_page < pages, other=0).to(tl.int32)
        tl.store(p_list + o_page, b_page, mask=o_page < pages)
        tl.store(p_list + list_stride + o_page, o_page, mask=o_page < pages)
    elif first < ranked:
        o_t, o_m = tl.arange(0, NT), tl.arange(0, BM)
        b_count = tl.load(p_tile_count + i_row * NT + o_t, mask=o_t * BL < ranked, other=0)
        before = tl.sum(tl.where(o_t < i_t, b_count, 0), 0)
        chosen = tl.sum(b_count, 0)
        p_d = p_distance + i_row.to(tl.int64) * page_stride
        b_class = tl.load(p_d + o_page, mask=o_page < ranked, other=NEVER)
        if BUDGETED:
            last, nearer = tl.load(p_rank + 2 * i_row), tl.load(p_rank + 2 * i_row + 1)
            members = tl.load(p_member_count + i_row)
            wanted = tl.minimum(budget - nearer, members)
            p_m = p_members + i_row.to(tl.int64) * page_stride
            found = last_member(p_m, members, wanted, BM)
            for i_m in range(0, members, BM):
                b_key = tl.load(p_m + i_m + o_m, mask=i_m + o_m < members, other=NEVER)
                m_before = (b_key <= found) & (b_key % MOST_PAGES < first)
                before += tl.sum(m_before.to(tl.int32), 0)
            b_member = b_class % CLASS_STEPS * MOST_PAGES + o_page
            b_class = b_class // CLASS_STEPS
            m_chosen = (b_class < last) | ((b_class == last) & (b_member <= found))
            chosen += wanted
        else:
            m_chosen = b_class == 0
        b_position, _, _, _ = places(m_chosen, m_chosen, BL)
        b_position += before
        b_page = tl.load(p_table + o_page, mask=m_chosen, other=0).to(tl.int32)
        tl.store(p_list + b_position, b_page, mask=m_chosen)
        tl.store(p_list + list_stride + b_position, o_page, mask=m_chosen)
    if i_t == 0:
        list_rest(
            p_table, p_list, p_listed_count, p_counters, i_row, i_h, chosen, ranked, pages,
            list_stride, COUNT,
        )  # fmt: skip
