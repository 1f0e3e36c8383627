// Products of a pair of tiles of floats with rows of floats.
#pragma once

#include "tile.h"

RIDGELINE_BEGIN

template <int kTiles, int kTokens>
static void float_tiles(const TileInput& in, float* y) {
  if (in.cols < 1) __builtin_unreachable();
  Fetching<kTiles, int(kLineBytes)> fetching(in);
  vfloat acc[kTiles][kTokens];
  for (int i = 0; i < kTiles; ++i) {
    for (int t = 0; t < kTokens; ++t) acc[i][t] = zero();
  }
  for (int k = 0; k < in.cols; ++k) {
    const uint8_t* line = in.tile + size_t(k) * kLineBytes;
    fetching.fetch();
    vfloat w[kTiles];
    for (int i = 0; i < kTiles; ++i) w[i] = load(reinterpret_cast<const float*>(line + i * in.next_tile));
    for (int t = 0; t < kTokens; ++t) {
      const vfloat x = splat_at(in.x + t * in.row_bytes + size_t(4) * k);
      for (int i = 0; i < kTiles; ++i) acc[i][t] = fma(x, w[i], acc[i][t]);
    }
  }
  for (int i = 0; i < kTiles; ++i) {
    for (int t = 0; t < kTokens; ++t) store(y + t * kResultStride + i * kTileRows, acc[i][t]);
  }
}

RIDGELINE_END
