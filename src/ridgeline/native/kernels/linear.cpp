// Linear layers: pairs of tiles times blocks of rows, with bias, gate, activation and quantisation.
#include "linear_finish.h"

RIDGELINE_BEGIN

double peak_ratio(PeakFormat, PeakFormat);

namespace {

// Most rows of a unit whose weights are unpacked for all of its rows, and least for which that pays off: with
// scales for each half of a group only one tile is multiplied at once otherwise.
constexpr int64_t kPanelRows = 264, kLeastPanelRows = 48, kLeastHalvesRows = 24;
constexpr int64_t kFewBlocks = 8;      // of rows, in which memory is still the limit for part of the time
constexpr int64_t kRegisterRows = 12;  // whole register tiles of any number of rows

// Whether unpacking takes the places of products, as where a core begins two operations of 64 bytes a cycle,
// whatever they are. Others begin one product a cycle and some other operation beside it.
bool unpacking_delays() {
  static const bool delays = peak_ratio(PeakFormat::int8, PeakFormat::int8_unpacked) > 1.4;
  return delays;
}

bool uses_panels(const MatrixView& matrix, int64_t rows) {
  const int64_t least = has_halves(matrix.storage) ? kLeastHalvesRows : kLeastPanelRows;
  if (!has_panels(matrix.storage) || rows < least) return false;
  return !unpacks_easily(matrix.storage) || unpacking_delays();
}

bool uses_panels(const LinearPart& part, int64_t rows) {
  return uses_panels(part.matrix, rows) && (part.gate.data == nullptr || uses_panels(part.gate, rows));
}

bool uses_panels(const LinearLaunch& launch, int64_t rows) {
  bool any = false;
  for (const LinearPart& part : launch.parts) any = any || uses_panels(part, rows);
  return any;
}

// Rows that a launch computes: at most `rows` in each run.
struct Runs {
  const RowRun* data;
  int count;
  int64_t rows;
};

// How a launch is cut into units. It decides who computes what, never how.
struct Cut {
  int64_t pairs;           // of output tiles, over all parts
  int64_t pairs_per_unit;  // neighbours in memory
  int64_t rows_per_unit;
  int64_t pair_units, row_units;
};

// Even runs of rows, enough of them to give every worker something to do.
int64_t panel_rows(int64_t rows, int64_t pairs, int threads) {
  int64_t runs = (rows + kPanelRows - 1) / kPanelRows;
  while (pairs * runs < 4 * threads && rows / (2 * runs) >= 2 * kLeastPanelRows) runs *= 2;
  return int64_t(round_up(size_t((rows + runs - 1) / runs), kRegisterRows));
}

int64_t row_units(const RowRun& run, int64_t rows_per_unit) {
  return (run.count + rows_per_unit - 1) / rows_per_unit;
}

Cut cut(const LinearLaunch& launch, const Runs& runs, int threads) {
  constexpr int64_t kRowsPerUnit = 66, kUnitsPerWorker = 8;
  constexpr int64_t kBytesPerUnit = 128 << 10;  // of weights, to stay in the second-level cache
  const int64_t rows = runs.rows;
  Cut c{};
  for (const LinearPart& part : launch.parts) c.pairs += pair_count(part.matrix);
  c.rows_per_unit = rows < kRowsPerUnit ? rows : kRowsPerUnit;
  if (uses_panels(launch, rows)) c.rows_per_unit = panel_rows(rows, c.pairs, threads);
  for (int i = 0; i < runs.count; ++i) c.row_units += row_units(runs.data[i], c.rows_per_unit);
  const LinearPart& part = launch.parts.front();
  const int64_t fitting = kBytesPerUnit / pair_bytes(part),
                wanted = c.pairs * c.row_units / (kUnitsPerWorker * threads);
  c.pairs_per_unit = wanted < fitting ? wanted : fitting;
  if (c.pairs_per_unit < 1) c.pairs_per_unit = 1;
  c.pair_units = (c.pairs + c.pairs_per_unit - 1) / c.pairs_per_unit;
  return c;
}

// Where a worker keeps the results of a pair, and of its gates.
struct Results {
  float *y, *gate;
};

// Pairs [first, first + count) of a part for some rows, at most `most` at once.
struct Span {
  int64_t first, count, begin, end;
};
void run_pairs(const LinearLaunch& launch, const LinearPart& part, const StepView& step, const Span& span,
               int64_t most, const Results& results) {
  // A few blocks of rows go by while a pair stays in the nearest caches, and the next one comes meanwhile. With
  // more, arithmetic is the limit: each block stays in the first-level cache while all pairs go by.
  const int64_t rows = span.end - span.begin, blocks = (rows + most - 1) / most;
  const int64_t together = blocks <= kFewBlocks ? blocks : 1;
  const auto run_blocks = [&](int64_t pair, int64_t first) {
    for (int64_t block = first; block < first + together; ++block) {
      const int64_t row = span.begin + rows * block / blocks;
      const int count = int(span.begin + rows * (block + 1) / blocks - row);
      const InputRows x{launch.x.data + row * launch.x.row_bytes, launch.x.row_bytes};
      const PairInput in{part, x, pair, block - first, together};
      compute_pair(in, count, results.y, results.gate);
      write_values(in, step, row, count, results.y);
    }
  };
  for (int64_t first = 0; first < blocks; first += together) {
    for (int64_t pair = span.first; pair < span.first + span.count; ++pair) run_blocks(pair, first);
  }
}

// Pairs of all parts, counted through.
void run_unit(const LinearLaunch& launch, const StepView& step, Span span, uint8_t* scratch) {
  alignas(64) float y[kMaxTokens * kResultStride], gate[kMaxTokens * kResultStride];
  float* many = reinterpret_cast<float*>(scratch);
  for (const LinearPart& part : launch.parts) {
    const int64_t left = pair_count(part.matrix) - span.first, count = span.count < left ? span.count : left;
    const bool panels = uses_panels(part, span.end - span.begin);
    if (count > 0) {
      const Results results = panels ? Results{many, many + kPanelRows * kResultStride} : Results{y, gate};
      const Span some = {span.first, count, span.begin, span.end};
      run_pairs(launch, part, step, some, panels ? kPanelRows : kMaxTokens, results);
      span.count -= count;
      span.first = 0;
    } else {
      span.first = -left;
    }
    if (span.count == 0) return;
  }
}

}  // namespace

size_t linear_scratch_bytes(const LinearLaunch& launch) {
  return uses_panels(launch, kPanelRows) ? 2 * sizeof(float) * size_t(kPanelRows * kResultStride) : 0;
}

void linear(const LinearLaunch& launch, const StepView& step, Worker& worker) {
  const RowRun gathered{0, step.outputs};
  const Runs runs = launch.outputs_only ? Runs{&gathered, 1, step.outputs}
                                        : Runs{step.runs, step.run_count, step.chosen_rows};
  if (runs.rows == 0) return;
  const Cut c = cut(launch, runs, worker.team->threads());
  worker.for_units(c.pair_units * c.row_units, [&](int64_t unit) {
    const RowRun* run = runs.data;
    int64_t place = unit / c.pair_units;
    for (int64_t n; place >= (n = row_units(*run, c.rows_per_unit)); ++run) place -= n;
    const int64_t run_end = int64_t(run->begin) + run->count, begin = run->begin + place * c.rows_per_unit;
    const int64_t end = begin + c.rows_per_unit < run_end ? begin + c.rows_per_unit : run_end;
    const int64_t first = unit % c.pair_units * c.pairs_per_unit;
    run_unit(launch, step, {first, c.pairs_per_unit, begin, end}, worker.scratch);
  });
}

RIDGELINE_END
