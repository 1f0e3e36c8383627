// Products of tiles of the storages that most models have; the others are passed on.
#include "linear.h"

RIDGELINE_BEGIN

using enum Storage;

void multiply_tiles(Storage storage, const TileInput& in, int tokens, float* y) {
  switch (storage) {
    case q5_0:
    case q5_1:
    case iq4_nl:
    case mxfp4: return multiply_groups_tiles(storage, in, tokens, y);
    case q3_k:
    case q4_k:
    case q6_k: return multiply_k_tiles(storage, in, tokens, y);
    case q2_k:
    case q5_k:
    case iq4_xs:
    case tq1_0:
    case tq2_0: return multiply_super_tiles(storage, in, tokens, y);
    case f16: return multiply_tiles_of<f32>(f32, in, tokens, y);  // widened when it was packed
    default: return multiply_tiles_of<q4_0, q4_1, q8_0, bf16, f32>(storage, in, tokens, y);
  }
}

void multiply_panels(Storage storage, const TileInput& in, int rows, float* y) {
  multiply_panels_of<q4_0, q4_1>(storage, in, rows, y);
  multiply_groups_panels(storage, in, rows, y);
  multiply_k_panels(storage, in, rows, y);
  multiply_super_panels(storage, in, rows, y);
}

RIDGELINE_END
