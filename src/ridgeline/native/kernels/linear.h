// Products of one tile of 16 output rows with up to kMaxTokens rows of activations.
// The order of the float accumulation is that of the input groups, whatever the number of rows.
#pragma once

#include "bf16_tile.h"
#include "float_tile.h"
#include "quantised_tile.h"

RIDGELINE_BEGIN

template <int kTokens>
static void multiply_tile(Storage storage, const TileInput& in, float* y) {
  switch (storage) {
    case Storage::q4_0: return quantised_tile<Storage::q4_0, kTokens>(in, y);
    case Storage::q4_1: return quantised_tile<Storage::q4_1, kTokens>(in, y);
    case Storage::q8_0: return quantised_tile<Storage::q8_0, kTokens>(in, y);
    case Storage::bf16: return bf16_tile<kTokens>(in, y);
    default: return float_tile<kTokens>(in, y);
  }
}

// y[t][0..15] = tile times row t; 1 <= tokens <= kMaxTokens.
RIDGELINE_INLINE void multiply_tile(Storage storage, const TileInput& in, int tokens, float* y) {
  switch (tokens) {
    case 1: return multiply_tile<1>(storage, in, y);
    case 2: return multiply_tile<2>(storage, in, y);
    case 3: return multiply_tile<3>(storage, in, y);
    case 4: return multiply_tile<4>(storage, in, y);
    default: break;
  }
  if constexpr (kMaxTokens > 4) {
    switch (tokens) {
      case 5: return multiply_tile<5>(storage, in, y);
      case 6: return multiply_tile<6>(storage, in, y);
      case 7: return multiply_tile<7>(storage, in, y);
      default: return multiply_tile<8>(storage, in, y);
    }
  }
}

RIDGELINE_END
