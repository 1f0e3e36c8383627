// Products of a tile of floats with rows of floats.
#pragma once

#include "tile.h"

RIDGELINE_BEGIN

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

RIDGELINE_END
