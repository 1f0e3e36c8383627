// Products of tiles of the other storages with blocks of 256.
#include "linear.h"

RIDGELINE_BEGIN

using enum Storage;

void multiply_super_tiles(Storage storage, const TileInput& in, int tokens, float* y) {
  multiply_tiles_of<q2_k, q5_k, iq4_xs, tq1_0, tq2_0>(storage, in, tokens, y);
}

void multiply_super_panels(Storage storage, const TileInput& in, int rows, float* y) {
  multiply_panels_of<q2_k, q5_k, iq4_xs, tq1_0, tq2_0>(storage, in, rows, y);
}

RIDGELINE_END
