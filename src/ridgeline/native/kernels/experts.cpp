// The experts' products, grouped by expert, and the sum of what they gave.
#include "linear_finish.h"

RIDGELINE_BEGIN

namespace {

// How a launch is cut into units. It decides who computes what, never how, and depends on the number of rows
// alone, not on their routes: a worker that comes late to a phase must count the units that the others did.
struct Cut {
  int64_t blocks;  // at most; units of those that there are not do nothing
  int64_t pairs_per_unit, pair_units;
};

Cut cut(const ExpertLaunch& launch, int64_t rows, int threads) {
  constexpr int64_t kUnitsPerWorker = 8;
  constexpr int64_t kBytesPerUnit = 384 << 10;  // of weights: gathering rows pays off over several pairs
  const int64_t pairs = rows * launch.routes.chosen;
  Cut c{};
  c.blocks = (pairs < launch.count ? pairs : launch.count) + pairs / kBlockPairs;
  const int64_t tiles = pair_count(launch.part.matrix), fitting = kBytesPerUnit / pair_bytes(launch.part),
                wanted = tiles * c.blocks / (kUnitsPerWorker * threads);
  c.pairs_per_unit = wanted < fitting ? wanted : fitting;
  if (c.pairs_per_unit < 1) c.pairs_per_unit = 1;
  c.pair_units = (tiles + c.pairs_per_unit - 1) / c.pairs_per_unit;
  return c;
}

LinearPart part_of(const LinearPart& first, int64_t expert) {
  LinearPart part = first;
  part.matrix.data += expert * int64_t(part.matrix.bytes());
  if (part.gate.data != nullptr) part.gate.data += expert * int64_t(part.gate.bytes());
  if (part.bias != nullptr) part.bias += expert * part.matrix.rows;
  if (part.gate_bias != nullptr) part.gate_bias += expert * part.matrix.rows;
  return part;
}

// The bytes of a row, and a line more: rows of a power of two would share few places of the cache.
RIDGELINE_INLINE int64_t gathered_bytes(const ExpertLaunch& launch) {
  return launch.x.row_bytes + int64_t(kLineBytes);
}

// Rows of x for some pairs, side by side. Those at equal distances, as one or two always are, are read where
// they lie.
InputRows gather(const ExpertLaunch& launch, const int32_t* pairs, int count, uint8_t* scratch) {
  const auto place = [&](int i) {
    return (launch.x_by_expert ? pairs[i] : pairs[i] / launch.routes.chosen) * launch.x.row_bytes;
  };
  const int64_t distance = count > 1 ? place(1) - place(0) : launch.x.row_bytes;
  bool even = true;
  for (int i = 2; i < count; ++i) even = even && place(i) - place(i - 1) == distance;
  if (even) return {launch.x.data + place(0), distance};
  const int64_t bytes = gathered_bytes(launch);
  for (int i = 0; i < count; ++i)
    std::memcpy(scratch + i * bytes, launch.x.data + place(i), size_t(launch.x.row_bytes));
  return {scratch, bytes};
}

// Pairs of tiles [first, last) for the rows of a block.
void run_block(const ExpertLaunch& launch, const StepView& step, const RouteBlock& block, int64_t first,
               int64_t last, uint8_t* scratch) {
  alignas(64) float y[kMaxTokens * kResultStride], gate[kMaxTokens * kResultStride];
  const LinearPart part = part_of(launch.part, block.expert);
  const int32_t* pairs = launch.routes.pairs() + block.begin;
  for (int begin = 0; begin < block.count; begin += kMaxTokens) {
    const int tokens = block.count - begin < kMaxTokens ? block.count - begin : kMaxTokens;
    const InputRows x = gather(launch, pairs + begin, tokens, scratch);
    for (int64_t pair = first; pair < last; ++pair) {
      const PairInput in{part, x, pair};
      compute_pair(in, tokens, y, gate);
      for (int t = 0; t < tokens; ++t) write_values(in, step, pairs[begin + t], 1, y + t * kResultStride);
    }
  }
}

}  // namespace

size_t expert_scratch_bytes(const ExpertLaunch& launch) {
  return size_t(kMaxTokens) * size_t(gathered_bytes(launch));
}

void experts(const ExpertLaunch& launch, const StepView& step, Worker& worker) {
  const Cut c = cut(launch, step.rows, worker.team->threads());
  worker.for_units(c.blocks * c.pair_units, [&](int64_t unit) {
    const int64_t block = unit / c.pair_units, first = unit % c.pair_units * c.pairs_per_unit;
    if (block >= *launch.routes.block_count()) return;
    const int64_t end = first + c.pairs_per_unit, pairs = pair_count(launch.part.matrix);
    run_block(launch, step, launch.routes.blocks()[block], first, end < pairs ? end : pairs, worker.scratch);
  });
}

void combine(const CombineLaunch& launch, const StepView& step, Worker& worker) {
  constexpr int64_t kColumns = 512;
  const int chosen = launch.routes.chosen;
  const A8Layout layout = a8_layout(launch.width);
  const int64_t per_row = (launch.width + kColumns - 1) / kColumns;
  worker.for_units(per_row * step.rows, [&](int64_t unit) {
    const int64_t row = unit / per_row, begin = unit % per_row * kColumns;
    const float* scores = launch.routes.scores(row);
    const float* x = launch.x.data + row * chosen * launch.x.stride;
    const auto value = [&](int64_t column) {
      const vmask m = first_lanes(int(launch.width - column));
      vfloat sum = splat(scores[0]) * load(m, x + column);
      for (int k = 1; k < chosen; ++k)
        sum = fma(splat(scores[k]), load(m, x + k * launch.x.stride + column), sum);
      if (launch.shared.data == nullptr) return sum;
      return fma(splat(scores[chosen]), load(m, launch.shared.data + row * launch.shared.stride + column),
                 sum);
    };
    for (int64_t c = begin; c < begin + kColumns && c < launch.width; c += kGroup) {
      write_group(launch.out, layout, {row, int(c), int(launch.width - c)}, value(c), value(c + 16));
    }
  });
}

RIDGELINE_END
