// Products of a pair of tiles of bfloat16 with rows of bfloat16.
#pragma once

#include "tile.h"

RIDGELINE_BEGIN

template <int kTiles, int kTokens>
static void bf16_tiles(const TileInput& in, float* y) {
  if (in.cols < 1) __builtin_unreachable();
  Fetching<kTiles, int(kLineBytes)> fetching(in);
  vfloat acc[kTiles][kTokens];
  for (int i = 0; i < kTiles; ++i) {
    for (int t = 0; t < kTokens; ++t) acc[i][t] = zero();
  }
  const int pairs = (in.cols + 1) / 2;
  for (int k = 0; k < pairs; ++k) {
    const uint8_t* line = in.tile + size_t(k) * kLineBytes;
    fetching.fetch();
    vint w[kTiles];
    for (int i = 0; i < kTiles; ++i) w[i] = iload(line + i * in.next_tile);
    for (int t = 0; t < kTokens; ++t) {
      const vint x = splat_pair(in.x + t * in.row_bytes + size_t(4) * k);
      for (int i = 0; i < kTiles; ++i) acc[i][t] = dot_bf16(acc[i][t], x, w[i]);
    }
  }
  for (int i = 0; i < kTiles; ++i) {
    for (int t = 0; t < kTokens; ++t) store(y + t * kResultStride + i * kTileRows, acc[i][t]);
  }
}

RIDGELINE_END
