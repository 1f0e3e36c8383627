// Repacking of GGUF blocks into tiles.
#pragma once

#include <cstdint>

#include "storage.h"
#include "team.h"

namespace ridgeline {

// Fills the tiles of a (rows, cols) matrix from its rows in the file's format. Returns whether all its scales,
// or the values of one without scales, are finite; an exponent of a byte is not where it means NaN.
bool pack_matrix(const uint8_t* data, Storage storage, int32_t rows, int32_t cols, uint8_t* out, Team& team);

}  // namespace ridgeline
