// Linear layers: pairs of tiles times blocks of rows, with bias, gate, activation and quantisation.
#include "linear_finish.h"

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
  constexpr int64_t kRowsPerUnit = 66, kUnitsPerWorker = 8;
  constexpr int64_t kBytesPerUnit = 128 << 10;  // of weights, to stay in the second-level cache
  Cut c{};
  for (const LinearPart& part : launch.parts) c.pairs += pair_count(part.matrix);
  c.rows_per_unit = rows < kRowsPerUnit ? rows : kRowsPerUnit;
  const int64_t row_units = (rows + c.rows_per_unit - 1) / c.rows_per_unit;
  const LinearPart& part = launch.parts.front();
  const int64_t fitting = kBytesPerUnit / pair_bytes(part),
                wanted = c.pairs * row_units / (kUnitsPerWorker * threads);
  c.pairs_per_unit = wanted < fitting ? wanted : fitting;
  if (c.pairs_per_unit < 1) c.pairs_per_unit = 1;
  c.pair_units = (c.pairs + c.pairs_per_unit - 1) / c.pairs_per_unit;
  c.units = c.pair_units * row_units;
  return c;
}

void run_pair(const PairInput& in, const StepView& step, int64_t row, int tokens) {
  alignas(64) float y[kMaxTokens * kResultStride];
  compute_pair(in, tokens, y);
  write_values(in, step, row, tokens, y);
}

// Pairs [first, first + count) of all parts, for a few rows.
void run_pairs(const LinearLaunch& launch, const StepView& step, int64_t first, int64_t count, int64_t row,
               int tokens) {
  const InputRows x{launch.x.data + row * launch.x.row_bytes, launch.x.row_bytes};
  for (const LinearPart& part : launch.parts) {
    const int64_t pairs = pair_count(part.matrix);
    for (; first < pairs && count > 0; ++first, --count) run_pair({part, x, first}, step, row, tokens);
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
    const int64_t count = row_end - row_begin, blocks = (count + kMaxTokens - 1) / kMaxTokens;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = row_begin + count * block / blocks;
      const int tokens = int(row_begin + count * (block + 1) / blocks - row);
      run_pairs(launch, step, unit % c.pair_units * c.pairs_per_unit, c.pairs_per_unit, row, tokens);
    }
  });
}

RIDGELINE_END
