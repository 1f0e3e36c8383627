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

// Values of one group of a row of a quantised matrix: float(code - zero point) * scale (+ minimum).
void unpack_group(const MatrixView& matrix, const uint8_t* tile, int lane, int group, float* out) {
  const GroupPlace place = group_place(matrix.storage, group);
  const auto* scales = reinterpret_cast<const uint16_t*>(tile + place.scales) + lane;
  const uint8_t* codes = tile + place.codes;
  const float scale = widen_f16(scales);
  if (matrix.storage == Storage::q8_0) {
    for (int i = 0; i < kGroup; ++i) {
      out[i] = float(int(codes[i / 4 * 64 + lane * 4 + i % 4]) - 128) * scale;
    }
    return;
  }
  const bool has_minimum = matrix.storage == Storage::q4_1;
  const float minimum = has_minimum ? widen_f16(scales + kTileRows) : 0.0f;
  for (int i = 0; i < kGroup; ++i) {
    const int byte = codes[i / 8 * 64 + lane * 4 + i % 4], code = i % 8 < 4 ? byte & 15 : byte >> 4;
    out[i] = has_minimum ? float(code) * scale + minimum : float(code - 8) * scale;
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
  if (is_quantised(matrix.storage)) return unpack_group(matrix, tile, lane, column / kGroup, out);
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
