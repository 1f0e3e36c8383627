// Linear layers: pairs of tiles times blocks of rows, with bias, gate, activation and quantisation.
#include "linear.h"

#include "rows.h"
#include "vector_math.h"

RIDGELINE_BEGIN

namespace {

// How a launch is cut into units. It decides who computes what, never how.
struct Cut {
  int64_t pairs;           // of output tiles, over all parts
  int64_t pairs_per_unit;  // neighbours in memory
  int64_t rows_per_unit;
  int64_t pair_units, units;
};

Cut cut(const LinearLaunch& launch, int64_t rows, int threads) {
  constexpr int64_t kRowsPerUnit = 64, kUnitsPerWorker = 8;
  constexpr int64_t kBytesPerUnit = 128 << 10;  // of weights, to stay in the second-level cache
  Cut c{};
  for (const LinearPart& part : launch.parts) c.pairs += (tile_count(part.matrix.rows) + 1) / 2;
  c.rows_per_unit = rows < kRowsPerUnit ? rows : kRowsPerUnit;
  const int64_t row_units = (rows + c.rows_per_unit - 1) / c.rows_per_unit;
  const LinearPart& part = launch.parts.front();
  const int64_t pair_bytes =
      int64_t(tile_bytes(part.matrix.storage, part.matrix.cols)) * (part.gate.data != nullptr ? 4 : 2);
  const int64_t fitting = kBytesPerUnit / pair_bytes,
                wanted = c.pairs * row_units / (kUnitsPerWorker * threads);
  c.pairs_per_unit = wanted < fitting ? wanted : fitting;
  if (c.pairs_per_unit < 1) c.pairs_per_unit = 1;
  c.pair_units = (c.pairs + c.pairs_per_unit - 1) / c.pairs_per_unit;
  c.units = c.pair_units * row_units;
  return c;
}

struct PairInput {
  const LinearLaunch& launch;
  const LinearPart& part;
  int64_t pair;
};

void multiply_pair(const PairInput& in, const MatrixView& matrix, int64_t row, int tokens, float* y) {
  const InputRows& x = in.launch.x;
  const size_t bytes = tile_bytes(matrix.storage, matrix.cols);
  for (int half = 0; half < 2; ++half) {
    const int64_t tile = 2 * in.pair + half;
    if (tile < tile_count(matrix.rows)) {
      multiply_tile(
          matrix.storage,
          {matrix.data + tile * bytes, x.data + row * x.row_bytes, x.row_bytes, matrix.cols}, tokens,
          y + half * kTileRows);
    } else {
      for (int t = 0; t < tokens; ++t) store(y + t * kResultStride + half * kTileRows, zero());
    }
  }
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
        store(y + i,
              gate == nullptr ? activated<kKind>(v) : activated<kKind>(load(gate + i) + gate_bias) * v);
      }
    }
  });
}

void write_values(const PairInput& in, const StepView& step, int64_t row, int tokens, const float* y) {
  Target out = in.part.out;
  if (out.is_logits()) out.f32 = {step.logits, step.vocabulary};
  const int width = in.part.matrix.rows, column = int(in.pair) * kResultStride;
  const A8Layout layout = a8_layout(width);
  for (int t = 0; t < tokens; ++t, y += kResultStride)
    write_group(out, layout, {row + t, column, width - column}, load(y), load(y + kTileRows));
}

void run_pair(const PairInput& in, const StepView& step, int64_t row, int tokens) {
  alignas(64) float y[kMaxTokens * kResultStride], gate[kMaxTokens * kResultStride];
  multiply_pair(in, in.part.matrix, row, tokens, y);
  if (in.part.gate.data != nullptr) multiply_pair(in, in.part.gate, row, tokens, gate);
  finish_values(in, tokens, y, in.part.gate.data != nullptr ? gate : nullptr);
  write_values(in, step, row, tokens, y);
}

// Pairs [first, first + count) of all parts, for a few rows.
void run_pairs(const LinearLaunch& launch, const StepView& step, int64_t first, int64_t count, int64_t row,
               int tokens) {
  for (const LinearPart& part : launch.parts) {
    const int64_t pairs = (tile_count(part.matrix.rows) + 1) / 2;
    for (; first < pairs && count > 0; ++first, --count) run_pair({launch, part, first}, step, row, tokens);
    if (count == 0) return;
    first -= pairs;
  }
}

}  // namespace

void linear(const LinearLaunch& launch, const StepView& step, Worker& worker) {
  const int64_t rows = launch.outputs_only ? step.outputs : step.rows;
  if (rows == 0) return;
  const Cut c = cut(launch, rows, worker.team->threads());
  worker.for_units(c.units, [&](int64_t unit) {
    const int64_t row_begin = unit / c.pair_units * c.rows_per_unit;
    const int64_t row_end = row_begin + c.rows_per_unit < rows ? row_begin + c.rows_per_unit : rows;
    // A few rows stay in the first-level cache while the unit's weights pass from the second.
    for (int64_t row = row_begin; row < row_end; row += kMaxTokens) {
      const int tokens = int(row_end - row < kMaxTokens ? row_end - row : kMaxTokens);
      run_pairs(launch, step, unit % c.pair_units * c.pairs_per_unit, c.pairs_per_unit, row, tokens);
    }
  });
}

RIDGELINE_END
