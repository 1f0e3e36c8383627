// Rows of a matrix by their number: embeddings.
#include "rows.h"

RIDGELINE_BEGIN

namespace {

float widen_f16(const uint16_t* p) {
  uint16_t lane[16] = {*p};
  float wide[16];
  store(wide, load_f16(lane));
  return wide[0];
}

// 4 * 2**(exponent - 128), which is never subnormal, as the scale itself is for exponents of 0 and 1. Files
// with exponents above 252 are refused; here they give infinities.
float four_exponent_scale(int exponent) {
  const uint32_t bits = uint32_t(exponent < 254 ? exponent + 1 : 255) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return scale;
}

// An integer scale or minimum of a row, from the lines of a header.
template <Storage kStorage>
int header_number(const uint8_t* lines, int lane, int index) {
  constexpr int kLines = header_lines(kStorage), kBits = line_bits(kStorage);
  if constexpr (kBits == 8) return int8_t(lines[kTileRows * index + lane]);
  const int nibble = lines[kTileRows * (index % (kLines / 2)) + lane] >> index / (kLines / 2) * 4 & 15;
  if constexpr (kBits == 4) return nibble;
  const uint8_t* twos = lines + kTileRows * (kLines / 2);
  return nibble | (twos[kTileRows * (index % (kLines / 4)) + lane] >> index / (kLines / 4) * 2 & 3) << 4;
}

// The codes of a row of a group, or what they look up, less the zero point.
template <Storage kStorage>
void unpack_codes(const uint8_t* codes, int lane, int group, int* out) {
  constexpr Traits kTraits = traits(kStorage);
  for (int i = 0; i < kGroup; ++i) {
    const int byte = lane * 4 + i % 4;
    int chunk = i / 4, code = 0;
    if constexpr (kTraits.bits == 0) {
      chunk += group % kSuperGroups * 8;
      code = codes[kLineBytes * (chunk / 5) + byte];
      for (int place = chunk % 5; place < 4; ++place) code /= 3;
      code %= 3;
    }
    for (Plane p = first_plane(kTraits.bits); p.bits != 0; p = next_plane(kTraits.bits, p)) {
      const int per_line = 8 / p.bits, line = plane_line(kTraits.bits, p) + chunk / per_line;
      code |= (codes[kLineBytes * line + byte] >> chunk % per_line * p.bits & ((1 << p.bits) - 1)) << p.first;
    }
    if constexpr (kTraits.levels == Levels::uneven) code = kUnevenLevels[code];
    if constexpr (kTraits.levels == Levels::e2m1) code = kE2m1Levels[code];
    out[i] = code - kTraits.zero;
  }
}

// Values of one group of a row: code * scale (+ minimum), rounded after each as files' storages are defined.
template <Storage kStorage>
void unpack_group(const uint8_t* tile, int lane, int group, float* out) {
  constexpr Traits kTraits = traits(kStorage);
  const GroupPlace place = group_place(kStorage, group);
  const uint8_t *header = tile + place.scales, *lines = header + lines_place(kStorage);
  const auto* halves = reinterpret_cast<const uint16_t*>(header) + lane;
  int codes[kGroup];
  unpack_codes<kStorage>(tile + place.codes, lane, group, codes);
  constexpr bool kExponent = kTraits.scale == Scale::exponent;
  const float first = kExponent ? four_exponent_scale(header[lane]) : widen_f16(halves);
  const float second = kTraits.minimum == Minimum::none ? 0.0f : widen_f16(halves + kTileRows);
  constexpr int kStep = kTraits.group == 16 ? 16 : kGroup;
  constexpr float kUnit = kExponent ? 0.25f : 1.0f;
  for (int i = 0; i < kGroup; i += kStep) {
    float scale = first, minimum = second;
    if constexpr (header_lines(kStorage) > 0) {
      const int index = (group % kSuperGroups * kGroup + i) / kTraits.group;
      scale *= float(header_number<kStorage>(lines, lane, index) - kTraits.scale_zero);
      if constexpr (kTraits.minimum == Minimum::integer) {
        minimum *= -float(header_number<kStorage>(lines, lane, scale_lines(kStorage) + index));
      }
    }
    for (int j = i; j < i + kStep; ++j) {
      out[j] = float(codes[j]) * kUnit * scale;
      if constexpr (kTraits.minimum != Minimum::none) out[j] += minimum;
    }
  }
}

void unpack_pairs(const uint8_t* tile, int lane, int column, int cols, float* out) {
  for (int c = column; c < column + kGroup && c < cols; ++c) {
    uint16_t half;
    std::memcpy(&half, tile + (size_t(c / 2) * kTileRows + lane) * 4 + c % 2 * 2, 2);
    const uint32_t wide = uint32_t(half) << 16;
    std::memcpy(out + (c - column), &wide, 4);
  }
}

// Columns [column, column + 32) of a row; those beyond the matrix are left alone.
void unpack_columns(const MatrixView& matrix, int64_t row, int column, float* out) {
  const uint8_t* tile = matrix.data + row / kTileRows * tile_bytes(matrix.storage, matrix.cols);
  const int lane = int(row % kTileRows);
  if (is_quantised(matrix.storage)) {
    return with_quantised(matrix.storage, [&](auto tag) {
      unpack_group<tag.value>(tile, lane, column / kGroup, out);
    });
  }
  if (matrix.storage == Storage::bf16) return unpack_pairs(tile, lane, column, matrix.cols, out);
  for (int i = 0; i < kGroup && column + i < matrix.cols; ++i) {
    std::memcpy(out + i, tile + (size_t(column + i) * kTileRows + lane) * 4, 4);
  }
}

}  // namespace

void embed(const EmbedLaunch& launch, const StepView& step, Worker& worker) {
  const Target out{.f32 = launch.out, .accumulate = launch.accumulate};
  const int32_t* ids = launch.by_position ? step.positions : step.tokens;
  for_rows(worker, step.rows, 1, [&](int64_t row) {
    write_row(out, row, launch.matrix.cols, [&](int column, vfloat& a, vfloat& b) {
      float values[kGroup] = {};
      unpack_columns(launch.matrix, ids[row], column, values);
      a = load(values) * splat(launch.scale);
      b = load(values + 16) * splat(launch.scale);
    });
  });
}

void unpack_row(const MatrixView& matrix, int64_t row, float* out) {
  for (int column = 0; column < matrix.cols; column += kGroup) {
    float values[kGroup];
    unpack_columns(matrix, row, column, values);
    const int count = matrix.cols - column < kGroup ? matrix.cols - column : kGroup;
    std::memcpy(out + column, values, size_t(count) * sizeof(float));
  }
}

RIDGELINE_END
