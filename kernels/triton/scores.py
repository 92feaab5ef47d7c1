"""Device functions that walk over pages and score their tokens.

A row is a sequence and KV head. Its pages come from the sequence's block table, or from lists of
selected pages; a program takes every step-th tile of BN tokens of them.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import head_parameters

# Logical page of an entry that does not exist: after every sequence.
NO_PAGE = tl.constexpr(1 << 23)


@triton.jit
def await_previous(CHAINED: tl.constexpr):
    """Waits for the launch before, while which a chained one may have been started.

    Some program of every chained launch does so before it ends, or a launch after it could be ahead
    of one before it. The first one of a step does so before it reads anything, unless that one is
    known; the others may read what the step is given.
    """
    if CHAINED:
        tl.extra.cuda.gdc_wait()


@triton.jit
def await_if(needed, CHAINED: tl.constexpr):
    """The same where what follows needs the launch before.

    Of a step that follows `append`, what reads only pages that append does not write does not: it
    is given `early`, and what came before append has ended where that lets others start, and can be
    seen by all.
    """
    if CHAINED:
        # Under a predicate: loops with a branch to a wait would not load ahead.
        tl.inline_asm_elementwise(
            """{
                .reg .pred %needed;
                setp.ne.s32 %needed, $1, 0;
                @%needed griddepcontrol.wait;
                mov.b32 $0, 0;
            }""",
            "=r,r,~{memory}",
            [needed.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def may_be_fresh(n, P: tl.constexpr):
    """Whether the page before a sequence's last one may be written in this step: in prefix caching
    by another sequence, whose last page it is. It was full before otherwise."""
    return (n - 1) % P == 0


@triton.jit
def prefetch(p_row, m_row, CHAINED: tl.constexpr):
    """Asks for the lines of the pointers that m_row names to come into the L2 cache; on GPUs that
    chain launches."""
    if CHAINED:
        tl.inline_asm_elementwise(
            """{
                .reg .pred %wanted;
                setp.ne.s32 %wanted, $2, 0;
                @%wanted prefetch.global.L2 [$1];
                mov.b32 $0, 0;
            }""",
            "=r,l,r",
            [p_row.to(tl.int64), m_row.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def allow_next(CHAINED: tl.constexpr):
    """Lets a chained launch after this one start."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def count_pages(
    p_listed_count, i_row, n, window, P: tl.constexpr, WINDOW: tl.constexpr, LISTED: tl.constexpr,
    listed=None,
):  # fmt: skip
    """Number in the sequence of the first page that a row reads, and how many pages it reads;
    the first counts for nothing where pages are listed.

    listed: how many are, where that is known: no load waits for another.
    """
    if listed is not None:
        return 0, listed
    elif LISTED:
        return 0, tl.load(p_listed_count + i_row)
    else:
        first = 0
        if WINDOW:
            first = tl.maximum(n - window, 0) // P
        return first, (n + P - 1) // P - first


@triton.jit
def page_source(
    p_block_table, p_listed, p_listed_count, i_b, i_row, n, window, s_block_table, list_stride,
    P: tl.constexpr, WINDOW: tl.constexpr, LISTED: tl.constexpr, listed=None,
):  # fmt: skip
    """Where a row's pages begin, and what `count_pages` says of them.

    p_listed: [rows, 2, list_stride], a row's physical pages and their numbers in the sequence.
    """
    first, entries = count_pages(p_listed_count, i_row, n, window, P, WINDOW, LISTED, listed)
    if LISTED:
        return p_listed + i_row.to(tl.int64) * (2 * list_stride), first, entries
    else:
        return p_block_table + i_b.to(tl.int64) * s_block_table + first, first, entries


@triton.jit
def load_pages(p_pages, o_entry, first, entries, list_stride, LISTED: tl.constexpr):
    """Physical and logical pages of entries, NO_PAGE past the last."""
    m_entry = o_entry < entries
    b_page = tl.load(p_pages + o_entry, mask=m_entry, other=0)
    if LISTED:
        b_logical = tl.load(p_pages + list_stride + o_entry, mask=m_entry, other=NO_PAGE)
    else:
        b_logical = tl.where(m_entry, first + o_entry, NO_PAGE)
    return b_page, b_logical


@triton.jit
def load_queries(
    p_query, i_b, i_h, o_g, o_d, s_query_b, s_query_h, G: tl.constexpr, D: tl.constexpr
):
    """Queries of a group as columns, [DP, GP]; zeros past the group and the head size."""
    p_q = p_query + i_b.to(tl.int64) * s_query_b + (i_h * G + o_g)[None, :] * s_query_h
    mask = (o_g < G)[None, :] & (o_d < D)[:, None]
    return tl.load(p_q + o_d[:, None], mask=mask, other=0.0)


@triton.jit
def load_scales(
    p_alpha, p_slopes, i_h, o_g, scale, factor, exponent,
    G: tl.constexpr, ALIBI: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr,
):  # fmt: skip
    """What turns q.k and distances into z for each head of a group, and b; all [GP], fp32."""
    o_head, m_g = i_h * G + o_g, o_g < G
    b_factor, b_exponent = head_parameters(p_alpha, factor, exponent, o_head, m_g, ALPHA_PER_HEAD)
    b_slope = b_factor
    if ALIBI:
        b_slope = tl.load(p_slopes + o_head, mask=m_g, other=0.0) * b_factor
    return b_factor * scale, b_slope, b_exponent


@triton.jit
def load_rows(p_rows, b_page, o_token, o_d, s_page, D: tl.constexpr, P: tl.constexpr):
    """One row of D elements of each token from its page, [BN, DP]."""
    o_row = b_page.to(tl.int64) * s_page + (o_token % P) * D
    p_tile = p_rows + o_row[:, None] + o_d[None, :]
    if o_d.shape[0] == D:
        return tl.load(p_tile)
    else:
        return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def score_rows(
    b_key, b_query, b_logical, o_token, n, window, b_scale, b_slope,
    P: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """z of a tile of keys for the queries of a group, [BN, GP]; -inf where not visible.

    fp8 keys become the queries' dtype, which is exact.
    """
    b_z = tl.dot(b_key.to(b_query.dtype), b_query, input_precision="ieee") * b_scale[None, :]
    relative = b_logical * P + o_token % P - (n - 1)
    if ALIBI:
        b_z += b_slope[None, :] * relative.to(tl.float32)[:, None]
    m_visible = relative <= 0
    if WINDOW:
        m_visible &= relative > -window
    return tl.where(m_visible[:, None], b_z, -float("inf"))
