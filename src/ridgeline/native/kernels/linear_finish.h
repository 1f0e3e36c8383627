// What a linear does with a pair of tiles and a few rows: products, bias, gate and activation, and writing.
#pragma once

#include "linear.h"
#include "rows.h"
#include "vector_math.h"

RIDGELINE_BEGIN

namespace {

struct PairInput {
  const LinearPart& part;
  InputRows x;  // from the first of the rows
  int64_t pair;
  int64_t block = 0, blocks = 1;  // of rows that the pair is multiplied by one after the other
};

RIDGELINE_INLINE int64_t pair_count(const MatrixView& matrix) { return (tile_count(matrix.rows) + 1) / 2; }

// Bytes of weights behind a pair of tiles of results.
RIDGELINE_INLINE int64_t pair_bytes(const LinearPart& part) {
  return int64_t(tile_bytes(part.matrix.storage, part.matrix.cols)) * (part.gate.data != nullptr ? 4 : 2);
}

// Where the weights lie that are fetched while a pair of tiles is multiplied. What follows in memory is mostly what
// comes next.
RIDGELINE_INLINE int64_t ahead_of(const PairInput& in, int64_t tile_bytes, int rows) {
  return rows <= kFewTokens ? kFewAhead : 2 * tile_bytes + tile_bytes * in.block / in.blocks;
}

// More than kMaxTokens rows are for storages that have panels.
void multiply(const PairInput& in, const MatrixView& matrix, int rows, float* y) {
  const int64_t bytes = int64_t(tile_bytes(matrix.storage, matrix.cols)), tile = 2 * in.pair;
  const bool both = tile + 1 < tile_count(matrix.rows);
  const TileInput tiles = {matrix.data + tile * bytes, both ? bytes : 0, in.x.data, in.x.row_bytes,
                           matrix.cols, int32_t(in.blocks), ahead_of(in, bytes, rows)};
  (rows > kMaxTokens ? multiply_panels : multiply_tiles)(matrix.storage, tiles, rows, y);
  for (int t = 0; !both && t < rows; ++t) store(y + t * kResultStride + kTileRows, zero());
}

RIDGELINE_INLINE vfloat load_bias(const float* bias, int64_t column, int64_t width) {
  return bias == nullptr ? zero() : load(first_lanes(int(width - column)), bias + column);
}

// Bias, gate and activation, in place.
void finish_values(const PairInput& in, int tokens, float* y, const float* gate) {
  const LinearPart& part = in.part;
  if (part.bias == nullptr && gate == nullptr && part.activation == Activation::none) return;
  with_activation(part.activation, [&](auto tag) {
    constexpr Activation kKind = decltype(tag)::kind;
    for (int half = 0; half < 2; ++half) {
      const int64_t column = in.pair * kResultStride + half * kTileRows;
      const vfloat bias = load_bias(part.bias, column, part.matrix.rows);
      const vfloat gate_bias = load_bias(part.gate_bias, column, part.matrix.rows);
      for (int i = half * kTileRows; i < tokens * kResultStride; i += kResultStride) {
        const vfloat v = load(y + i) + bias;
        store(y + i, gate == nullptr ? activated<kKind>(v)
                                     : activated<kKind>(load(gate + i) + gate_bias) * gated<kKind>(v));
      }
    }
  });
}

// y[t][0..31] = the pair's results for row t. `gate` is as large as y.
void compute_pair(const PairInput& in, int rows, float* y, float* gate) {
  const bool has_gate = in.part.gate.data != nullptr;
  multiply(in, in.part.matrix, rows, y);
  if (has_gate) multiply(in, in.part.gate, rows, gate);
  finish_values(in, rows, y, has_gate ? gate : nullptr);
}

// Results of `tokens` rows from `row` of the target.
void write_values(const PairInput& in, const StepView& step, int64_t row, int tokens, const float* y) {
  Target out = in.part.out;
  if (out.is_logits()) out.f32 = {step.logits, step.vocabulary};
  const int width = in.part.matrix.rows, column = int(in.pair) * kResultStride;
  const A8Layout layout = a8_layout(width);
  for (int t = 0; t < tokens; ++t, y += kResultStride)
    write_group(out, layout, {row + t, column, width - column}, load(y), load(y + kTileRows));
}

}  // namespace

RIDGELINE_END
