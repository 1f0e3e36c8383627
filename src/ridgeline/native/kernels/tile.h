// What the products of a pair of tiles take and give.
#pragma once

#include "../launch.h"
#include "simd.h"

RIDGELINE_BEGIN

// Results of a pair of tiles: kMaxTokens rows of 32 values.
constexpr int kResultStride = 2 * kTileRows;

// A row or two leave so little time that weights are fetched no more than a page before their use. They need it
// as well: what a core fetches by itself may end with the page, and the loads that it sees ahead are too few for
// a long way to memory.
constexpr int kFewTokens = 2;
constexpr int64_t kFewAhead = 4096;

struct TileInput {
  const uint8_t* tile;
  int64_t next_tile;  // from the first tile to the second, in bytes; 0 where there is only one
  const uint8_t* x;   // first row of activations
  int64_t row_bytes;  // between rows of activations
  int32_t cols;
  // Of several blocks of rows that the tiles are multiplied by, one after the other, each fetches its part of the
  // weights that come next, `ahead` bytes from these: memory is read while all of them are multiplied.
  int32_t blocks = 1;
  int64_t ahead = kFewAhead;

  RIDGELINE_MEMBER int tiles() const { return next_tile == 0 ? 1 : 2; }
};

// Fetches weights while others are multiplied, `kBytes` of each tile at a time.
template <int kTiles, int kBytes>
class Fetching {
 public:
  RIDGELINE_MEMBER explicit Fetching(const TileInput& in)
      : next_(in.tile + in.ahead), next_tile_(in.next_tile), step_(kBytes / in.blocks) {}

  RIDGELINE_MEMBER void fetch() {
    asm volatile("" : "+m"(next_), "+m"(step_));  // in memory: the products need the registers
    const uint8_t* next = next_;
    for (int i = 0; i < kTiles; ++i) {
      for (int byte = 0; byte < kBytes; byte += int(kLineBytes)) prefetch(next + i * next_tile_ + byte);
    }
    next_ = next + step_;
  }

 private:
  const uint8_t* next_;
  int64_t next_tile_, step_;
};

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
