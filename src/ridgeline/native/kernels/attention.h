// Register tiles of attention: scores of a few queries against up to four pages, and the sum of values.
// A query's arithmetic is the same in every tile shape: dimensions in order, then slots in order.
#pragma once

#include "../launch.h"
#include "simd.h"

RIDGELINE_BEGIN

constexpr int kTilePages = 4;
constexpr int kTileSlots = kTilePages * kPageTokens;  // one step of the online softmax, anchored at slot 0

// out[query][slot] = q . k; keys are [head_dim][kTileSlots] floats, out rows are kTileSlots apart.
template <int kQueries, int kPages>
static void score_tile(const float* const* q, const float* keys, int head_dim, float* out) {
  vfloat acc[kQueries][kPages];
  for (int i = 0; i < kQueries; ++i) {
    for (int p = 0; p < kPages; ++p) acc[i][p] = zero();
  }
  for (int d = 0; d < head_dim; ++d, keys += kTileSlots) {
    vfloat k[kPages];
    for (int p = 0; p < kPages; ++p) k[p] = load(keys + p * kPageTokens);
    for (int i = 0; i < kQueries; ++i) {
      const vfloat x = splat(q[i][d]);
      for (int p = 0; p < kPages; ++p) acc[i][p] = fma(x, k[p], acc[i][p]);
    }
  }
  for (int i = 0; i < kQueries; ++i) {
    for (int p = 0; p < kPages; ++p) store(out + i * kTileSlots + p * kPageTokens, acc[i][p]);
  }
}

// out[query] = out[query] * decay[query] + sum over slots of p[query][slot] * v[slot], 16 * kVectors dimensions.
template <int kQueries, int kVectors>
static void value_tile(const float* p, const float* values, int value_stride, int slots, const float* decay,
                       float* out) {
  vfloat acc[kQueries][kVectors];
  for (int i = 0; i < kQueries; ++i) {
    for (int v = 0; v < kVectors; ++v) acc[i][v] = load(out + i * value_stride + 16 * v) * splat(decay[i]);
  }
  for (int slot = 0; slot < slots; ++slot, values += value_stride) {
    vfloat x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(values + 16 * v);
    for (int i = 0; i < kQueries; ++i) {
      const vfloat weight = splat(p[i * kTileSlots + slot]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(weight, x[v], acc[i][v]);
    }
  }
  for (int i = 0; i < kQueries; ++i) {
    for (int v = 0; v < kVectors; ++v) store(out + i * value_stride + 16 * v, acc[i][v]);
  }
}

template <int kQueries>
RIDGELINE_INLINE void score_pages(const float* const* q, const float* keys, int head_dim, int pages, float* out) {
  switch (pages) {
    case 1: return score_tile<kQueries, 1>(q, keys, head_dim, out);
    case 2: return score_tile<kQueries, 2>(q, keys, head_dim, out);
    case 3: return score_tile<kQueries, 3>(q, keys, head_dim, out);
    default: return score_tile<kQueries, 4>(q, keys, head_dim, out);
  }
}

template <int kQueries>
RIDGELINE_INLINE void value_columns(const float* p, const float* values, int value_stride, int slots,
                                    const float* decay, float* out) {
  int column = 0;
  for (; column + 64 <= value_stride; column += 64) {
    value_tile<kQueries, 4>(p, values + column, value_stride, slots, decay, out + column);
  }
  for (; column < value_stride; column += 16) {
    value_tile<kQueries, 1>(p, values + column, value_stride, slots, decay, out + column);
  }
}

// The same for any number of queries, up to kMaxQueries at a time.
RIDGELINE_INLINE void score(const float* const* q, int queries, const float* keys, int head_dim, int pages, float* out) {
  int i = 0;
  for (; i + kMaxQueries <= queries; i += kMaxQueries) {
    score_pages<kMaxQueries>(q + i, keys, head_dim, pages, out + i * kTileSlots);
  }
  switch (queries - i) {
    case 1: return score_pages<1>(q + i, keys, head_dim, pages, out + i * kTileSlots);
    case 2: return score_pages<2>(q + i, keys, head_dim, pages, out + i * kTileSlots);
    case 3: return score_pages<3>(q + i, keys, head_dim, pages, out + i * kTileSlots);
    default: return;
  }
}

RIDGELINE_INLINE void add_values(const float* p, int queries, const float* values, int value_stride, int slots,
                                 const float* decay, float* out) {
  int i = 0;
  for (; i + kMaxQueries <= queries; i += kMaxQueries) {
    value_columns<kMaxQueries>(p + i * kTileSlots, values, value_stride, slots, decay + i, out + i * value_stride);
  }
  p += i * kTileSlots;
  out += i * value_stride;
  switch (queries - i) {
    case 1: return value_columns<1>(p, values, value_stride, slots, decay + i, out);
    case 2: return value_columns<2>(p, values, value_stride, slots, decay + i, out);
    case 3: return value_columns<3>(p, values, value_stride, slots, decay + i, out);
    default: return;
  }
}

RIDGELINE_END
