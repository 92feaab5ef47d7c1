"""The candidates of entmax decoding: tokens whose scores exceed a guessed threshold.

A strided sample of the keys is scored, a lower threshold guessed from it for every query head, and
all keys are read once; those above the guess are listed. The guess is proved later: where the
tokens above it have a mass of at least one above it, it lies below the true threshold, so that
no token of the support is missing from the list.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .append import to_stored
from .certificate import BOUNDED, load_last_span, place_last_scales, take_bounds
from .entmax import head_parameters, newton_step, norm, sum_moments, weights_and_slopes
from .nearest import list_own
from .newest import write_last_statistics, write_newest
from .pages import count_listed, ranked_pages
from .scores import (
    allow_next,
    await_if,
    await_previous,
    count_pages,
    load_pages,
    load_queries,
    load_rows,
    load_scales,
    may_be_fresh,
    page_source,
    score_rows,
)
from .together import clear_words

# Mass above the guess that the sample is made to show: more gives longer lists, less failures.
GUESSED_MASS = tl.constexpr(2.5)
# Sampled scores above this rank among the maxima of PEAK_TOKENS are taken for exceptions, which
# do not stand for others.
EXCEPTIONS = tl.constexpr(4)
PEAK_TOKENS = tl.constexpr(128)
GUESS_STEPS = tl.constexpr(3)
# Of a score, what the order of a sum changes: the largest one alone proves a guess that is so much
# more than one below it as it was sampled, however those who look for it add it up.
SUM_ROUNDING = tl.constexpr(2.0**-16)


@triton.jit(do_not_specialize=["early", "s_new_key_b", "s_new_key_h", "p_slot_mapping"])
def sample_kernel(
    p_query, p_key, p_block_table, p_listed, p_listed_count, p_seq_lens, p_alpha, p_slopes,
    p_sample, p_new_key, p_slot_mapping,
    s_query_b, s_query_h, s_head, s_block_table, list_stride, window, store_below, early,
    scale, factor, exponent, s_new_key_b, s_new_key_h, key_scale,
    s_page: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, BN: tl.constexpr, M: tl.constexpr,
    WINDOW: tl.constexpr, LISTED: tl.constexpr, ALIBI: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr,
    APPENDS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Scores M tokens of a row: the newest, and evenly spaced ones of pages that nothing in a step
    writes, which are all but the last two, so far as there are more.

    Rows of at most `store_below` tokens need no guess.
    APPENDS: the newest is not in its page yet.
    """
    await_if(early == 0, CHAINED)
    allow_next(CHAINED)
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    n = tl.load(p_seq_lens + i_b).to(tl.int32)
    p_pages, first, entries = page_source(
        p_block_table, p_listed, p_listed_count, i_b, i_row, n, window, s_block_table, list_stride,
        P, WINDOW, LISTED,
    )  # fmt: skip
    # One program that waits keeps the whole launch from ending before the one before it.
    await_if(i_m + i_h + i_b == 0, CHAINED)
    if entries * P <= store_below:
        return
    o_n, o_d, o_g = tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, GP)
    b_scale, b_slope, _ = load_scales(
        p_alpha, p_slopes, i_h, o_g, scale, factor, exponent, G, ALIBI, ALPHA_PER_HEAD
    )
    b_q = load_queries(p_query, i_b, i_h, o_g, o_d, s_query_b, s_query_h, G, D)  # [DP, GP]
    # Single tokens rather than whole pages: the scores inside a page resemble each other.
    o_m = i_m * BN + o_n
    newest = entries * P - ((n + P - 1) // P * P - n) - 1
    last = tl.where(entries > 2, (entries - 2) * P - 1, newest)
    o_token = (o_m.to(tl.int64) * last // (M - 1)).to(tl.int32)
    o_token = tl.where(o_m == M - 1, newest, o_token)
    await_if(((i_m + 1) * BN == M) | (entries <= 2), CHAINED)
    b_page, b_logical = load_pages(p_pages, o_token // P, first, entries, list_stride, LISTED)
    p_k = p_key + i_h.to(tl.int64) * s_head
    b_k = load_rows(p_k, b_page, o_token, o_d, s_page, D, P)  # [BN, DP]
    if APPENDS:
        p_new = p_new_key + i_b.to(tl.int64) * s_new_key_b + i_h.to(tl.int64) * s_new_key_h
        b_new = to_stored(tl.load(p_new + o_d, mask=o_d < D, other=0.0), key_scale, b_k.dtype)
        m_new = ((o_m == M - 1) & (tl.load(p_slot_mapping + i_b) >= 0))[:, None]
        b_k = tl.where(m_new, b_new.to(b_q.dtype)[None, :], b_k.to(b_q.dtype))
    b_z = score_rows(b_k, b_q, b_logical, o_token, n, window, b_scale, b_slope, P, WINDOW, ALIBI)
    p_s = p_sample + (i_row * G + o_g)[None, :].to(tl.int64) * M + o_m[:, None]
    tl.store(p_s, b_z, mask=(o_g < G)[None, :])


@triton.jit
def guess_kernel(
    p_listed_count, p_seq_lens, p_alpha, p_sample, p_guess, window, store_below, factor, exponent,
    HKV: tl.constexpr, G: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
    WINDOW: tl.constexpr, LISTED: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr, ORDER: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Guesses a threshold for one query head, -inf where every score is to be stored."""
    # What was before the sample, or before an `append`, has ended where that lets this one start.
    allow_next(CHAINED)
    i_hq, i_b = tl.program_id(0), tl.program_id(1)
    i_row = i_b * HKV + i_hq // G
    n = tl.load(p_seq_lens + i_b).to(tl.int32)
    _, entries = count_pages(p_listed_count, i_row, n, window, P, WINDOW, LISTED)
    guess = -float("inf")
    long = entries * P > store_below
    await_if(long | (i_hq + i_b == 0), CHAINED)
    if long:
        _, b = head_parameters(p_alpha, factor, exponent, i_hq, i_hq >= 0, ALPHA_PER_HEAD)
        b_z = tl.load(p_sample + (i_b * HKV * G + i_hq).to(tl.int64) * M + tl.arange(0, M))
        b_peak = tl.max(tl.reshape(b_z, [M // PEAK_TOKENS, PEAK_TOKENS]), 1)  # [M / PEAK_TOKENS]
        o_p = tl.arange(0, M // PEAK_TOKENS)
        earlier = (b_peak[None, :] == b_peak[:, None]) & (o_p[None, :] < o_p[:, None])
        rank = tl.sum(((b_peak[None, :] > b_peak[:, None]) | earlier).to(tl.int32), 1)
        clip = tl.max(tl.where(rank >= EXCEPTIONS, b_peak, -float("inf")), 0)
        peak = tl.max(b_peak, 0)
        clip = tl.where(clip > -float("inf"), clip, peak)
        mass = tl.minimum(GUESSED_MASS * M / (entries * P).to(tl.float32), 1.0)
        root = norm(mass, b, ORDER)
        b_z = tl.minimum(b_z, clip)
        guess = clip - norm(mass / (EXCEPTIONS + 1), b, ORDER)
        for _ in range(GUESS_STEPS):
            above, slope = sum_moments(b_z, guess, b, ORDER)
            guess += newton_step(above, slope, root, b, ORDER)
        # An infinite peak stays one.
        rounding = tl.minimum(tl.abs(peak) * SUM_ROUNDING, 1.0)
        guess = tl.maximum(guess, peak - 1.0 - rounding)
    tl.store(p_guess + i_b * HKV * G + i_hq, guess)


# Tables that are not aligned have one element per thread in loads, as scattered stores have.
@triton.jit(
    do_not_specialize=[
        *("early", "s_block_table", "s_new_key_b", "s_new_key_h", "s_new_value_b", "s_new_value_h"),
        *("s_statistics_page", "s_statistics_head", "p_slot_mapping", "batch"),
    ]
)
def collect_kernel(
    p_query, p_key, p_block_table, p_listed, p_listed_count, p_seq_lens, p_alpha, p_slopes, p_guess,
    p_slot, p_score, p_count, p_maximum, p_mass, p_slope,
    p_exact_rows, p_reach, p_page_extreme, p_bound, p_span, p_counters, p_words,
    p_new_key, p_new_value, p_slot_mapping, p_value, p_statistics, p_scales,
    s_query_b, s_query_h, s_head, s_block_table, s_scales_page, s_scales_head, list_stride, window,
    capacity, store_below,
    early, scale, factor, exponent, page_stride, exact_below, budget,
    s_new_key_b, s_new_key_h, s_new_value_b, s_new_value_h, s_statistics_page, s_statistics_head,
    key_scale, value_scale, batch,
    s_page: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GW: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, CLASSES: tl.constexpr,
    GUESSED: tl.constexpr, WINDOW: tl.constexpr, LISTED: tl.constexpr, CHOOSING: tl.constexpr,
    ALIBI: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr, ORDER: tl.constexpr, STAGES: tl.constexpr,
    BL: tl.constexpr, BR: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    OVERFULL: tl.constexpr, MAKE_UP: tl.constexpr, CERTIFY: tl.constexpr, COUNT: tl.constexpr,
    APPENDS: tl.constexpr, STATISTICS: tl.constexpr, OVERLAPPED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Lists slot and scores of the tokens of one split that any head of the group may need.

    Rows of at most `store_below` tokens have all scores in the order of their tiles, and no slots.
    Writes per split the number of candidates, which may exceed the capacity of the list, and per
    head and class of rows the largest of all scores and the moments above the guess.

    OVERFULL: rows that are read whole may have more scores than there is room for.
    CHOOSING: every split chooses the pages of its row by itself, and lists those that it reads.
    APPENDS: writes the newest token of every sequence, too, as `append` does, and STATISTICS of its
    page by a program of its own, before the splits of its row: after them
    it was measured to cost more.
    OVERLAPPED: lets the next launch start beside this one, as it does where no pages are listed.
    """
    if not LISTED and not GUESSED:
        # The first launch of a step: what it is given may not be there yet.
        await_if(early == 0, CHAINED)
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if APPENDS and STATISTICS > 0:
        i_s -= 1
    i_row = i_b * HKV + i_h
    n = tl.load(p_seq_lens + i_b).to(tl.int32)
    PAGES: tl.constexpr = BN // P
    listed = None
    if budget is not None:
        _, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
        listed = count_listed(n, ranked, budget, P)
    o_n, o_d, o_g = tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, GP)
    if APPENDS:
        if STATISTICS > 0 and i_s < 0:
            write_last_statistics(
                p_new_key, p_slot_mapping, p_key, p_statistics, p_scales, i_b, i_h,
                s_new_key_b, s_new_key_h, s_page, s_head, s_statistics_page, s_statistics_head,
                key_scale, D, DP, P, STATISTICS,
            )  # fmt: skip
            if CERTIFY == BOUNDED:
                # The program's other threads wrote some of what a thread reads.
                tl.debug_barrier()
                p_last = place_last_scales(
                    p_block_table, p_scales, i_b, i_h, ranked, s_block_table, s_scales_page,
                    s_scales_head,
                )  # fmt: skip
                tl.store(p_span + i_row * (PS + 1) + PS, load_last_span(p_last, ranked))
            allow_next(CHAINED)
            return
        _, entries = count_pages(p_listed_count, i_row, n, window, P, WINDOW, LISTED, listed)
        write_newest(
            p_new_key, p_new_value, p_slot_mapping, p_key, p_value, p_block_table, p_counters,
            i_b, i_h, i_s, n, entries, batch, s_new_key_b, s_new_key_h, s_new_value_b,
            s_new_value_h, s_page, s_head, s_block_table, key_scale, value_scale, D, DP, P, PAGES,
            S, COUNT,
        )  # fmt: skip
    if CERTIFY == BOUNDED and not APPENDS:
        # One of the splits says it, the last one, which reads no more than others.
        _, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
        ranked = tl.where(i_s == S - 1, ranked, 0)
        p_last = place_last_scales(
            p_block_table, p_scales, i_b, i_h, ranked, s_block_table, s_scales_page, s_scales_head
        )
    m_g = o_g < G
    b_scale, b_slope, b_exponent = load_scales(
        p_alpha, p_slopes, i_h, o_g, scale, factor, exponent, G, ALIBI, ALPHA_PER_HEAD
    )
    b_q = load_queries(p_query, i_b, i_h, o_g, o_d, s_query_b, s_query_h, G, D)  # [DP, GP]
    if CHOOSING:
        listed = list_own(
            p_block_table, p_seq_lens, p_exact_rows, p_reach, p_page_extreme, p_listed,
            p_listed_count, p_counters, i_b, i_h, i_row, i_s, s_block_table,
            list_stride, page_stride, exact_below, budget, G, GW, P, PAGES, S, BL, BR, PS,
            PSP, EXACT_ROWS, COUNT, CHAINED,
        )  # fmt: skip
    elif LISTED:
        await_previous(CHAINED)
    if CERTIFY == BOUNDED and not APPENDS:
        last = load_last_span(p_last, ranked)
    allow_next(CHAINED and (OVERLAPPED or not LISTED))
    p_pages, first, entries = page_source(
        p_block_table, p_listed, p_listed_count, i_b, i_row, n, window, s_block_table, list_stride,
        P, WINDOW, LISTED, listed,
    )  # fmt: skip
    b_guess = tl.where(m_g, -float("inf"), float("inf"))
    filtered = 0
    if GUESSED:
        filtered = (entries * P > store_below).to(tl.int32)
    tiles = (entries + PAGES - 1) // PAGES
    if not LISTED and (GUESSED or not APPENDS):
        # Else only who reads the last page needs a launch before, which is `append`, and may read
        # others first.
        soon = ((tiles - 1) % S == i_s) & (i_s + STAGES * S >= tiles)
        await_if((filtered > 0) | (early != 0) & (may_be_fresh(n, P) | soon), CHAINED)
    if GUESSED:
        m_guess = o_g < G * filtered
        b_guess = tl.load(p_guess + i_row * G + o_g, mask=m_guess, other=-float("inf"))
        b_guess = tl.where(m_g, b_guess, float("inf"))
    p_k = p_key + i_h.to(tl.int64) * s_head

    own = (i_row * S + i_s).to(tl.int64)
    p_slot += own * capacity
    # A head's lists of all splits are neighbours.
    o_own = (i_row * G + o_g) * S + i_s
    o_list = o_own.to(tl.int64) * capacity  # [GP]
    b_maximum = tl.full([BN, GP], -float("inf"), tl.float32)
    b_mass = tl.zeros([BN, GP], tl.float32)
    b_moment = tl.zeros([BN, GP], tl.float32)
    count = 0
    # The pages of the next tile are loaded one tile ahead: a load that waits for another one
    # in the same iteration would take the stages of the pipeline.
    b_next, b_next_logical = load_pages(
        p_pages, i_s * PAGES + o_n // P, first, entries, list_stride, LISTED
    )
    for i_t in tl.range(i_s, tiles, S, num_stages=STAGES):
        if not LISTED and not APPENDS:
            # Before the pipeline asks for the last tile.
            await_if(i_t == tiles - 1 - STAGES * S, CHAINED)
        b_page, b_logical = b_next, b_next_logical
        b_next, b_next_logical = load_pages(
            p_pages, (i_t + S) * PAGES + o_n // P, first, entries, list_stride, LISTED
        )
        b_k = load_rows(p_k, b_page, o_n, o_d, s_page, D, P)  # [BN, DP]
        b_z = score_rows(
            b_k, b_q, b_logical, o_n, n, window, b_scale, b_slope, P, WINDOW, ALIBI
        )  # [BN, GP]
        b_maximum = tl.maximum(b_maximum, b_z)
        if CERTIFY == BOUNDED:
            take_bounds(p_bound, b_logical, o_n, i_row, n, page_stride, G, P)
        if filtered == 0:
            p_z = p_score + o_list[None, :] + (count + o_n)[:, None]
            m_z = m_g[None, :]
            if OVERFULL:
                m_z &= (count + o_n < capacity)[:, None]
            tl.store(p_z, b_z, mask=m_z)
            count += BN
        else:
            b_x = tl.maximum(b_z - b_guess[None, :], 0.0)
            b_w, b_d = weights_and_slopes(b_x, b_exponent[None, :], ORDER)
            b_mass += b_w
            b_moment += b_d
            # Not "greater": a NaN is kept, and shows in the output.
            m_kept = 1 - tl.min((b_z <= b_guess[None, :]).to(tl.int32), 1)  # [BN]
            kept = tl.sum(m_kept, 0)
            if kept > 0:
                b_position = count + tl.cumsum(m_kept, 0) - m_kept
                m_listed = (m_kept > 0) & (b_position < capacity)
                tl.store(p_slot + b_position, (b_page * P + o_n % P).to(tl.int32), mask=m_listed)
                p_z = p_score + o_list[None, :] + b_position[:, None]
                tl.store(p_z, b_z, mask=m_g[None, :] & m_listed[:, None])
            count += kept
    allow_next(CHAINED and not (OVERLAPPED or not LISTED))
    if MAKE_UP and i_s + i_h + i_b == 0:
        clear_words(p_words)
    if CERTIFY == BOUNDED and not APPENDS and i_s == S - 1:
        tl.store(p_span + i_row * (PS + 1) + PS, last)
    tl.store(p_count + own, count)
    # Rows of a tile are taken together so far as they lie in one warp.
    o_class = tl.arange(0, CLASSES)[:, None]
    o_out = o_own[None, :] * CLASSES + o_class
    m_out = (o_class >= 0) & m_g[None, :]
    b_maximum = tl.max(tl.reshape(b_maximum, [CLASSES, BN // CLASSES, GP]), 1)
    tl.store(p_maximum + o_out, b_maximum, mask=m_out)
    if GUESSED:
        b_mass = tl.sum(tl.reshape(b_mass, [CLASSES, BN // CLASSES, GP]), 1)
        b_moment = tl.sum(tl.reshape(b_moment, [CLASSES, BN // CLASSES, GP]), 1)
        tl.store(p_mass + o_out, b_mass, mask=m_out)
        tl.store(p_slope + o_out, b_moment, mask=m_out)
    if not LISTED:
        await_if(i_s + i_h + i_b == 0, CHAINED)
