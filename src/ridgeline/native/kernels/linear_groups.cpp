// Products of tiles of the rarer storages with blocks of 32.
#include "linear.h"

RIDGELINE_BEGIN

using enum Storage;

void multiply_groups_tiles(Storage storage, const TileInput& in, int tokens, float* y) {
  multiply_tiles_of<q5_0, q5_1, iq4_nl, mxfp4>(storage, in, tokens, y);
}

void multiply_groups_panels(Storage storage, const TileInput& in, int rows, float* y) {
  multiply_panels_of<q5_0, q5_1, iq4_nl, mxfp4>(storage, in, rows, y);
}

RIDGELINE_END
