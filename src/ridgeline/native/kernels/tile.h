// What the products of a pair of tiles take and give.
#pragma once

#include "../launch.h"
#include "simd.h"

RIDGELINE_BEGIN

// Results of a pair of tiles: kMaxTokens rows of 32 values.
constexpr int kResultStride = 2 * kTileRows;

// Which weights to fetch while others are multiplied: when `place` bytes of a tile are done, what lies
// `bytes` + place * pace / kFullPace behind its beginning. A single row needs that as well: what a core fetches
// by itself may end with the page, and the loads that it sees ahead are too few for a long way to memory.
constexpr int64_t kFullPace = 1 << 16;
struct Ahead {
  int64_t bytes = 4096, pace = kFullPace;
};

struct TileInput {
  const uint8_t* tile;
  int64_t next_tile;  // from the first tile to the second, in bytes; 0 where there is only one
  const uint8_t* x;   // first row of activations
  int64_t row_bytes;  // between rows of activations
  int32_t cols;
  Ahead ahead = {};

  RIDGELINE_MEMBER int tiles() const { return next_tile == 0 ? 1 : 2; }
};

// What one of `blocks` blocks of rows fetches, by which a pair of tiles is multiplied one after the other. What
// follows in memory is mostly what comes next. Each of several fetches its part of the next pair, so that memory is
// read while all of them are multiplied, not only the first.
RIDGELINE_INLINE Ahead ahead_of(int64_t block, int64_t blocks, int64_t tile_bytes) {
  if (blocks == 1) return {};
  return {2 * tile_bytes + tile_bytes * block / blocks, kFullPace / blocks};
}

template <int kTiles>
RIDGELINE_INLINE int64_t prefetch_place(const TileInput& in, int64_t place) {
  const int64_t ahead = in.ahead.bytes + place * in.ahead.pace / kFullPace;
  // Beyond the end of one of two tiles comes the other, which is being multiplied already.
  return kTiles == 2 && in.ahead.pace == kFullPace && ahead >= in.next_tile ? ahead + in.next_tile : ahead;
}

// Fetches ahead of `bytes` of each tile that begin at `place`.
template <int kTiles>
RIDGELINE_INLINE void prefetch_ahead(const TileInput& in, int64_t place, size_t bytes = kLineBytes) {
  const uint8_t* ahead = in.tile + prefetch_place<kTiles>(in, place);
  for (int i = 0; i < kTiles; ++i) {
    for (size_t line = 0; line < bytes; line += kLineBytes) prefetch(ahead + i * in.next_tile + line);
  }
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
