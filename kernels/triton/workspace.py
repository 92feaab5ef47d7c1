"""How a decode step is divided over the chip, and the scratch memory that it needs."""

from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from math import sqrt

import torch
from torch import Tensor

from ..pages import CODES
from ..reference.adaptive import FIRST_SHARE, most_first
from ..selectors import Adaptive, Exact, Gaussian, Selector, TopK
from .attend_short import WHOLE
from .bracket import TRIALS
from .nearest_long import DEVIATIONS, SAMPLED
from .together import WORDS

STORE_BELOW = 32768
"""Sequences of at most this many tokens store all scores: no guess costs less than none."""

STORE_LISTED_BELOW = 65536
"""The same where pages are listed for a budget."""

STORED_BYTES = 9 << 21
"""Of a batch whose scores are never more than this all are stored: they stay in the L2 cache. One
sequence of 32 heads has as many with 147,456 tokens; above 131,072 that takes up to 3% longer than
a guess, and much less where a table with room for as many holds a shorter one."""

STORED_TOKENS = 147456
"""So many of a sequence at most: with 524,288 of 8 heads, whose scores are no more bytes, storing
takes 10% longer."""

HELD = 2048
"""Scores of a query head that one program holds."""

HELD_LISTED = 8192
"""The same where pages are listed for a budget."""

RANKED_BY_READERS = 4096
"""Pages of a row that each program that reads some ranks by itself."""

RANKED_ALONE = 4096
"""Pages of a row that one program ranks, where block tables have room for more."""

RANKED_REACHES = 16384
"""Numbers of these pages for the heads of a group that it holds: more pages of smaller groups."""

LISTED_BY_LAST = 16384
"""Pages of a long row up to which the last program to rank some of them lists the chosen ones."""

CANDIDATES = 2048
"""Pages among which it finds these, at most."""

CAPACITY_FRACTION = 8
"""Of the tokens beyond STORE_BELOW one in this many has a place in the lists of candidates."""

_MOST_SPLITS = 256
_MOST_NEAR = 131072
_NEAR = 1 << 22
_ALIGNMENT = 256


def power_of_two(number: int) -> int:
    """The least one that is not below a number of at least 1; Triton's own function takes long."""
    return 1 << (number - 1).bit_length()


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; as many as an H200 has for one that is no GPU."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def can_chain(device: torch.device) -> bool:
    """Whether a launch can start before the one before it has ended: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def budget_of(selector: Selector, page_size: int, exact_below: int) -> int | None:
    """Tokens that a row reads at most, unless it is to be read whole; None if there is no bound."""
    if not isinstance(selector, TopK):
        return None
    return max(selector.token_budget // page_size * page_size + page_size, exact_below)


def first_pages_of(selector: Selector, max_pages: int, page_size: int) -> int:
    """Pages that a query head has read first at most, for a threshold; 0 if it needs none."""
    if isinstance(selector, Gaussian | TopK):
        return 0
    if isinstance(selector, Exact) and not selector.prune:
        return 0
    return max(
        selector.first_pages,
        min(max_pages // FIRST_SHARE, most_first(selector.first_pages, page_size)),
    )


@dataclass(frozen=True)
class Shape:
    """What the launches of a decode step depend on; lengths of sequences are not among it.

    dtype: of the cache.
    max_tokens: the longest sequence that the block table can hold.
    selector: name of the rule that chooses the pages to read.
    budget: tokens that are read at most; None if there is no bound.
    certified: whether bounds of the pages' scores are kept.
    first_pages: pages that a query head has read first at most, for a threshold.
    coded: whether pages are ranked by codes of their keys.
    """

    batch: int
    query_heads: int
    kv_heads: int
    head_size: int
    page_size: int
    dtype: torch.dtype
    max_tokens: int
    processors: int
    selector: str = "exact"
    budget: int | None = None
    certified: bool = False
    first_pages: int = 0
    coded: bool = False

    @cached_property
    def listed(self) -> bool:
        return self.selector != "exact"

    @cached_property
    def max_read(self) -> int:
        return self.max_tokens if self.budget is None else min(self.max_tokens, self.budget)

    @cached_property
    def group(self) -> int:
        return self.query_heads // self.kv_heads

    @cached_property
    def planned_batch(self) -> int:
        """The batch that the chip is divided for: each division compiles kernels of its own, and a
        batch that was padded is divided like the one that it was."""
        return power_of_two(self.batch)

    @cached_property
    def group_width(self) -> int:
        """Places of the numbers that a page has for the heads of a group, side by side."""
        return power_of_two(self.group)

    @cached_property
    def padded_head_size(self) -> int:
        return max(16, power_of_two(self.head_size))

    @cached_property
    def padded_group(self) -> int:
        """Columns of a score tile; matrix products take at least 8."""
        return max(8, power_of_two(self.group))

    @cached_property
    def row_size(self) -> int:
        """Bytes of a key where it is multiplied, before which fp8 becomes 16 bits wide, and of a
        statistic where it is."""
        return self.padded_head_size * max(2, self.dtype.itemsize)

    @cached_property
    def tile(self) -> int:
        """Tokens whose keys are scored together: 32 KiB of keys, but whole pages."""
        return max(128 if self.row_size <= 256 else 64, self.page_size)

    @cached_property
    def page_tile(self) -> int:
        """Pages whose statistics are scored together: 32 KiB of them where they are multiplied, at
        most 64 pages; fewer with codes, which are multiplied token by token."""
        if self.coded:
            return 32
        return max(16, min(64, (1 << 14) // self.row_size))

    @cached_property
    def page_stages(self) -> int:
        """Tiles of pages under way in a program that ranks them; those not yet multiplied are kept
        in shared memory, of which codes may fill 128 KiB."""
        if not self.coded:
            return 2
        tile_bytes = self.page_tile * self.page_size * self.padded_head_size // 4
        return max(1, min(3, 1 + (1 << 17) // tile_bytes))

    @cached_property
    def splits(self) -> int:
        """Programs per sequence and KV head: one wave in all, and a tile for each."""
        return min(self._programs(16 // self.collect_warps), -(-self.max_read // self.tile))

    @cached_property
    def collect_warps(self) -> int:
        """Warps of each of them: more where a program ranks more pages than four hold."""
        ranks = self.selector == "topk" and self.ranked_by_readers
        held = (self.list_tile + self.rest_tile) * self.group_width
        return 8 if ranks and held > RANKED_REACHES // 2 else 4

    @cached_property
    def overlapped(self) -> bool:
        """Whether programs that rank what they read may start beside those that score pages, and
        the next launch beside them: where few are wanted, or one fills half a multiprocessor. Of
        others several would share one, and leave the next without."""
        return self.ranked_by_readers and (self.max_pages <= 512 or self.collect_warps > 4)

    @cached_property
    def page_splits(self) -> int:
        """The same for the scores of pages."""
        return min(self._programs(4), -(-self.max_pages // self.page_tile))

    def _programs(self, per_processor: int) -> int:
        programs = per_processor * self.processors // (self.planned_batch * self.kv_heads)
        if programs > 64:
            programs = 1 << (programs.bit_length() - 1)
        return max(1, min(programs, _MOST_SPLITS))

    @cached_property
    def most_capacity(self) -> int:
        """Tokens that a split reads at most."""
        return -(-self.max_read // (self.splits * self.tile)) * self.tile

    @cached_property
    def crowded(self) -> bool:
        """Whether the programs that weigh values are more than a multiprocessor has room for."""
        return self.value_parts * self.query_heads * self.planned_batch > 2 * self.processors

    @cached_property
    def store_below(self) -> int:
        """Rows that read at most so many tokens store all scores."""
        if self.budget is not None:
            return STORE_LISTED_BELOW
        stored = min(STORED_TOKENS, STORED_BYTES // (4 * self.planned_batch * self.query_heads))
        return max(STORE_BELOW, self.max_read if self.max_read <= stored else 0)

    @cached_property
    def held(self) -> int:
        """Places of the scores of a query head in the registers of a program, 0 if they are too
        many, or better shared by several."""
        places = self.splits * self.most_capacity
        most = HELD if self.budget is None else HELD_LISTED
        return 0 if self.crowded or places > most else max(128, power_of_two(places))

    @cached_property
    def classes(self) -> int:
        """Classes of the tokens of a split, the largest score of each of which is kept. Pages that
        were chosen have many tokens of the support: few classes would have few of them for maxima.
        """
        few = self.held > 0 or self.max_read <= HELD or self.max_read > self.store_below
        return 4 if self.budget is None or few or self.near < self.most_near else 16

    @cached_property
    def page_step(self) -> int:
        """One page of a long row in so many is sampled."""
        return max(1, power_of_two(self.max_pages) // SAMPLED.value)

    @cached_property
    def sample(self) -> int:
        """Tokens that the guess of a threshold samples."""
        return 4096 if self.max_read >= 1 << 18 else 2048

    @cached_property
    def value_parts(self) -> int:
        """Programs per query head that weigh its values: 64 bytes of a value at least."""
        most = max(1, self.padded_head_size * self.dtype.itemsize // 64)
        free = max(1, self.processors // (self.planned_batch * self.query_heads))
        return min(4, most, 1 << (free.bit_length() - 1))

    @cached_property
    def filter_parts(self) -> int:
        """Programs per query head that pack its candidates."""
        wanted = max(1, 16 * self.processors // (self.planned_batch * self.query_heads))
        wanted = 1 << (min(wanted, 16).bit_length() - 1)
        return min(wanted, power_of_two(self.splits))

    @cached_property
    def most_near(self) -> int:
        """Candidates that one of those programs can meet: all that its splits read."""
        return power_of_two(self.splits) // self.filter_parts * self.most_capacity

    @cached_property
    def near(self) -> int:
        """Candidates above the lower bound of a threshold that each of them keeps."""
        share = max(1024, min(_MOST_NEAR, _NEAR // (self.planned_batch * self.query_heads)))
        # A multiple of 16, or each batch size would compile kernels of its own.
        return -(-min(self.most_near, share // self.filter_parts) // 16) * 16

    @cached_property
    def partials(self) -> int:
        """Partial sums of values: of the splits, and of all programs that work on one row."""
        splits = self.batch * self.query_heads * self.splits
        return max(splits, self.processors * self.group)

    @cached_property
    def max_pages(self) -> int:
        return -(-self.max_tokens // self.page_size)

    @cached_property
    def page_stride(self) -> int:
        """Places for the pages of a row, a multiple of 16."""
        return -(-self.max_pages // 16) * 16

    @cached_property
    def ranked_by_readers(self) -> bool:
        """Whether the programs that read the pages of a row rank them first, each all of them."""
        return not self.long_rows and self.max_pages <= RANKED_BY_READERS

    @cached_property
    def most_candidates(self) -> int:
        """Pages of a long row that may be chosen, with all that a sample leaves open, if one
        program has room for them; 0 where they are too many, or rows too long."""
        if not self.long_rows or self.max_pages > LISTED_BY_LAST:
            return 0
        chosen = self.max_read // self.page_size - 1
        rank, share = chosen / self.page_step, chosen / self.max_pages
        # As `distance_kernel` has them, and as many more as that is wrong by.
        sampled = rank + 1.5 * (DEVIATIONS.value * sqrt(rank * (1 - share)) + 1) + 2
        most = self.page_step * (sampled + DEVIATIONS.value * sqrt(sampled))
        places = power_of_two(max(1024, int(most)))
        return places if places <= CANDIDATES else 0

    @cached_property
    def long_rows(self) -> bool:
        """Whether a row can have more pages than one program should rank."""
        return self.selector == "topk" and self.max_pages > self.ranked_alone

    @cached_property
    def ranked_alone(self) -> int:
        """Pages of a row up to which one program ranks them."""
        return min(RANKED_ALONE, RANKED_REACHES // self.group_width)

    @cached_property
    def list_tile(self) -> int:
        """Pages that one of the programs that list those of a row looks at, but for `rest_tile`."""
        if self.selector == "topk" and not self.long_rows:
            return max(256, power_of_two(self.max_pages) >> (self.rest_tile > 0))
        tile = 1024 if self.max_pages <= 1 << 15 else 2048
        return min(tile, (1 << 16) // self.group_width)

    @cached_property
    def rest_tile(self) -> int:
        """Pages beyond a power of two of which a program that lists all those of a short row looks
        at as well, where they are few: room for the next power of two would be nearly twice."""
        if self.selector != "topk" or self.long_rows:
            return 0
        half = power_of_two(self.max_pages) // 2
        rest = max(256, power_of_two(self.max_pages - half))
        return rest if rest <= half // 4 else 0

    @cached_property
    def first_tiles(self) -> int:
        """Programs that score the first pages of a query head, a tile each."""
        return -(-self.first_pages // (self.tile // self.page_size))

    def certificate_tile(self, warps: int, parts: int) -> int:
        """Bounds that a program of so many warps, one of `parts` of a head, weighs first: of all
        pages, or four a thread, or eight of one that is alone."""
        most = (256 if parts == 1 else 128) * warps
        return min(power_of_two(-(-self.max_pages // parts)), most)

    def certificate_parts(self, warps: int) -> int:
        """Parts of a head that share the bounds of its pages: one of 32 a thread at most takes less
        time than to add up those of several."""
        return 1 if power_of_two(self.max_pages) <= 1024 * warps else self.value_parts

    @cached_property
    def most_members(self) -> int:
        """Pages about the last one of a budget that there is room for: more than a share that a
        sample leaves open."""
        return min(max(1024, power_of_two(self.max_pages) // 8), 1 << 14)

    @cached_property
    def list_tiles(self) -> int:
        return -(-self.max_pages // (self.list_tile + self.rest_tile))

    def fields(self, capacity: int) -> dict[str, tuple[torch.dtype, int]]:
        """Elements of each part of the workspace, with lists of `capacity` per split."""
        rows = self.batch * self.kv_heads
        heads = self.batch * self.query_heads
        lists = heads * self.splits
        page_own = rows * self.page_splits * self.group_width
        fields = {
            "sample": (torch.float32, heads * self.sample),
            "guess": (torch.float32, heads),
            "count": (torch.int32, rows * self.splits),
            "maximum": (torch.float32, lists * self.classes),
            "mass": (torch.float32, lists * self.classes),
            "slope": (torch.float32, lists * self.classes),
            "lower": (torch.float32, heads),
            "peak": (torch.float32, heads),
            "state": (torch.int32, heads),
            "words": (torch.int32, WORDS.value),
            "slot": (torch.int32, rows * self.splits * capacity),
            "score": (torch.float32, lists * capacity),
            "near_score": (torch.float32, heads * self.filter_parts * self.near),
            "near_slot": (torch.int32, heads * self.filter_parts * self.near),
            "near_count": (torch.int32, heads * self.filter_parts),
            "partial": (torch.float32, self.partials * self.head_size),
            "total": (torch.float32, self.partials),
            "support": (torch.int32, self.partials),
            "trial_mass": (
                torch.float32,
                2 * self.processors * self.padded_group * TRIALS.value,
            ),
        }
        if self.held > WHOLE.value:
            fields["near_place"] = torch.int32, heads * self.held
        if self.listed:
            fields |= {
                "listed": (torch.int32, rows * 2 * self.page_stride),
                "listed_count": (torch.int32, rows),
                "reach": (torch.float32, rows * self.group_width * self.page_stride),
                "distance": (torch.int32, rows * self.page_stride),
                "tile_count": (torch.int32, rows * power_of_two(self.list_tiles)),
            }
        if self.selector != "exact" and self.selector != "gaussian":
            fields["page_extreme"] = torch.float32, page_own * 2
        if self.certified or self.selector == "pruned":
            fields["span"] = torch.float32, rows * (self.page_splits + 1)
        if self.first_pages:
            first = heads * self.first_tiles * self.tile
            fields |= {
                "spread": (torch.float32, rows * self.group_width * self.page_stride),
                "first_page": (torch.int32, first // self.page_size),
                "first_score": (torch.float32, first),
                "first_reach": (torch.float32, first // self.page_size),
            }
        if self.selector == "topk":
            fields |= {
                "page_sample": (torch.float32, rows * self.group_width * SAMPLED.value),
                "bracket": (torch.int32, rows * 2),
                "members": (torch.int32, rows * 2 * self.most_members),
                "member_count": (torch.int32, rows),
            }
        if self.most_candidates:
            fields["candidates"] = torch.int32, rows * 3 * self.page_stride
        if self.certified:
            fields |= {
                "bound": (torch.float32, heads * self.page_stride),
                "unread_mass": (torch.int64, heads),
            }
        if self.selector == "gaussian":
            fields |= {
                "deviation": (torch.float32, heads * self.page_stride),
                "model": (torch.float32, page_own * 4),
                "cut": (torch.float32, heads * 2),
            }
        return fields

    def size(self, capacity: int) -> int:
        """Bytes of a workspace with lists of `capacity` per split."""
        sizes = (dtype.itemsize * count for dtype, count in self.fields(capacity).values())
        return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)

    @cached_property
    def least_size(self) -> int:
        return self.size(16)

    @cached_property
    def good_size(self) -> int:
        """Bytes with which failures of the lists are rare."""
        places = min(self.max_read, self.store_below)
        places += max(0, self.max_read - self.store_below) // CAPACITY_FRACTION
        tiles = -(-places // (self.splits * self.tile))
        return self.size(tiles * self.tile)

    def capacity(self, size: int) -> int:
        """Places in the list of each split that a workspace of `size` bytes allows."""
        return _capacity(self, size)

    def divide(self, workspace: Tensor, capacity: int) -> dict[str, Tensor]:
        """The parts of a workspace, by name."""
        views: dict[torch.dtype, Tensor] = {}
        parts = {}
        for name, dtype, start, count in _places(self, capacity):
            if dtype not in views:
                whole = len(workspace) // dtype.itemsize * dtype.itemsize
                views[dtype] = workspace[:whole].view(dtype)
            parts[name] = views[dtype][start : start + count]
        return parts


shape_of = lru_cache(maxsize=4096)(Shape)
"""The same object for the same arguments: what it knows is found out once, not by every step."""


@lru_cache(maxsize=4096)
def _capacity(shape: Shape, size: int) -> int:
    entry = 4 * shape.batch * (shape.kv_heads + shape.query_heads) * shape.splits
    # The parts are aligned: start with what they could have at most.
    spare = max(0, size - shape.least_size) + _ALIGNMENT * len(shape.fields(16))
    capacity = min(16 + spare // entry // 16 * 16, max(shape.tile, shape.most_capacity))
    while shape.size(capacity) > size:
        capacity -= 16
    return capacity


@lru_cache(maxsize=4096)
def _places(shape: Shape, capacity: int) -> tuple[tuple[str, torch.dtype, int, int], ...]:
    """Name, dtype, first element and number of elements of each part of a workspace."""
    places, start = [], 0
    for name, (dtype, count) in shape.fields(capacity).items():
        places.append((name, dtype, start // dtype.itemsize, count))
        start += -(-dtype.itemsize * count // _ALIGNMENT) * _ALIGNMENT
    return tuple(places)


def decode_workspace_size(
    batch: int,
    query_heads: int,
    kv_heads: int,
    head_size: int,
    page_size: int,
    dtype: torch.dtype,
    max_tokens: int,
    *,
    selector: Selector,
    exact_below: int = 0,
    certificate: bool = False,
    device: torch.device | str = "cuda",
    most: int | None = None,
) -> int:
    """Bytes of a workspace with which `decode` is fast, for batches of up to `batch` sequences.

    dtype: of the cache.
    max_tokens: columns of the block table times page_size. Less is enough for a right result, as
        long as `decode` does not refuse it; it then reads keys again more often.
    exact_below: as for `decode`.
    certificate: whether `decode` is asked for one.
    most: bytes to make do with, unless `decode` would refuse so few, or they were too few for the
        lists of a budget.
    """
    chip = processors(torch.device(device))
    heads = (query_heads, kv_heads, head_size, page_size)
    size = 0
    for rows in range(1, batch + 1):
        shape = Shape(rows, *heads, dtype, max_tokens, chip, selector.name)
        bounded = certificate and isinstance(selector, TopK | Adaptive)
        first = first_pages_of(selector, shape.max_pages, page_size)
        coded = selector.statistics == CODES
        shape = replace(shape, certified=bounded, first_pages=first, coded=coded)
        good = shape.good_size if most is None else min(shape.good_size, most)
        budgeted = replace(shape, budget=budget_of(selector, page_size, exact_below))
        size = max(size, good, shape.least_size, budgeted.good_size if budgeted.budget else 0)
    return size
