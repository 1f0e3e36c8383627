"""Which of a row's tokens are candidates: their order, and the search for the last that is kept.

Tokens are ranked by one whole number: larger for a larger logit, and among equals for a smaller id. It is
unique to a token, so that a filter which keeps the most probable ones comes down to a lowest rank, the
floor. Nothing is sorted.

A first pass over the row deals its tokens to lanes, and each lane holds on to its two best: the hand. Few
lanes have three of the row's best hundred, hence floors are sought in the hand first. Where the hand
does not hold all that may be kept (`cover` is the rank from which it does), the search goes on over the
row, between the bounds that the hand gave.

Weights are the exponentials of the device, and their sums in float64 go by lanes. A token whose cumulated
probability is p but for the rounding of those may therefore fall on the other side than in NumPy.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_VOCABULARY = 2**18

LAST_ID = tl.constexpr(MAX_VOCABULARY - 1)
_ID_BITS = tl.constexpr(18)
_SIGN = tl.constexpr(2**31)
_MAGNITUDE = tl.constexpr(2**31 - 1)
_MANY = tl.constexpr(2**30)


@triton.jit
def lowest_rank(x):
    """The rank, int64, that every token with a logit of x or more reaches, and no other."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # both zeros are one
    key = tl.where(bits < 0, bits ^ _MAGNITUDE, bits)  # in the order of the numbers
    return (key.to(tl.int64) + _SIGN) << _ID_BITS


@triton.jit
def rank_of(x, ids):
    return lowest_rank(x) + LAST_ID - ids


@triton.jit
def logit_of(rank):
    """The logit of a token of that rank."""
    key = ((rank >> _ID_BITS) - _SIGN).to(tl.int32)
    return tl.where(key < 0, key ^ _MAGNITUDE, key).to(tl.float32, bitcast=True)


@triton.jit
def id_of(rank):
    """The id, int32, of the token of that rank."""
    return (-(rank & LAST_ID) + LAST_ID).to(tl.int32)


@triton.jit
def _weight(x, best):
    return tl.exp(x - best)


@triton.jit
def load_logits(row, temperature, ids, VOCABULARY: tl.constexpr):
    """Logits over the temperature; −inf where there is no such token."""
    x = tl.load(row + ids, mask=ids < VOCABULARY, other=-float("inf"))
    if temperature != 1.0:
        x = tl.div_rn(x, tl.full(x.shape, 0.0, tl.float32) + temperature)
    return x


@triton.jit
def survey(row, temperature, VOCABULARY: tl.constexpr, LANES: tl.constexpr):
    """The hand: ranks of the two best tokens of each lane, (LANES,), −1 where it has too few above −inf.

    Also the best of the lanes' third logits, and whether any logit is NaN. Tokens come in ascending order,
    hence only a larger one takes the place of another.
    """
    lanes = tl.arange(0, LANES)
    first = tl.full((LANES,), -float("inf"), tl.float32)
    second, third = first, first
    first_id = tl.full((LANES,), -1, tl.int32)
    second_id = first_id
    nan = tl.zeros((LANES,), tl.int32)
    for begin in range(0, VOCABULARY, LANES):
        ids = begin + lanes
        x = load_logits(row, temperature, ids, VOCABULARY)
        nan |= (x != x).to(tl.int32)
        leads, follows = x > first, x > second
        third = tl.maximum(third, tl.minimum(second, x))
        second_id = tl.where(leads, first_id, tl.where(follows, ids, second_id))
        second = tl.where(leads, first, tl.where(follows, x, second))
        first_id = tl.where(leads, ids, first_id)
        first = tl.where(leads, x, first)
    first_rank = tl.where(first_id >= 0, rank_of(first, first_id), -1)
    second_rank = tl.where(second_id >= 0, rank_of(second, second_id), -1)
    return first_rank, second_rank, tl.max(third, axis=0), tl.max(nan, axis=0)


@triton.jit
def _reach(ranks, weights, pivot):
    """How much weight, float64, and how many tokens reach a rank, by lane."""
    reached = ranks >= pivot
    return tl.where(reached, weights, 0.0).to(tl.float64), reached.to(tl.int32)


@triton.jit
def _reach_in_hand(first, second, first_weight, second_weight, pivot):
    mass_1, count_1 = _reach(first, first_weight, pivot)
    mass_2, count_2 = _reach(second, second_weight, pivot)
    return mass_1 + mass_2, count_1 + count_2


@triton.jit
def _reach_in_row(row, temperature, best, a, b, c, VOCABULARY: tl.constexpr, LANES: tl.constexpr):
    """`_reach` of three ranks over the whole row."""
    lanes = tl.arange(0, LANES)
    mass_a = tl.zeros((LANES,), tl.float64)
    mass_b, mass_c = mass_a, mass_a
    count_a = tl.zeros((LANES,), tl.int32)
    count_b, count_c = count_a, count_a
    for begin in range(0, VOCABULARY, LANES):
        ids = begin + lanes
        x = load_logits(row, temperature, ids, VOCABULARY)
        ranks = tl.where(ids < VOCABULARY, rank_of(x, ids), -1)
        weights = _weight(x, best)
        mass, count = _reach(ranks, weights, a)
        mass_a, count_a = mass_a + mass, count_a + count
        mass, count = _reach(ranks, weights, b)
        mass_b, count_b = mass_b + mass, count_b + count
        mass, count = _reach(ranks, weights, c)
        mass_c, count_c = mass_c + mass, count_c + count
    return mass_a, count_a, mass_b, count_b, mass_c, count_c


@triton.jit
def mass_of_hand(first, second, best, floor):
    """The weight, float64, of all that reach the floor, if all of them are in the hand."""
    first_weight, second_weight = _weight(logit_of(first), best), _weight(logit_of(second), best)
    return tl.sum(_reach_in_hand(first, second, first_weight, second_weight, floor)[0], axis=0)


@triton.jit
def mass_of_row(row, temperature, best, floor, VOCABULARY: tl.constexpr, LANES: tl.constexpr):
    """The same over the whole row."""
    return tl.sum(_reach_in_row(row, temperature, best, floor, floor, floor, VOCABULARY, LANES)[0], axis=0)


@triton.jit
def _closer(pivot, mass, count, low, high, held, beyond, enough, BY_MASS: tl.constexpr):
    """The bounds of a search after one more pivot."""
    mass_held, held_here = tl.sum(mass, axis=0), tl.sum(count, axis=0)
    suffices = mass_held >= enough if BY_MASS else held_here >= enough
    rises, falls = suffices & (pivot > low), (not suffices) & (pivot < high)
    low, held = tl.where(rises, pivot, low), tl.where(rises, held_here, held)
    high, beyond = tl.where(falls, pivot, high), tl.where(falls, held_here, beyond)
    return low, high, held, beyond


@triton.jit
def _search(
    row,
    temperature,
    best,
    first,
    second,
    low,
    high,
    enough,
    VOCABULARY: tl.constexpr,
    LANES: tl.constexpr,
    BY_MASS: tl.constexpr,
    IN_HAND: tl.constexpr,
):
    """The largest rank from `low` on that tokens of weight `enough`, or that many, reach.

    Or a smaller one that the same tokens reach; or `low`, if it is not known that enough reach it. `high`
    must not be reached by enough. `held` and `beyond`, once known, are the numbers of tokens that reach
    low and high: with one token between the two, or the right number above, the search is over.
    """
    first_weight, second_weight = _weight(logit_of(first), best), _weight(logit_of(second), best)
    held = tl.full((), _MANY, tl.int32)
    beyond = tl.full((), 0, tl.int32)
    searching = high - low > 1
    while searching:
        step = (high - low + 3) // 4
        a, b, c = low + step, low + 2 * step, low + 3 * step
        if IN_HAND:
            mass_a, count_a = _reach_in_hand(first, second, first_weight, second_weight, a)
            mass_b, count_b = _reach_in_hand(first, second, first_weight, second_weight, b)
            mass_c, count_c = _reach_in_hand(first, second, first_weight, second_weight, c)
        else:
            mass_a, count_a, mass_b, count_b, mass_c, count_c = _reach_in_row(
                row, temperature, best, a, b, c, VOCABULARY, LANES
            )
        low, high, held, beyond = _closer(a, mass_a, count_a, low, high, held, beyond, enough, BY_MASS)
        low, high, held, beyond = _closer(b, mass_b, count_b, low, high, held, beyond, enough, BY_MASS)
        low, high, held, beyond = _closer(c, mass_c, count_c, low, high, held, beyond, enough, BY_MASS)
        searching = (high - low > 1) & (held - beyond > 1)
        if not BY_MASS:
            searching = searching & (held != enough)
    return low


@triton.jit
def raised(
    row,
    temperature,
    best,
    first,
    second,
    floor,
    cover,
    peak,
    enough,
    VOCABULARY: tl.constexpr,
    LANES: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """The floor above which `enough` is kept, of what reaches `floor`.

    The hand never holds more than the row: what suffices in the hand suffices in the row, and if the last
    token that it takes lies under `cover`, then nothing from there on suffices.
    """
    low = _search(
        row, temperature, best, first, second, floor, peak, enough, VOCABULARY, LANES, BY_MASS, True
    )
    if low > floor:
        last_first = tl.min(tl.where(first >= low, first, peak), axis=0)
        low = tl.minimum(last_first, tl.min(tl.where(second >= low, second, peak), axis=0))
    if low < cover:
        low = _search(
            row, temperature, best, first, second, low, cover, enough, VOCABULARY, LANES, BY_MASS, False
        )
    return low
