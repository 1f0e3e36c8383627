// What the products of one tile take and give.
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

RIDGELINE_INLINE vfloat splat_at(const uint8_t* p) {
  float value;
  std::memcpy(&value, p, 4);
  return splat(value);
}

RIDGELINE_END
