#include "pack.h"

#include <atomic>
#include <bit>
#include <cstring>

#include "file_blocks.h"

namespace ridgeline {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF and the layouts are little-endian");

void write32(uint8_t* p, uint32_t x) { std::memcpy(p, &x, 4); }

// The planes of the codes of a group, of one row.
template <int kBits>
void place_group(const uint8_t* codes, uint8_t* group, int lane) {
  uint32_t chunks[8];
  std::memcpy(chunks, codes, sizeof chunks);
  for (Plane plane = first_plane(kBits); plane.bits != 0; plane = next_plane(kBits, plane)) {
    const uint32_t mask = 0x01010101u * ((1u << plane.bits) - 1);
    for (int line = 0, chunk = 0; line < plane.bits; ++line) {
      uint32_t four = 0;
      for (int bit = 0; bit < 8; bit += plane.bits) four |= (chunks[chunk++] >> plane.first & mask) << bit;
      write32(group + kLineBytes * size_t(plane_line(kBits, plane) + line) + 4 * lane, four);
    }
  }
}

void place_digits(const uint8_t* codes, uint8_t* block, int lane) {
  constexpr int kChunks = kSuperBlock / 4;
  for (int first = 0; first < kChunks; first += 5, block += kLineBytes) {
    for (int i = 0; i < 4; ++i) {
      int number = 0;
      for (int c = first; c < first + 5; ++c) number = number * 3 + (c < kChunks ? codes[4 * c + i] : 0);
      block[4 * lane + i] = uint8_t(number);
    }
  }
}

// The integer scales and minima of a block of 256, of one row.
template <Storage kStorage>
void place_lines(const uint8_t* lines, uint8_t* header, int lane) {
  constexpr int kLines = header_lines(kStorage), kBits = line_bits(kStorage);
  uint8_t* out = header + lane;
  if constexpr (kBits == 8) {
    for (int i = 0; i < kLines; ++i, out += kTileRows) *out = lines[i];
    return;
  }
  for (int i = 0; i < kLines / 2; ++i, out += kTileRows) {
    *out = uint8_t((lines[i] & 15) | lines[kLines / 2 + i] << 4);
  }
  for (int i = 0; kBits == 6 && i < kLines / 4; ++i, out += kTileRows) {
    int twos = 0;
    for (int part = 0; part < 4; ++part) twos |= lines[kLines / 4 * part + i] >> 4 << 2 * part;
    *out = uint8_t(twos);
  }
}

bool is_finite_f16(const uint8_t* p) { return (p[1] & 0x7c) != 0x7c; }

// Returns whether all scales and minima are finite.
template <Storage kStorage>
bool pack_quantised_row(const uint8_t* row, int32_t cols, int lane, uint8_t* tile) {
  constexpr Traits kTraits = traits(kStorage);
  constexpr int kGroups = kTraits.file_inputs / kGroup;
  constexpr size_t kScaleBytes = kTraits.scale == Scale::exponent ? 1 : 2;
  FileBlock block;
  bool finite = true;
  for (int g = 0; g < group_count(cols); g += kGroups, row += kTraits.file_bytes) {
    take_codes<kStorage>(row, block.codes);
    take_scales<kStorage>(row, block);
    uint8_t* header = tile + group_place(kStorage, g).scales;
    std::memcpy(header + kScaleBytes * size_t(lane), block.scale, kScaleBytes);
    finite &= kScaleBytes == 1 ? block.scale[0] < 0xfd : is_finite_f16(block.scale);
    if constexpr (kTraits.minimum != Minimum::none) {
      std::memcpy(header + 2 * (kTileRows + lane), block.minimum, 2);
      finite &= is_finite_f16(block.minimum);
    }
    if constexpr (header_lines(kStorage) > 0) {
      place_lines<kStorage>(block.lines, header + lines_place(kStorage), lane);
    }
    if constexpr (kTraits.bits == 0) {
      place_digits(block.codes, tile + group_place(kStorage, g).codes, lane);
    } else {
      for (int i = 0; i < kGroups; ++i) {
        place_group<kTraits.bits>(block.codes + kGroup * i, tile + group_place(kStorage, g + i).codes, lane);
      }
    }
  }
  return finite;
}

uint32_t widen_f16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
  if (exponent == 31) return sign | 0x7f800000 | fraction << 13;
  if (exponent != 0) return sign | (exponent + 112) << 23 | fraction << 13;
  if (fraction == 0) return sign;
  const int shift = std::countl_zero(fraction) - 21;
  return sign | uint32_t(113 - shift) << 23 | (fraction << shift & 0x3ff) << 13;
}

bool pack_float_row(const uint8_t* row, Storage storage, int32_t cols, int lane, uint8_t* tile) {
  bool finite = true;
  for (int32_t k = 0; k < cols; ++k) {
    uint32_t wide;
    uint16_t half;
    if (storage == Storage::f32) {
      std::memcpy(&wide, row + size_t(k) * 4, 4);
    } else {
      std::memcpy(&half, row + size_t(k) * 2, 2);
      wide = widen_f16(half);
    }
    finite &= (wide & 0x7f800000) != 0x7f800000;
    write32(tile + (size_t(k) * kTileRows + lane) * 4, wide);
  }
  return finite;
}

bool pack_bf16_row(const uint8_t* row, int32_t cols, int lane, uint8_t* tile) {
  bool finite = true;
  for (int32_t k = 0; k < cols; k += 2) {
    uint32_t pair = 0;
    std::memcpy(&pair, row + size_t(k) * 2, k + 1 < cols ? 4 : 2);
    finite &= (pair & 0x7f80) != 0x7f80 && (pair & 0x7f800000) != 0x7f800000;
    write32(tile + (size_t(k / 2) * kTileRows + lane) * 4, pair);
  }
  return finite;
}

bool pack_row(const uint8_t* row, Storage storage, int32_t cols, int lane, uint8_t* tile) {
  if (storage == Storage::bf16) return pack_bf16_row(row, cols, lane, tile);
  if (!is_quantised(storage)) return pack_float_row(row, storage, cols, lane, tile);
  bool finite = true;
  with_quantised(storage, [&](auto tag) { finite = pack_quantised_row<tag.value>(row, cols, lane, tile); });
  return finite;
}

}  // namespace

bool pack_matrix(const uint8_t* data, Storage storage, int32_t rows, int32_t cols, uint8_t* out, Team& team) {
  const size_t row_bytes = file_row_bytes(storage, cols), bytes = tile_bytes(storage, cols);
  std::atomic<bool> finite{true};
  team.run(1, [&](int index) {
    Worker{&team, index}.for_units(tile_count(rows), [&](int64_t t) {
      uint8_t* tile = out + size_t(t) * bytes;
      const int64_t first = t * kTileRows;
      if (rows - first < kTileRows) std::memset(tile, 0, bytes);
      for (int lane = 0; lane < kTileRows && first + lane < rows; ++lane) {
        const uint8_t* row = data + size_t(first + lane) * row_bytes;
        if (!pack_row(row, storage, cols, lane, tile)) finite.store(false, std::memory_order_relaxed);
      }
    });
  });
  return finite.load(std::memory_order_relaxed);
}

}  // namespace ridgeline
