#include "pack.h"

#include <bit>
#include <cstring>

namespace ridgeline {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF and the layouts are little-endian");

constexpr uint64_t kNibbles = 0x0f0f0f0f0f0f0f0f;

uint64_t read64(const uint8_t* p) {
  uint64_t x;
  std::memcpy(&x, p, 8);
  return x;
}

void write32(uint8_t* p, uint32_t x) { std::memcpy(p, &x, 4); }

// A GGUF nibble block holds input j in the low and j + 16 in the high nibble of byte j; a chunk wants inputs
// 8j..8j+3 low and 8j+4..8j+7 high.
void place_nibbles(const uint8_t* nibbles, uint8_t* group, int lane) {
  for (int half = 0; half < 2; ++half) {
    const uint64_t both = read64(nibbles + 8 * half), low = both & kNibbles, high = both >> 4 & kNibbles;
    write32(group + 64 * half + 4 * lane, uint32_t(low) | uint32_t(low >> 32) << 4);
    write32(group + 64 * (half + 2) + 4 * lane, uint32_t(high) | uint32_t(high >> 32) << 4);
  }
}

void place_bytes(const uint8_t* codes, uint8_t* group, int lane) {
  for (int chunk = 0; chunk < 8; ++chunk) {
    uint32_t four;
    std::memcpy(&four, codes + 4 * chunk, 4);
    write32(group + 64 * chunk + 4 * lane, four ^ 0x80808080u);  // a signed byte plus 128
  }
}

void pack_quantised_row(const uint8_t* row, Storage storage, int32_t cols, int lane, uint8_t* tile) {
  const int groups = group_count(cols);
  const size_t block_bytes = file_row_bytes(storage, kGroup);
  for (int g = 0; g < groups; ++g, row += block_bytes) {
    const GroupPlace place = group_place(storage, g);
    uint8_t *scale = tile + place.scales + size_t(lane) * 2, *codes = tile + place.codes;
    std::memcpy(scale, row, 2);
    if (storage == Storage::q4_1) std::memcpy(scale + kTileRows * 2, row + 2, 2);
    if (storage == Storage::q8_0) {
      place_bytes(row + 2, codes, lane);
    } else {
      place_nibbles(row + (storage == Storage::q4_1 ? 4 : 2), codes, lane);
    }
  }
}

uint32_t widen_f16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
  if (exponent == 31) return sign | 0x7f800000 | fraction << 13;
  if (exponent != 0) return sign | (exponent + 112) << 23 | fraction << 13;
  if (fraction == 0) return sign;
  const int shift = std::countl_zero(fraction) - 21;
  return sign | uint32_t(113 - shift) << 23 | (fraction << shift & 0x3ff) << 13;
}

void pack_float_row(const uint8_t* row, Storage storage, int32_t cols, int lane, uint8_t* tile) {
  for (int32_t k = 0; k < cols; ++k) {
    uint32_t wide;
    uint16_t half;
    if (storage == Storage::f32) {
      std::memcpy(&wide, row + size_t(k) * 4, 4);
    } else {
      std::memcpy(&half, row + size_t(k) * 2, 2);
      wide = widen_f16(half);
    }
    write32(tile + (size_t(k) * kTileRows + lane) * 4, wide);
  }
}

void pack_bf16_row(const uint8_t* row, int32_t cols, int lane, uint8_t* tile) {
  for (int32_t k = 0; k < cols; k += 2) {
    uint32_t pair = 0;
    std::memcpy(&pair, row + size_t(k) * 2, k + 1 < cols ? 4 : 2);
    write32(tile + (size_t(k / 2) * kTileRows + lane) * 4, pair);
  }
}

}  // namespace

void pack_matrix(const uint8_t* data, Storage storage, int32_t rows, int32_t cols, uint8_t* out, Team& team) {
  const size_t row_bytes = file_row_bytes(storage, cols), bytes = tile_bytes(storage, cols);
  team.run(1, [&](int index) {
    Worker{&team, index}.for_units(tile_count(rows), [&](int64_t t) {
      uint8_t* tile = out + size_t(t) * bytes;
      const int64_t first = t * kTileRows;
      if (rows - first < kTileRows) std::memset(tile, 0, bytes);
      for (int lane = 0; lane < kTileRows && first + lane < rows; ++lane) {
        const uint8_t* row = data + size_t(first + lane) * row_bytes;
        if (is_quantised(storage)) {
          pack_quantised_row(row, storage, cols, lane, tile);
        } else if (storage == Storage::bf16) {
          pack_bf16_row(row, cols, lane, tile);
        } else {
          pack_float_row(row, storage, cols, lane, tile);
        }
      }
    });
  });
}

}  // namespace ridgeline
