"""What the page selectors share: the pages they rank, and the lists of those they choose.

Every page but the last is ranked. What its query heads make of a page becomes one number per KV
head, its distance, an integer; the pages of the least distances are listed, and the last page after
them.
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
# Pages whose places are counted together, as bits of a word: those of a warp's width, for whose sum
# there is an instruction.
WARP = tl.constexpr(32)
# The interpreter has no threads.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
def load_center(p_statistics, b_page, o_d, s_page, D: tl.constexpr):
    """The first of them alone."""
    p_s = p_statistics + (b_page.to(tl.int64) * s_page)[:, None] + o_d[None, :]
    if o_d.shape[0] == D:
        return tl.load(p_s)
    else:
        return tl.load(p_s, mask=(o_d < D)[None, :], other=0)


@triton.jit
def count_bits(b_word, CHAINED: tl.constexpr):
    """How many bits of a word are set; by one instruction on GPUs that chain launches."""
    if CHAINED:
        return tl.inline_asm_elementwise(
            "popc.b32 $0, $1;", "=r,r", [b_word], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        b_word -= (b_word >> 1) & 0x55555555
        b_word = (b_word & 0x33333333) + ((b_word >> 2) & 0x33333333)
        b_word = (b_word + (b_word >> 4)) & 0x0F0F0F0F
        b_word += b_word >> 8
        return ((b_word + (b_word >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def places(m_nearer, m_tied, BL: tl.constexpr, CHAINED: tl.constexpr):
    """How many nearer and tied pages lie before each page [BL], and how many there are in all."""
    b_bit = (tl.full([WARP], 1, tl.uint32) << tl.arange(0, WARP).to(tl.uint32))[None, :]
    b_nearer = tl.reshape(m_nearer.to(tl.uint32), [BL // WARP, WARP]) * b_bit
    b_tied = tl.reshape(m_tied.to(tl.uint32), [BL // WARP, WARP]) * b_bit
    b_nearer, b_tied = tl.sum(b_nearer, 1), tl.sum(b_tied, 1)
    # Both counts are at most BL <= 4096, so one scan serves both.
    b_row = count_bits(b_nearer, CHAINED) + (count_bits(b_tied, CHAINED) << 16)
    b_before = count_bits(b_nearer[:, None] & (b_bit - 1), CHAINED)
    b_before += count_bits(b_tied[:, None] & (b_bit - 1), CHAINED) << 16
    b_before = tl.reshape((tl.cumsum(b_row, 0) - b_row)[:, None] + b_before, [BL])
    both = tl.sum(b_row, 0)
    return b_before & 0xFFFF, b_before >> 16, both & 0xFFFF, both >> 16


@triton.jit
def by_thread(b_held):
    """What each thread holds of a tensor [N], as [N / threads, threads]."""
    N: tl.constexpr = b_held.shape[0]
    THREADS: tl.constexpr = min(N, 128 if INTERPRETED else tl.extra.cuda.num_threads())
    return tl.reshape(b_held, [N // THREADS, THREADS])


@triton.jit
def sum_by_thread(b_held):
    """Sums of what each thread holds of a tensor [N], [threads]."""
    return tl.sum(by_thread(b_held), 0)


@triton.jit
def gathered_places(m_kept, first):
    """Places in a list of those of a mask [N], from `first` on, and how many they are; others have
    any place.

    Those that a thread holds are neighbours in it: it counts its own, and threads are counted once.
    Places in their order would take a sum of a warp for each one that a thread holds.
    """
    m_own = by_thread(m_kept.to(tl.int32))
    b_thread = tl.sum(m_own, 0)  # [THREADS]
    b_before = first + tl.cumsum(b_thread, 0) - b_thread
    b_place = b_before[None, :] + tl.cumsum(m_own, 0) - m_own
    return tl.reshape(b_place, m_kept.shape), tl.sum(b_thread, 0)


@triton.jit
def count_listed(n, ranked, budget, P: tl.constexpr):
    """How many pages of a row are listed for a budget: the chosen ones and the last, or all of a
    row that is read whole, of which none are ranked."""
    return tl.minimum(budget, ranked) + (n + P - 1) // P - ranked


@triton.jit
def list_last(p_list, last_page, chosen, ranked, list_stride):
    """Lists the last page of a ranked row after its chosen ones."""
    if ranked > 0:
        tl.store(p_list + chosen, last_page)
        tl.store(p_list + list_stride + chosen, ranked)


@triton.jit
def count_read(p_counters, i_h, listed, ranked):
    """Counts the pages of one row that are read, and a step of a sequence that is ranked."""
    tl.atomic_add(p_counters + PAGES_READ, listed.to(tl.int64), sem="relaxed")
    if (i_h == 0) & (ranked > 0):
        one = tl.minimum(ranked, 1).to(tl.int64)
        tl.atomic_add(p_counters + SPARSE_STEPS, one, sem="relaxed")


@triton.jit
def list_rest(
    p_list, last_page, p_listed_count, p_counters, i_row, i_h, chosen, ranked, pages, list_stride,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Lists the last page after the chosen ones, and stores and counts how many are listed: all
    pages of a row that is read whole."""
    list_last(p_list, last_page, chosen, ranked, list_stride)
    tl.store(p_listed_count + i_row, chosen + pages - ranked)
    if COUNT:
        count_read(p_counters, i_h, chosen + pages - ranked, ranked)


@triton.jit
def load_table(p_block_table, i_b, o_page, pages, s_block_table):
    """Physical pages of numbers in a sequence, and that of its last one; 0 for none."""
    p_table = p_block_table + i_b.to(tl.int64) * s_block_table
    b_page = tl.load(p_table + o_page, mask=o_page < pages, other=0)
    last_page = tl.load(p_table + tl.maximum(pages - 1, 0), mask=pages > 0, other=0)
    return b_page.to(tl.int32), last_page.to(tl.int32)


@triton.jit
def store_pages(p_list, b_place, b_page, o_page, m_place, list_stride):
    """Physical pages and their numbers in a sequence, into places of the list."""
    tl.store(p_list + b_place, b_page, mask=m_place)
    tl.store(p_list + list_stride + b_place, o_page, mask=m_place)


# Rows that are not aligned have one element per thread in loads, as scattered stores have: what is
# loaded is stored without an exchange.
@triton.jit(do_not_specialize=["list_stride", "page_stride", "s_block_table"])
def list_kernel(
    p_seq_lens, p_exact_rows, p_block_table, p_distance, p_tile_count, p_listed, p_listed_count,
    p_counters,
    s_block_table, list_stride, page_stride, exact_below,
    HKV: tl.constexpr, P: tl.constexpr, BL: tl.constexpr, NT: tl.constexpr,
    EXACT_ROWS: tl.constexpr, COUNT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Lists the pages of distance 0 of one tile of BL pages, which `p_tile_count` [rows, NT] counts
    for each tile, and with the first tile the last page."""
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    pages = (n + P - 1) // P
    p_list = p_listed + i_row.to(tl.int64) * (2 * list_stride)
    first = i_t * BL
    o_page = first + tl.arange(0, BL)
    b_page, last_page = load_table(p_block_table, i_b, o_page, pages, s_block_table)
    await_previous(CHAINED)
    allow_next(CHAINED)
    chosen = tl.full([], 0, tl.int32)
    b_place, m_place = o_page, o_page < pages
    if first < ranked:
        o_t = tl.arange(0, NT)
        b_count = tl.load(p_tile_count + i_row * NT + o_t, mask=o_t * BL < ranked, other=0)
        chosen = tl.sum(b_count, 0)
        p_d = p_distance + i_row.to(tl.int64) * page_stride
        m_place = tl.load(p_d + o_page, mask=o_page < ranked, other=NEVER) == 0
        before = tl.sum(tl.where(o_t < i_t, b_count, 0), 0)
        b_place, _ = gathered_places(m_place, before)
    elif ranked > 0:
        m_place = o_page < 0
    store_pages(p_list, b_place, b_page, o_page, m_place, list_stride)
    if i_t == 0:
        list_rest(
            p_list, last_page, p_listed_count, p_counters, i_row, i_h, chosen, ranked, pages,
            list_stride, COUNT,
        )  # fmt: skip
