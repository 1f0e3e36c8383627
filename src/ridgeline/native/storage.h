// How weights lie in memory: what packing writes and the linear kernels read. This is their only description.
//
// Packed matrix: tiles of 16 output rows, one after the other, each one run of memory that is read from its
// start to its end. Missing rows of the last tile are zeros.
//   quantised tile: blocks of a 64-byte header and the codes that belong to it. Q4_1 has a block per group
//     of 32 inputs, its header 16 scales and 16 minima in float16; the others a block per two groups, its
//     header 16 scales of the first and 16 of the second. If the groups are odd, the last block has one.
//     The codes of a group are 64-byte chunks; byte r*4+i of a chunk belongs to row r, so that a chunk is
//     16 lanes of four inputs.
//       W4: chunk j of 4: input 8j+i in the low nibble, input 8j+4+i in the high one.
//       W8: chunk j of 8: input 4j+i as an unsigned byte (code + 128).
//   bfloat16 tile: for each pair of inputs 16 pairs; a last input without a partner has a zero.
//   float32 tile: for each input 16 floats. It holds F32 and F16.
#pragma once

#include <utility>

#include "layout.h"

namespace ridgeline {

enum class Storage : uint8_t { q4_0, q4_1, q8_0, f32, f16, bf16 };

inline constexpr std::pair<const char*, Storage> kStorages[] = {
    {"Q4_0", Storage::q4_0}, {"Q4_1", Storage::q4_1}, {"Q8_0", Storage::q8_0},
    {"F32", Storage::f32},   {"F16", Storage::f16},   {"BF16", Storage::bf16},
};

RIDGELINE_INLINE constexpr bool is_quantised(Storage s) { return s <= Storage::q8_0; }

// Bytes of the codes of one group of a tile.
RIDGELINE_INLINE constexpr size_t group_code_bytes(Storage s) {
  return size_t(kTileRows * kGroup) / (s == Storage::q8_0 ? 1 : 2);
}
// Where a group of a quantised tile has its scales and its codes; minima follow the scales.
struct GroupPlace {
  size_t scales, codes;
};
RIDGELINE_INLINE constexpr GroupPlace group_place(Storage s, int group) {
  if (s == Storage::q4_1) {
    const size_t block = size_t(group) * (kLineBytes + group_code_bytes(s));
    return {block, block + kLineBytes};
  }
  const size_t block = size_t(group / 2) * (kLineBytes + 2 * group_code_bytes(s)), second = size_t(group % 2);
  return {block + second * kLineBytes / 2, block + kLineBytes + second * group_code_bytes(s)};
}
RIDGELINE_INLINE constexpr size_t tile_bytes(Storage s, int cols) {
  if (s == Storage::bf16) return round_up(size_t(cols), 2) * kTileRows * sizeof(uint16_t);
  if (!is_quantised(s)) return size_t(cols) * kTileRows * sizeof(float);
  return group_place(s, group_count(cols) - 1).codes + group_code_bytes(s);
}
// Bytes of a row as files have it; our own quantiser may leave the last block in part unused.
RIDGELINE_INLINE constexpr size_t file_row_bytes(Storage s, int cols) {
  switch (s) {
    case Storage::q4_0: return size_t(group_count(cols)) * 18;
    case Storage::q4_1: return size_t(group_count(cols)) * 20;
    case Storage::q8_0: return size_t(group_count(cols)) * 34;
    case Storage::f32: return size_t(cols) * 4;
    default: return size_t(cols) * 2;
  }
}

}  // namespace ridgeline
