// Products of one tile of 16 output rows with up to kMaxTokens rows of activations.
// The order of the float accumulation is that of the input groups, whatever the number of rows.
#pragma once

#include "bf16_tile.h"
#include "float_tile.h"
#include "quantised_tile.h"

RIDGELINE_BEGIN

// y[t][0..15] = tile times row t; 1 <= tokens <= kMaxTokens. Storages are spread over several files, which
// compile side by side; multiply_tile is for all of them.
void multiply_tile(Storage storage, const TileInput& in, int tokens, float* y);
void multiply_groups_tile(Storage storage, const TileInput& in, int tokens, float* y);
void multiply_k_tile(Storage storage, const TileInput& in, int tokens, float* y);
void multiply_super_tile(Storage storage, const TileInput& in, int tokens, float* y);

// A tile of one of kStorages. Five to seven rows are four and some more, which keeps the code small.
template <Storage... kStorages>
RIDGELINE_INLINE void multiply_tile_of(Storage storage, TileInput in, int tokens, float* y) {
  const auto multiply = [&](auto count) RIDGELINE_INLINED {
    constexpr int kTokens = decltype(count)::value;
    ((storage == kStorages ? quantised_tile<kStorages, kTokens>(in, y) : void()), ...);
  };
  if constexpr (kMaxTokens > 4) {
    if (tokens == kMaxTokens) return multiply(std::integral_constant<int, kMaxTokens>{});
    if (tokens > 4) {
      multiply(std::integral_constant<int, 4>{});
      in.x += 4 * in.row_bytes;
      y += 4 * kResultStride;
      tokens -= 4;
    }
  }
  switch (tokens) {
    case 1: return multiply(std::integral_constant<int, 1>{});
    case 2: return multiply(std::integral_constant<int, 2>{});
    case 3: return multiply(std::integral_constant<int, 3>{});
    default: return multiply(std::integral_constant<int, 4>{});
  }
}

RIDGELINE_END
