// Products of a tile of bfloat16 with rows of bfloat16.
#pragma once

#include "tile.h"

RIDGELINE_BEGIN

template <int kTokens>
static void bf16_tile(const TileInput& in, float* y) {
  if (in.cols < 1) __builtin_unreachable();
  vfloat acc[kTokens];
  for (int t = 0; t < kTokens; ++t) acc[t] = zero();
  const int pairs = (in.cols + 1) / 2;
  for (int k = 0; k < pairs; ++k) {
    const uint8_t* line = in.tile + size_t(k) * kLineBytes;
    if constexpr (kTokens >= kPrefetchTokens) prefetch(line + kPrefetchBytes);
    const vint w = iload(line);
    for (int t = 0; t < kTokens; ++t)
      acc[t] = dot_bf16(acc[t], splat_pair(in.x + t * in.row_bytes + size_t(4) * k), w);
  }
  for (int t = 0; t < kTokens; ++t) store(y + t * kResultStride, acc[t]);
}

RIDGELINE_END
