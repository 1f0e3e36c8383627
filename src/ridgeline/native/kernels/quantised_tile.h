// Products of a tile of integer codes with rows of A8.
#pragma once

#include "tile.h"

RIDGELINE_BEGIN

// Inputs 32*group + 8*chunk + {0..3} and + {4..7} of a tile, 16 rows of unsigned codes.
template <Storage kStorage>
RIDGELINE_INLINE void load_codes(const uint8_t* group, int chunk, vint& first, vint& second) {
  if constexpr (kStorage == Storage::q8_0) {
    first = iload(group + 128 * chunk);
    second = iload(group + 128 * chunk + 64);
  } else {
    const vint both = iload(group + 64 * chunk);
    first = byte_fields<0, 4>(both);
    second = byte_fields<4, 4>(both);
  }
}

template <Storage kStorage>
RIDGELINE_INLINE vint add_dot(vint sum, vint codes, vint x) {
  return kStorage == Storage::q8_0 ? dot_bytes(sum, codes, x) : dot(sum, codes, x);
}

// What the codes' zero point adds to a dot product: -8 or -128 times the sum of the activations.
template <Storage kStorage>
RIDGELINE_INLINE vint start_sum(const uint8_t* sum) {
  if constexpr (kStorage == Storage::q4_1) return izero();
  if constexpr (kStorage == Storage::q8_0 && kByteZero == 128) return izero();
  int32_t sums[2];
  std::memcpy(sums, sum, 8);
  return isplat((sums[0] + sums[1]) * (kStorage == Storage::q8_0 ? -128 : -8));
}

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
      sum[t] = start_sum<kStorage>(in.x + t * in.row_bytes + layout.sums + size_t(8) * g);
    }
    const auto* x = reinterpret_cast<const int8_t*>(in.x) + size_t(kGroup) * g;
#pragma GCC unroll 4
    for (int chunk = 0; chunk < 4; ++chunk) {
      vint first, second;
      load_codes<kStorage>(in.tile + place.codes, chunk, first, second);
      for (int t = 0; t < kTokens; ++t) {
        sum[t] = add_dot<kStorage>(sum[t], first, splat_codes(x + t * in.row_bytes + 8 * chunk));
        sum[t] = add_dot<kStorage>(sum[t], second, splat_codes(x + t * in.row_bytes + 8 * chunk + 4));
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

RIDGELINE_END
