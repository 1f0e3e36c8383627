// Packed weights on disk: their blocks, checked for damage as they are read.
#pragma once

#include <cstddef>
#include <cstdint>

#include "team.h"

namespace ridgeline {

// Memory and files are summed in blocks of this size; the last one may be shorter.
constexpr size_t kBlockBytes = size_t(1) << 20;

inline int64_t block_count(size_t bytes) { return int64_t((bytes + kBlockBytes - 1) / kBlockBytes); }

// A sum that any change within eight neighbouring bytes alters, and any other damage but one in 2^64. It
// guards against accidents, not against people.
uint64_t checksum(const uint8_t* data, size_t bytes);

void sum_blocks(const uint8_t* data, size_t bytes, uint64_t* sums, Team& team);

// Fills `out` from the file at `offset`. Returns whether all bytes were there and their blocks have these sums.
bool read_blocks(int descriptor, int64_t offset, uint8_t* out, size_t bytes, const uint64_t* sums,
                 Team& team);

}  // namespace ridgeline
