// What the products of a pair of tiles take and give.
#pragma once

#include "../launch.h"
#include "simd.h"

RIDGELINE_BEGIN

// Results of a pair of tiles: kMaxTokens rows of 32 values.
constexpr int kResultStride = 2 * kTileRows;

struct TileInput {
  const uint8_t* tile;
  int64_t next_tile;  // from the first tile to the second, in bytes; 0 where there is only one
  const uint8_t* x;   // first row of activations
  int64_t row_bytes;  // between rows of activations
  int32_t cols;

  RIDGELINE_MEMBER int tiles() const { return next_tile == 0 ? 1 : 2; }
};

// How far ahead of their use weights are fetched. What follows a tile in memory, or a pair of tiles that are
// multiplied at once, is mostly the next. A single row needs it as well: what a core fetches by itself may
// end with the page, and the loads that it sees ahead are too few for a long way to memory.
constexpr size_t kPrefetchBytes = 4096;

// What to fetch when `place` bytes of a tile are done. Beyond the end of one of two comes the other, which is being
// multiplied already.
template <int kTiles>
RIDGELINE_INLINE size_t prefetch_place(const TileInput& in, size_t place) {
  const size_t ahead = place + kPrefetchBytes, tile_bytes = size_t(in.next_tile);
  return kTiles == 2 && ahead >= tile_bytes ? ahead + tile_bytes : ahead;
}

// Fetches ahead of the line of each tile that begins at `place`.
template <int kTiles>
RIDGELINE_INLINE void prefetch_line(const TileInput& in, size_t place) {
  const uint8_t* ahead = in.tile + prefetch_place<kTiles>(in, place);
  for (int i = 0; i < kTiles; ++i) prefetch(ahead + i * in.next_tile);
}

RIDGELINE_INLINE vfloat splat_at(const uint8_t* p) {
  float value;
  std::memcpy(&value, p, 4);
  return splat(value);
}
// Two neighbouring bfloat16, the same for every lane.
RIDGELINE_INLINE vint splat_pair(const uint8_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return isplat(pair);
}

RIDGELINE_END
