// Register tiles of attention: scores of a few queries against up to four pages, and the sum of values. A
// query's arithmetic is the same in every shape and from every source: dimensions, then slots, in order.
#pragma once

#include "../launch.h"
#include "simd.h"
#include "unrolled.h"

RIDGELINE_BEGIN

constexpr int kTilePages = 4;
constexpr int kTileSlots = kTilePages * kPageTokens;  // one step of the online softmax, anchored at slot 0

// Two vectors that belong together: a pair of dimensions of a query, or of the keys of 16 slots; or 32
// dimensions of a value.
struct FloatPair {
  vfloat even, odd;
};
RIDGELINE_INLINE FloatPair widen_pairs(vint pairs) {
  return {from_bits(shift_left<16>(pairs)), from_bits(bit_and(pairs, isplat(int32_t(0xffff0000u))))};
}
RIDGELINE_INLINE FloatPair splat_pair(const float* q, int pair) {
  return {splat(q[2 * pair]), splat(q[2 * pair + 1])};
}
RIDGELINE_INLINE vfloat add_product(vfloat sum, FloatPair x, FloatPair y) {
  return fma(x.odd, y.odd, fma(x.even, y.even, sum));
}
// The same in bfloat16.
RIDGELINE_INLINE vint splat_pair(const uint16_t* q, int pair) {
  int32_t two;
  std::memcpy(&two, q + 2 * pair, 4);
  return isplat(two);
}
RIDGELINE_INLINE vfloat add_product(vfloat sum, vint x, vint y) { return dot_bf16(sum, x, y); }

// Where a tile's keys and values come from. keys() gives one pair of dimensions of 16 slots. value_row() is where
// the values of a slot begin, those of the page's next slot being value_stride() further, and values() are 32 of
// them: from pages of bfloat16 the even ones and the odd ones, since they are widened so, elsewhere one half and
// the other. A factor that the whole of a slot's key or value has in common is left to scale_products() and
// scale_weights(), for the 16 slots of a page. Slots and pages count from the tile's start.
// fetch_keys() and fetch_values() bring nearer what keys() and values() will give: while one tile is computed the
// next one is fetched, line for line, as a core waits for some dozens of lines at once and no more.
struct Bf16Pages {
  const uint16_t* page[kTilePages];
  int head_dim;

  RIDGELINE_MEMBER void fetch_keys(int p, int pair) const { prefetch(page[p] + pair * kPageTokens * 2); }
  static RIDGELINE_MEMBER void fetch_values(const uint16_t* p) { prefetch(p); }

  RIDGELINE_MEMBER vint packed_keys(int p, int pair) const {
    return iload(reinterpret_cast<const uint8_t*>(page[p] + pair * kPageTokens * 2));
  }
  RIDGELINE_MEMBER FloatPair keys(int p, int pair) const { return widen_pairs(packed_keys(p, pair)); }
  RIDGELINE_MEMBER const uint16_t* value_row(int p, int slot) const {
    return page[p] + (kPageTokens + slot) * head_dim;
  }
  RIDGELINE_MEMBER int value_stride() const { return head_dim; }
  RIDGELINE_MEMBER vmask value_mask(int column) const { return first_lanes((head_dim - column) / 2); }
  static RIDGELINE_MEMBER vint packed_values(vmask m, const uint16_t* p) {
    return bits(load(m, reinterpret_cast<const float*>(p)));
  }
  static RIDGELINE_MEMBER FloatPair values(vmask m, const uint16_t* p) {
    return widen_pairs(packed_values(m, p));
  }
  RIDGELINE_MEMBER vfloat scale_products(int, vfloat products) const { return products; }
  RIDGELINE_MEMBER vfloat scale_weights(int, vfloat weights) const { return weights; }
};
struct TwoMasks {
  vmask even, odd;
};
struct F32Pages {
  const float* page[kTilePages];
  int head_dim;

  RIDGELINE_MEMBER void fetch_keys(int p, int pair) const { fetch_values(page[p] + 2 * pair * kPageTokens); }
  static RIDGELINE_MEMBER void fetch_values(const float* p) {
    prefetch(p);
    prefetch(p + 16);
  }

  RIDGELINE_MEMBER FloatPair keys(int p, int pair) const {
    return {load(page[p] + 2 * pair * kPageTokens), load(page[p] + (2 * pair + 1) * kPageTokens)};
  }
  RIDGELINE_MEMBER const float* value_row(int p, int slot) const {
    return page[p] + (kPageTokens + slot) * head_dim;
  }
  RIDGELINE_MEMBER int value_stride() const { return head_dim; }
  RIDGELINE_MEMBER TwoMasks value_mask(int column) const {
    return {first_lanes(head_dim - column), first_lanes(head_dim - column - 16)};
  }
  static RIDGELINE_MEMBER FloatPair values(const TwoMasks& m, const float* p) {
    return {load(m.even, p), load(m.odd, p + 16)};
  }
  RIDGELINE_MEMBER vfloat scale_products(int, vfloat products) const { return products; }
  RIDGELINE_MEMBER vfloat scale_weights(int, vfloat weights) const { return weights; }
};
// A page's scales lie behind its codes, so that all 32 bytes may be read wherever a value begins.
struct Int8Pages {
  const uint8_t* page[kTilePages];
  int head_dim;

  RIDGELINE_MEMBER void fetch_keys(int p, int pair) const { prefetch(page[p] + 2 * pair * kPageTokens); }
  static RIDGELINE_MEMBER void fetch_values(const uint8_t* p) { prefetch(p); }

  RIDGELINE_MEMBER FloatPair keys(int p, int pair) const {
    const uint8_t* k = page[p] + 2 * pair * kPageTokens;
    return {to_float(load_signed_bytes(k)), to_float(load_signed_bytes(k + kPageTokens))};
  }
  RIDGELINE_MEMBER const uint8_t* value_row(int p, int slot) const {
    return page[p] + (kPageTokens + slot) * head_dim;
  }
  RIDGELINE_MEMBER int value_stride() const { return head_dim; }
  RIDGELINE_MEMBER TwoMasks value_mask(int column) const {
    return {first_lanes(head_dim - column), first_lanes(head_dim - column - 16)};
  }
  static RIDGELINE_MEMBER FloatPair values(const TwoMasks& m, const uint8_t* p) {
    return {select(m.even, to_float(load_signed_bytes(p)), zero()),
            select(m.odd, to_float(load_signed_bytes(p + 16)), zero())};
  }
  RIDGELINE_MEMBER vfloat scale_products(int p, vfloat products) const { return products * load(scales(p)); }
  RIDGELINE_MEMBER vfloat scale_weights(int p, vfloat weights) const {
    return weights * load(scales(p) + kPageTokens);
  }
  RIDGELINE_MEMBER const float* scales(int p) const {
    return reinterpret_cast<const float*>(page[p] + page_values(head_dim));
  }
};
// Whether the values of a pool come as even and odd dimensions.
RIDGELINE_INLINE constexpr bool values_by_pairs(KvFormat format) { return format == KvFormat::bf16; }

// A tile widened to float32 for many queries: its keys [head_dim][kTileSlots], and then its values [kTileSlots][stride]
// in the same place.
struct Widened {
  float* rows;
  int stride;

  RIDGELINE_MEMBER FloatPair keys(int p, int pair) const {
    const float* row = rows + 2 * pair * kTileSlots + p * kPageTokens;
    return {load(row), load(row + kTileSlots)};
  }
  RIDGELINE_MEMBER const float* value_row(int p, int slot) const {
    return rows + (p * kPageTokens + slot) * stride;
  }
  RIDGELINE_MEMBER int value_stride() const { return stride; }
  RIDGELINE_MEMBER bool value_mask(int) const { return true; }
  static RIDGELINE_MEMBER FloatPair values(bool, const float* p) { return {load(p), load(p + 16)}; }
};

// Instead of a tile to fetch.
struct Nothing {
  static RIDGELINE_MEMBER void fetch_keys(int, int) {}
  static RIDGELINE_MEMBER int value_row(int, int) { return 0; }
  static RIDGELINE_MEMBER int value_stride() { return 0; }
  static RIDGELINE_MEMBER void fetch_values(int) {}
  static RIDGELINE_MEMBER int pair_row(int) { return 0; }
  static RIDGELINE_MEMBER int pair_stride() { return 0; }
  static RIDGELINE_MEMBER void fetch_pair(int) {}
};

// Weights in bfloat16 lie where the scores were, from one query's to the next one's so many apart.
constexpr int kWeightStride = 2 * kTileSlots;

struct PageRange {
  int begin, end;  // of a tile
};
struct SlotRange {
  int begin, end;
};

// Keys as they lie in their pages, for queries in bfloat16.
struct PackedKeys {
  const Bf16Pages& pages;

  RIDGELINE_MEMBER vint keys(int p, int pair) const { return pages.packed_keys(p, pair); }
};

// out[query][slot] = q . k; rows of out are kTileSlots apart. The keys in these places of `next` are fetched.
template <int kQueries, int kPages, class Source, class Next, class Value>
static void score_tile(const Source& source, const Next& next, int first_page, const Value* const* q,
                       int head_dim, float* out) {
  if (head_dim < 2) __builtin_unreachable();  // keeps the accumulators out of memory
  vfloat acc[kQueries][kPages];
  for (int i = 0; i < kQueries; ++i) {
    for (int p = 0; p < kPages; ++p) acc[i][p] = zero();
  }
  for (int pair = 0; pair < head_dim / 2; ++pair) {
    decltype(source.keys(0, 0)) keys[kPages];
    for (int p = 0; p < kPages; ++p) {
      keys[p] = source.keys(first_page + p, pair);
      next.fetch_keys(first_page + p, pair);
    }
    for (int i = 0; i < kQueries; ++i) {
      const auto x = splat_pair(q[i], pair);
      for (int p = 0; p < kPages; ++p) acc[i][p] = add_product(acc[i][p], x, keys[p]);
    }
  }
  for (int i = 0; i < kQueries; ++i) {
    for (int p = 0; p < kPages; ++p) store(out + i * kTileSlots + (first_page + p) * kPageTokens, acc[i][p]);
  }
}

// Where the values of a slot begin, from those of the slot before.
template <class Source, class Row>
RIDGELINE_INLINE Row next_value_row(const Source& source, unsigned slot, Row row) {
  return slot % kPageTokens == 0 ? source.value_row(int(slot / kPageTokens), 0) : row + source.value_stride();
}

// out[query] = out[query] * decay[query] + sum over slots of p[query][slot] * value[slot], for 32 * kPairs
// dimensions from `column`. There is at least one slot. The values in these places of `next` are fetched.
template <int kQueries, int kPairs, class Source, class Next>
static void value_tile(const Source& source, const Next& next, SlotRange slots, int column, const float* p,
                       const float* decay, float* out, int stride) {
  if (slots.begin >= slots.end) __builtin_unreachable();  // keeps the accumulators out of memory
  vfloat acc[kQueries][2 * kPairs];
  for (int i = 0; i < kQueries; ++i) {
    for (int v = 0; v < 2 * kPairs; ++v)
      acc[i][v] = load(out + i * stride + column + 16 * v) * splat(decay[i]);
  }
  decltype(source.value_mask(0)) mask[kPairs];
  for (int v = 0; v < kPairs; ++v) mask[v] = source.value_mask(column + 32 * v);
  const auto* row = source.value_row(slots.begin / kPageTokens, slots.begin % kPageTokens);
  auto fetched = next.value_row(slots.begin / kPageTokens, slots.begin % kPageTokens);
  for (int slot = slots.begin; slot < slots.end;) {
    for (int v = 0; v < kPairs; ++v) {
      Next::fetch_values(fetched + column + 32 * v);
      const FloatPair x = Source::values(mask[v], row + column + 32 * v);
      for (int i = 0; i < kQueries; ++i) {
        const vfloat weight = splat(p[i * kTileSlots + slot]);
        acc[i][2 * v] = fma(weight, x.even, acc[i][2 * v]);
        acc[i][2 * v + 1] = fma(weight, x.odd, acc[i][2 * v + 1]);
      }
    }
    ++slot;
    row = next_value_row(source, unsigned(slot), row);
    fetched = next_value_row(next, unsigned(slot), fetched);
  }
  for (int i = 0; i < kQueries; ++i) {
    for (int v = 0; v < 2 * kPairs; ++v) store(out + i * stride + column + 16 * v, acc[i][v]);
  }
}

// The values of two neighbouring slots, of which the first is even, for weights in bfloat16: a lane holds a
// dimension of both. `even` has the even ones of 32 dimensions, `odd` the odd ones.
struct SlotPair {
  vint even, odd;
};
RIDGELINE_INLINE SlotPair pair_slots(vint first, vint second) {
  return {bit_or(bit_and(first, isplat(0xffff)), shift_left<16>(second)),
          bit_or(shift_right<16>(first), bit_and(second, isplat(int32_t(0xffff0000u))))};
}

// Values in their pages, of some slots of a tile; those of other slots are zeros and not read. A pair's values
// begin at pair_row(), those of the page's next pair being pair_stride() further.
struct PairsInPages {
  const Bf16Pages& pages;
  SlotRange slots;

  RIDGELINE_MEMBER const uint16_t* pair_row(int slot) const {
    return pages.value_row(slot / kPageTokens, slot % kPageTokens);
  }
  RIDGELINE_MEMBER int pair_stride() const { return 2 * pages.head_dim; }
  RIDGELINE_MEMBER void fetch_pair(const uint16_t* p) const {
    prefetch(p);
    prefetch(p + pages.head_dim);
  }
  RIDGELINE_MEMBER vmask value_mask(int column) const { return pages.value_mask(column); }
  RIDGELINE_MEMBER SlotPair pair(int slot, vmask m, const uint16_t* p) const {
    const vint first = slot >= slots.begin ? pages.packed_values(m, p) : izero();
    return pair_slots(first, slot + 1 < slots.end ? pages.packed_values(m, p + pages.head_dim) : izero());
  }
};
// The same, written out for many queries: [slot / 2][stride], 32 dimensions as the even ones and the odd ones.
struct PackedPairs {
  int32_t* rows;
  int stride;

  RIDGELINE_MEMBER int32_t* pair_row(int slot) const { return rows + slot / 2 * stride; }
  RIDGELINE_MEMBER int pair_stride() const { return stride; }
  RIDGELINE_MEMBER bool value_mask(int) const { return true; }
  RIDGELINE_MEMBER SlotPair pair(int, bool, const int32_t* p) const { return {iload(p), iload(p + 16)}; }
};
template <class Pairs, class Row>
RIDGELINE_INLINE Row next_pair_row(const Pairs& pairs, unsigned slot, Row row) {
  return slot % kPageTokens == 0 ? pairs.pair_row(int(slot)) : row + pairs.pair_stride();
}

// value_tile for weights in bfloat16: slots are added two by two, each with the neighbour that it has at any
// length; the weight of a slot outside of `slots` is zero, or its value is.
template <int kQueries, int kPairs, class Pairs, class Next>
static void value_tile(const Pairs& pairs, const Next& next, SlotRange slots, int column, const uint16_t* p,
                       const float* decay, float* out, int stride) {
  if (slots.begin >= slots.end) __builtin_unreachable();  // keeps the accumulators out of memory
  vfloat acc[kQueries][2 * kPairs];
  for (int i = 0; i < kQueries; ++i) {
    for (int v = 0; v < 2 * kPairs; ++v)
      acc[i][v] = load(out + i * stride + column + 16 * v) * splat(decay[i]);
  }
  decltype(pairs.value_mask(0)) mask[kPairs];
  for (int v = 0; v < kPairs; ++v) mask[v] = pairs.value_mask(column + 32 * v);
  int slot = slots.begin / 2 * 2;
  auto row = pairs.pair_row(slot);
  auto fetched = next.pair_row(slot);
  while (slot < slots.end) {
    for (int v = 0; v < kPairs; ++v) {
      next.fetch_pair(fetched + column + 32 * v);
      const SlotPair x = pairs.pair(slot, mask[v], row + column + 32 * v);
      for (int i = 0; i < kQueries; ++i) {
        const vint weights = splat_pair(p + i * kWeightStride, slot / 2);
        acc[i][2 * v] = dot_bf16(acc[i][2 * v], weights, x.even);
        acc[i][2 * v + 1] = dot_bf16(acc[i][2 * v + 1], weights, x.odd);
      }
    }
    slot += 2;
    row = next_pair_row(pairs, unsigned(slot), row);
    fetched = next_pair_row(next, unsigned(slot), fetched);
  }
  for (int i = 0; i < kQueries; ++i) {
    for (int v = 0; v < 2 * kPairs; ++v) store(out + i * stride + column + 16 * v, acc[i][v]);
  }
}

template <int kQueries, class Source, class Next, class Value>
RIDGELINE_INLINE void score(const Source& source, const Next& next, PageRange pages, const Value* const* q,
                            int head_dim, float* out) {
  switch (pages.end - pages.begin) {
    case 1: return score_tile<kQueries, 1>(source, next, pages.begin, q, head_dim, out);
    case 2: return score_tile<kQueries, 2>(source, next, pages.begin, q, head_dim, out);
    case 3: return score_tile<kQueries, 3>(source, next, pages.begin, q, head_dim, out);
    default: return score_tile<kQueries, 4>(source, next, pages.begin, q, head_dim, out);
  }
}

template <int kQueries, class Source, class Next, class Weight>
RIDGELINE_INLINE void add_values(const Source& source, const Next& next, SlotRange slots, const Weight* p,
                                 const float* decay, float* out, int stride) {
  int column = 0;
  for (; column + 64 <= stride; column += 64)
    value_tile<kQueries, 2>(source, next, slots, column, p, decay, out, stride);
  if (column < stride) value_tile<kQueries, 1>(source, next, slots, column, p, decay, out, stride);
}

// Calls f(std::integral_constant<int, n>, first) for runs of n queries that are together `queries`; n is at most
// kMaxQueries.
template <class F>
RIDGELINE_INLINE void by_queries(int queries, const F& f) {
  int i = 0;
  for (; i + kMaxQueries <= queries; i += kMaxQueries) f(std::integral_constant<int, kMaxQueries>{}, i);
  unrolled<kMaxQueries - 1>([&](auto index) RIDGELINE_INLINED {
    if (queries - i == index + 1) f(std::integral_constant<int, index + 1>{}, i);
  });
}

RIDGELINE_END
