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

SPARSE_STEPS = tl.constexpr(int(Counter.SPARSE_STEPS))
PAGES_READ = tl.constexpr(int(Counter.PAGES_READ))

# The distance of a page that is not to be read.
NEVER = tl.constexpr(1 << 30)
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
def list_tile(
    b_distance, o_page, ranked, found, ties, count, tied, p_table, p_list, list_stride,
    BL: tl.constexpr,
):  # fmt: skip
    """Lists those of BL pages that are nearer than `found`, and the first `ties` of those as near.

    count, tied: pages listed and pages tied before; returns them with those of the tile.
    """
    m_page = o_page < ranked
    m_nearer, m_tied = m_page & (b_distance < found), m_page & (b_distance == found)
    b_nearer, b_tied, all_nearer, all_tied = places(m_nearer, m_tied, BL)
    b_tied += tied
    m_chosen = m_nearer | (m_tied & (b_tied < ties))
    b_position = count + b_nearer + tl.minimum(b_tied, ties) - tl.minimum(tied, ties)
    b_page = tl.load(p_table + o_page, mask=m_chosen, other=0).to(tl.int32)
    tl.store(p_list + b_position, b_page, mask=m_chosen)
    tl.store(p_list + list_stride + b_position, o_page, mask=m_chosen)
    count += all_nearer + tl.minimum(tied + all_tied, ties) - tl.minimum(tied, ties)
    return count, tied + all_tied


@triton.jit
def list_rest(
    p_table, p_list, p_listed_count, p_counters, i_row, i_h, count, ranked, pages, list_stride,
    BL: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Lists the pages that are not ranked: the last one, or all of a row that is read whole."""
    if ranked > 0:
        tl.store(p_list + count, tl.load(p_table + ranked).to(tl.int32))
        tl.store(p_list + list_stride + count, ranked)
    else:
        for i_l in range(0, pages, BL):
            o_page = i_l + tl.arange(0, BL)
            b_page = tl.load(p_table + o_page, mask=o_page < pages, other=0).to(tl.int32)
            tl.store(p_list + o_page, b_page, mask=o_page < pages)
            tl.store(p_list + list_stride + o_page, o_page, mask=o_page < pages)
    count += pages - ranked
    tl.store(p_listed_count + i_row, count)
    if COUNT:
        tl.atomic_add(p_counters + PAGES_READ, count.to(tl.int64), sem="relaxed")
        if (i_h == 0) & (ranked > 0):
            one = tl.minimum(ranked, 1).to(tl.int64)
            tl.atomic_add(p_counters + SPARSE_STEPS, one, sem="relaxed")


# Rows that are not aligned have one element per thread in loads, as scattered stores have: what is
# loaded is stored without an exchange.
@triton.jit(do_not_specialize=["list_stride", "page_stride", "s_block_table"])
def list_kernel(
    p_seq_lens, p_exact_rows, p_block_table, p_distance, p_listed, p_listed_count, p_counters,
    s_block_table, list_stride, page_stride, exact_below,
    HKV: tl.constexpr, P: tl.constexpr, BL: tl.constexpr, EXACT_ROWS: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Lists the pages of distance 0 of one row."""
    i_h, i_b = tl.program_id(0), tl.program_id(1)
    i_row = i_b * HKV + i_h
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    p_table = p_block_table + i_b.to(tl.int64) * s_block_table
    p_list = p_listed + i_row.to(tl.int64) * (2 * list_stride)
    p_d = p_distance + i_row.to(tl.int64) * page_stride
    o_l = tl.arange(0, BL)
    count, tied = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for i_l in range(0, ranked, BL):
        b_d = tl.load(p_d + i_l + o_l, mask=i_l + o_l < ranked, other=NEVER)
        count, tied = list_tile(
            b_d, i_l + o_l, ranked, 0, ranked, count, tied, p_table, p_list, list_stride, BL
        )
    list_rest(
        p_table, p_list, p_listed_count, p_counters, i_row, i_h, count, ranked,
        (n + P - 1) // P, list_stride, BL, COUNT,
    )  # fmt: skip
