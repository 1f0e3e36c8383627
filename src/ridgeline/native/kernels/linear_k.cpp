// Products of tiles of K-quants.
#include "linear.h"

RIDGELINE_BEGIN

using enum Storage;

void multiply_k_tiles(Storage storage, const TileInput& in, int tokens, float* y) {
  multiply_tiles_of<q3_k, q4_k, q6_k>(storage, in, tokens, y);
}

void multiply_k_panels(Storage storage, const TileInput& in, int rows, float* y) {
  multiply_panels_of<q3_k, q4_k, q6_k>(storage, in, rows, y);
}

RIDGELINE_END
