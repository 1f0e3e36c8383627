// Products of tiles of the storages that most models have; the others are passed on.
#include "linear.h"

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

static void multiply_common_tile(Storage storage, const TileInput& in, int tokens, float* y) {
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

void multiply_tile(Storage storage, const TileInput& in, int tokens, float* y) {
  switch (storage) {
    case Storage::q5_0:
    case Storage::q5_1:
    case Storage::iq4_nl:
    case Storage::mxfp4: return multiply_groups_tile(storage, in, tokens, y);
    case Storage::q3_k:
    case Storage::q4_k:
    case Storage::q6_k: return multiply_k_tile(storage, in, tokens, y);
    case Storage::q2_k:
    case Storage::q5_k:
    case Storage::iq4_xs:
    case Storage::tq1_0:
    case Storage::tq2_0: return multiply_super_tile(storage, in, tokens, y);
    default: return multiply_common_tile(storage, in, tokens, y);
  }
}

RIDGELINE_END
