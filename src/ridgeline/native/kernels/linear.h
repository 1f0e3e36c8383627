// Products of one tile of 16 output rows with up to kMaxTokens rows of activations.
// The order of the float accumulation is that of the input groups, whatever the number of rows.
#pragma once

#include "../launch.h"
#include "simd.h"

RIDGELINE_BEGIN

// Results of a pair of tiles: kMaxTokens rows of 32 values.
constexpr int kResultStride = 2 * kTileRows;

struct TileInput {
  const uint8_t* tile;
  const uint8_t* x;   // first row of activations
  int64_t row_bytes;  // between rows of activations
  int32_t cols;
};

// Inputs 32*group + 8*chunk + {0..3} and + {4..7} of a tile, 16 rows of unsigned codes.
template <Storage kStorage>
RIDGELINE_INLINE void load_codes(const uint8_t* group, int chunk, vint& first, vint& second) {
  if constexpr (kStorage == Storage::q8_0) {
    first = iload(group + 128 * chunk);
    second = iload(group + 128 * chunk + 64);
  } else {
    const vint both = iload(group + 64 * chunk);
    first = low_nibbles(both);
    second = high_nibbles(both);
  }
}

// What the codes' zero point adds to a dot product: -8 or -128 times the sum of the activations.
template <Storage kStorage>
RIDGELINE_INLINE vint start_sum(const uint8_t* sum) {
  if constexpr (kStorage == Storage::q4_1) return izero();
  int32_t value;
  std::memcpy(&value, sum, 4);
  return isplat(value * (kStorage == Storage::q8_0 ? -128 : -8));
}

RIDGELINE_INLINE vfloat splat_at(const uint8_t* p) {
  float value;
  std::memcpy(&value, p, 4);
  return splat(value);
}

// How far ahead of their use weights are fetched. The tile after this one follows in memory and is mostly the
// next. With few rows the hardware's own prefetching is better: it stays closer to what is computed.
constexpr size_t kPrefetchBytes = 4096;
constexpr int kPrefetchTokens = 3;

template <Storage kStorage>
RIDGELINE_INLINE void prefetch_group(const uint8_t* tile, int group) {
  constexpr size_t kBytes = group_place(kStorage, 2).scales / 2;
  const uint8_t* ahead = tile + size_t(group) * kBytes + kPrefetchBytes;
  for (size_t line = 0; line < kBytes; line += kLineBytes) prefetch(ahead + line);
}

template <Storage kStorage, int kTokens>
static void quantised_tile(const TileInput& in, float* y) {
  if (in.cols < 1) __builtin_unreachable();  // keeps the accumulators out of memory
  const A8Layout layout = a8_layout(in.cols);
  vfloat acc[kTokens];
  for (int t = 0; t < kTokens; ++t) acc[t] = zero();
  for (int g = 0; g < layout.groups; ++g) {
    if constexpr (kTokens >= kPrefetchTokens) prefetch_group<kStorage>(in.tile, g);
    const GroupPlace place = group_place(kStorage, g);
    const auto* scales = reinterpret_cast<const uint16_t*>(in.tile + place.scales);
    vint sum[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      sum[t] = start_sum<kStorage>(in.x + t * in.row_bytes + layout.sums + size_t(4) * g);
    }
    const auto* x = reinterpret_cast<const int8_t*>(in.x) + size_t(kGroup) * g;
#pragma GCC unroll 4
    for (int chunk = 0; chunk < 4; ++chunk) {
      vint first, second;
      load_codes<kStorage>(in.tile + place.codes, chunk, first, second);
      for (int t = 0; t < kTokens; ++t) {
        sum[t] = dot(sum[t], first, splat_codes(x + t * in.row_bytes + 8 * chunk));
        sum[t] = dot(sum[t], second, splat_codes(x + t * in.row_bytes + 8 * chunk + 4));
      }
    }
    const vfloat scale = load_f16(scales);
    for (int t = 0; t < kTokens; ++t) {
      const uint8_t* row = in.x + t * in.row_bytes + size_t(4) * g;
      acc[t] = fma(to_float(sum[t]), scale * splat_at(row + layout.scales), acc[t]);
      if constexpr (kStorage == Storage::q4_1) {
        acc[t] = fma(load_f16(scales + kTileRows), splat_at(row + layout.scaled_sums), acc[t]);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) store(y + t * kResultStride, acc[t]);
}

template <int kTokens>
static void float_tile(const TileInput& in, float* y) {
  if (in.cols < 1) __builtin_unreachable();
  vfloat acc[kTokens];
  for (int t = 0; t < kTokens; ++t) acc[t] = zero();
  const auto* weights = reinterpret_cast<const float*>(in.tile);
  for (int k = 0; k < in.cols; ++k) {
    const vfloat w = load(weights + size_t(k) * kTileRows);
    for (int t = 0; t < kTokens; ++t)
      acc[t] = fma(splat_at(in.x + t * in.row_bytes + size_t(4) * k), w, acc[t]);
  }
  for (int t = 0; t < kTokens; ++t) store(y + t * kResultStride, acc[t]);
}

template <int kTokens>
static void multiply_tile(Storage storage, const TileInput& in, float* y) {
  switch (storage) {
    case Storage::q4_0: return quantised_tile<Storage::q4_0, kTokens>(in, y);
    case Storage::q4_1: return quantised_tile<Storage::q4_1, kTokens>(in, y);
    case Storage::q8_0: return quantised_tile<Storage::q8_0, kTokens>(in, y);
    default: return float_tile<kTokens>(in, y);
  }
}

// y[t][0..15] = tile times row t; 1 <= tokens <= kMaxTokens.
RIDGELINE_INLINE void multiply_tile(Storage storage, const TileInput& in, int tokens, float* y) {
  switch (tokens) {
    case 1: return multiply_tile<1>(storage, in, y);
    case 2: return multiply_tile<2>(storage, in, y);
    case 3: return multiply_tile<3>(storage, in, y);
    case 4: return multiply_tile<4>(storage, in, y);
    default: break;
  }
  if constexpr (kMaxTokens > 4) {
    switch (tokens) {
      case 5: return multiply_tile<5>(storage, in, y);
      case 6: return multiply_tile<6>(storage, in, y);
      case 7: return multiply_tile<7>(storage, in, y);
      default: return multiply_tile<8>(storage, in, y);
    }
  }
}

RIDGELINE_END
