// Register tiles of attention: scores of a few queries against up to four pages, and the sum of values. A
// query's arithmetic is the same in every shape and from every source: dimensions, then slots, in order.
#pragma once

#include "../launch.h"
#include "simd.h"

RIDGELINE_BEGIN

constexpr int kTilePages = 4;
constexpr int kTileSlots = kTilePages * kPageTokens;  // one step of the online softmax, anchored at slot 0

// Where a tile's keys and values come from. keys() gives one pair of dimensions of 16 slots, value() 16
// dimensions of a slot; slots and pages count from the tile's start. A factor that the whole of a slot's key
// or value has in common is left to scale_products() and scale_weights(), for the 16 slots of a page.
struct Bf16Pages {
  const uint16_t* page[kTilePages];
  int head_dim;

  RIDGELINE_MEMBER void keys(int p, int pair, vfloat& even, vfloat& odd) const {
    load_bf16_pairs(page[p] + pair * kPageTokens * 2, even, odd);
  }
  RIDGELINE_MEMBER vfloat value(int slot, int column, vmask m) const {
    return load_bf16(m, page[slot / kPageTokens] + (kPageTokens + slot % kPageTokens) * head_dim + column);
  }
  RIDGELINE_MEMBER vfloat scale_products(int, vfloat products) const { return products; }
  RIDGELINE_MEMBER vfloat scale_weights(int, vfloat weights) const { return weights; }
};
struct F32Pages {
  const float* page[kTilePages];
  int head_dim;

  RIDGELINE_MEMBER void keys(int p, int pair, vfloat& even, vfloat& odd) const {
    even = load(page[p] + 2 * pair * kPageTokens);
    odd = load(page[p] + (2 * pair + 1) * kPageTokens);
  }
  RIDGELINE_MEMBER vfloat value(int slot, int column, vmask m) const {
    return load(m, page[slot / kPageTokens] + (kPageTokens + slot % kPageTokens) * head_dim + column);
  }
  RIDGELINE_MEMBER vfloat scale_products(int, vfloat products) const { return products; }
  RIDGELINE_MEMBER vfloat scale_weights(int, vfloat weights) const { return weights; }
};
// Beyond a head's end, a value's lanes hold other codes, which nobody reads.
struct Int8Pages {
  const uint8_t* page[kTilePages];
  int head_dim;

  RIDGELINE_MEMBER void keys(int p, int pair, vfloat& even, vfloat& odd) const {
    even = to_float(load_signed_bytes(page[p] + 2 * pair * kPageTokens));
    odd = to_float(load_signed_bytes(page[p] + (2 * pair + 1) * kPageTokens));
  }
  RIDGELINE_MEMBER vfloat value(int slot, int column, vmask) const {
    const int row = kPageTokens + slot % kPageTokens;
    return to_float(load_signed_bytes(page[slot / kPageTokens] + row * head_dim + column));
  }
  RIDGELINE_MEMBER vfloat scale_products(int p, vfloat products) const { return products * load(scales(p)); }
  RIDGELINE_MEMBER vfloat scale_weights(int p, vfloat weights) const {
    return weights * load(scales(p) + kPageTokens);
  }
  RIDGELINE_MEMBER const float* scales(int p) const {
    return reinterpret_cast<const float*>(page[p] + page_values(head_dim));
  }
};
// A tile widened to float32 for many queries: keys [head_dim][kTileSlots], values [kTileSlots][stride].
struct Widened {
  float *key_rows, *value_rows;
  int stride;

  RIDGELINE_MEMBER void keys(int p, int pair, vfloat& even, vfloat& odd) const {
    even = load(key_rows + 2 * pair * kTileSlots + p * kPageTokens);
    odd = load(key_rows + (2 * pair + 1) * kTileSlots + p * kPageTokens);
  }
  RIDGELINE_MEMBER vfloat value(int slot, int column, vmask) const {
    return load(value_rows + slot * stride + column);
  }
};

struct PageRange {
  int begin, end;  // of a tile
};
struct SlotRange {
  int begin, end;
};

// out[query][slot] = q . k; rows of out are kTileSlots apart.
template <int kQueries, int kPages, class Source>
static void score_tile(const Source& source, int first_page, const float* const* q, int head_dim,
                       float* out) {
  vfloat acc[kQueries][kPages];
  for (int i = 0; i < kQueries; ++i) {
    for (int p = 0; p < kPages; ++p) acc[i][p] = zero();
  }
  for (int pair = 0; pair < head_dim / 2; ++pair) {
    vfloat even[kPages], odd[kPages];
    for (int p = 0; p < kPages; ++p) source.keys(first_page + p, pair, even[p], odd[p]);
    for (int i = 0; i < kQueries; ++i) {
      const vfloat x = splat(q[i][2 * pair]), y = splat(q[i][2 * pair + 1]);
      for (int p = 0; p < kPages; ++p) acc[i][p] = fma(x, even[p], acc[i][p]);
      for (int p = 0; p < kPages; ++p) acc[i][p] = fma(y, odd[p], acc[i][p]);
    }
  }
  for (int i = 0; i < kQueries; ++i) {
    for (int p = 0; p < kPages; ++p) store(out + i * kTileSlots + (first_page + p) * kPageTokens, acc[i][p]);
  }
}

// out[query] = out[query] * decay[query] + sum over slots of p[query][slot] * value[slot], for 16 * kVectors
// dimensions from `column`.
template <int kQueries, int kVectors, class Source>
static void value_tile(const Source& source, SlotRange slots, int column, int head_dim, const float* p,
                       const float* decay, float* out, int stride) {
  vfloat acc[kQueries][kVectors];
  vmask mask[kVectors];
  for (int v = 0; v < kVectors; ++v) mask[v] = first_lanes(head_dim - column - 16 * v);
  for (int i = 0; i < kQueries; ++i) {
    for (int v = 0; v < kVectors; ++v) acc[i][v] = load(out + i * stride + column + 16 * v) * splat(decay[i]);
  }
  for (int slot = slots.begin; slot < slots.end; ++slot) {
    vfloat x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = source.value(slot, column + 16 * v, mask[v]);
    for (int i = 0; i < kQueries; ++i) {
      const vfloat weight = splat(p[i * kTileSlots + slot]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(weight, x[v], acc[i][v]);
    }
  }
  for (int i = 0; i < kQueries; ++i) {
    for (int v = 0; v < kVectors; ++v) store(out + i * stride + column + 16 * v, acc[i][v]);
  }
}

template <int kQueries, class Source>
RIDGELINE_INLINE void score_pages(const Source& source, PageRange pages, const float* const* q, int head_dim,
                                  float* out) {
  switch (pages.end - pages.begin) {
    case 1: return score_tile<kQueries, 1>(source, pages.begin, q, head_dim, out);
    case 2: return score_tile<kQueries, 2>(source, pages.begin, q, head_dim, out);
    case 3: return score_tile<kQueries, 3>(source, pages.begin, q, head_dim, out);
    default: return score_tile<kQueries, 4>(source, pages.begin, q, head_dim, out);
  }
}

template <int kQueries, class Source>
RIDGELINE_INLINE void value_columns(const Source& source, SlotRange slots, int head_dim, const float* p,
                                    const float* decay, float* out, int stride) {
  int column = 0;
  for (; column + 64 <= stride; column += 64) {
    value_tile<kQueries, 4>(source, slots, column, head_dim, p, decay, out, stride);
  }
  for (; column < stride; column += 16) {
    value_tile<kQueries, 1>(source, slots, column, head_dim, p, decay, out, stride);
  }
}

// The same for any number of queries, up to kMaxQueries at a time.
template <class Source>
RIDGELINE_INLINE void score(const Source& source, PageRange pages, const float* const* q, int queries,
                            int head_dim, float* out) {
  int i = 0;
  for (; i + kMaxQueries <= queries; i += kMaxQueries) {
    score_pages<kMaxQueries>(source, pages, q + i, head_dim, out + i * kTileSlots);
  }
  if constexpr (kMaxQueries > 1) {
    switch (queries - i) {
      case 1: return score_pages<1>(source, pages, q + i, head_dim, out + i * kTileSlots);
      case 2: return score_pages<2>(source, pages, q + i, head_dim, out + i * kTileSlots);
      case 3: return score_pages<3>(source, pages, q + i, head_dim, out + i * kTileSlots);
      default: return;
    }
  }
}

template <class Source>
RIDGELINE_INLINE void add_values(const Source& source, SlotRange slots, int queries, int head_dim,
                                 const float* p, const float* decay, float* out, int stride) {
  int i = 0;
  for (; i + kMaxQueries <= queries; i += kMaxQueries) {
    value_columns<kMaxQueries>(source, slots, head_dim, p + i * kTileSlots, decay + i, out + i * stride,
                               stride);
  }
  if constexpr (kMaxQueries > 1) {
    p += i * kTileSlots;
    out += i * stride;
    switch (queries - i) {
      case 1: return value_columns<1>(source, slots, head_dim, p, decay + i, out, stride);
      case 2: return value_columns<2>(source, slots, head_dim, p, decay + i, out, stride);
      case 3: return value_columns<3>(source, slots, head_dim, p, decay + i, out, stride);
      default: return;
    }
  }
}

RIDGELINE_END
