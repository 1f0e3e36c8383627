// Routing: the experts of each row, and the list of work that the experts' products share.
//
// A row's router scores are sums of pieces of kPieceColumns inputs, added in order, so that a single row has
// work for many workers; what a row computes does not depend on how many rows there are.
#include <limits>

#include "linear.h"
#include "vector_math.h"

RIDGELINE_BEGIN

namespace {

constexpr int kPieceColumns = 512;
constexpr float kNone = -std::numeric_limits<float>::infinity();

// The pieces of a row's product with the router, each 16 scores of kPieceColumns inputs.
struct Pieces {
  explicit Pieces(const MatrixView& router)
      : tiles(tile_count(router.rows)), splits((router.cols + kPieceColumns - 1) / kPieceColumns) {}
  int width() const { return tiles * kTileRows; }
  size_t row_values() const { return size_t(splits) * size_t(width()); }

  int64_t count() const { return int64_t(tiles) * splits; }

  int tiles, splits;
};

// (splits, scores) of a row.
float* partial_scores(const Pieces& pieces, const StepView& step, int64_t row) {
  return reinterpret_cast<float*>(step.partials) + size_t(row) * pieces.row_values();
}

struct RowRange {
  int64_t begin;
  int count;
};
RowRange rows_of_block(const StepView& step, int64_t block) {
  const int64_t begin = block * kMaxTokens, left = step.rows - begin;
  return {begin, int(left < kMaxTokens ? left : kMaxTokens)};
}

void multiply_piece(const RouteLaunch& launch, const StepView& step, RowRange rows, int tile, int split) {
  const MatrixView& router = launch.router;
  const Pieces pieces(router);
  const int begin = split * kPieceColumns, left = router.cols - begin;
  const uint8_t* weights = router.data + size_t(tile) * tile_bytes(Storage::f32, router.cols) +
                           size_t(begin) * kTileRows * sizeof(float);
  const float* x = launch.x.data + rows.begin * launch.x.stride + begin;
  alignas(64) float y[kMaxTokens * kResultStride];
  multiply_tiles(Storage::f32,
                 {weights, 0, reinterpret_cast<const uint8_t*>(x), launch.x.stride * int64_t(sizeof(float)),
                  left < kPieceColumns ? left : kPieceColumns},
                 rows.count, y);
  for (int t = 0; t < rows.count; ++t) {
    store(partial_scores(pieces, step, rows.begin + t) + split * pieces.width() + tile * kTileRows,
          load(y + t * kResultStride));
  }
}

// Scores before the softmax; those of no expert are minus infinity.
void sum_scores(const RouteLaunch& launch, const StepView& step, int64_t row, float* scores) {
  const Pieces pieces(launch.router);
  const float* parts = partial_scores(pieces, step, row);
  for (int c = 0; c < pieces.width(); c += 16) {
    vfloat sum = load(parts + c);
    for (int s = 1; s < pieces.splits; ++s) sum = sum + load(parts + s * pieces.width() + c);
    const vmask m = first_lanes(launch.router.rows - c);
    if (launch.bias != nullptr) sum = sum + load(m, launch.bias + c);
    store(scores + c, select(m, sum, splat(kNone)));
  }
}

float largest(const float* scores, int width) {
  vfloat top = splat(kNone);
  for (int c = 0; c < width; c += 16) top = max(top, load(scores + c));
  return reduce_max(top);
}

struct Pick {
  int32_t expert;
  float score;
};

// Takes the first of the largest scores away; where they are not numbers, any that is left.
Pick take_largest(float* scores, int count, int width, bool* taken) {
  const float top = largest(scores, width);
  int found = -1;
  for (int i = 0; i < count; ++i) {
    if (taken[i] || (found >= 0 && scores[i] != top)) continue;
    found = i;
    if (scores[i] == top) break;
  }
  const Pick pick{found, scores[found]};
  taken[found] = true;
  scores[found] = kNone;
  return pick;
}

float shared_score(const RouteLaunch& launch, const float* x) {
  const int cols = launch.router.cols;
  vfloat acc[4] = {zero(), zero(), zero(), zero()};
  for (int column = 0; column < cols; column += 64) {
    for (int i = 0; i < 4; ++i) {
      const vmask m = first_lanes(cols - column - 16 * i);
      const int c = column + 16 * i;
      acc[i] = fma(load(m, x + c), load(m, launch.shared_gate + c), acc[i]);
    }
  }
  alignas(64) float score[16];
  store(score, sigmoid(splat(reduce_add((acc[0] + acc[1]) + (acc[2] + acc[3])))));
  return score[0];
}

vfloat sum_of_exp(const float* scores, int width, vfloat top) {
  vfloat sum = zero();
  for (int c = 0; c < width; c += 16) sum = sum + exp(load(scores + c) - top);
  return splat(reduce_add(sum));
}

void route_row(const RouteLaunch& launch, const StepView& step, int64_t row) {
  alignas(64) float scores[kMaxExperts], kept[kMaxExperts];
  bool taken[kMaxExperts];
  const int count = launch.router.rows, chosen = launch.out.chosen;
  const int width = tile_count(count) * kTileRows, kept_width = tile_count(chosen) * kTileRows;
  std::memset(taken, 0, size_t(count));
  sum_scores(launch, step, row, scores);
  const vfloat top = splat(largest(scores, width));
  vfloat total = sum_of_exp(scores, width, top);
  // Picked by the scores before the softmax, which may round different ones to the same.
  int32_t* out = launch.out.data + row * launch.out.width;
  for (int c = 0; c < kept_width; c += 16) store(kept + c, splat(kNone));
  for (int k = 0; k < chosen; ++k) {
    const Pick pick = take_largest(scores, count, width, taken);
    out[k] = pick.expert;
    kept[k] = pick.score;
  }
  if (launch.renormalise) total = sum_of_exp(kept, kept_width, top);
  float* out_scores = reinterpret_cast<float*>(out + chosen);
  for (int c = 0; c < chosen; c += 16)
    store(first_lanes(chosen - c), out_scores + c, exp(load(kept + c) - top) / total);
  if (launch.shared_gate != nullptr)
    out_scores[chosen] = shared_score(launch, launch.x.data + row * launch.x.stride);
}

// What the experts' products share: pairs by expert, in blocks.
void list_work(const Routes& routes, int32_t rows, int32_t experts) {
  int32_t next[kMaxExperts] = {};  // an expert's pairs, then where its next one goes
  const RoutesLayout layout = routes.layout();
  for (int32_t row = 0; row < rows; ++row) {
    for (int k = 0; k < routes.chosen; ++k) ++next[routes.data[row * int64_t(routes.width) + k]];
  }
  auto* blocks = reinterpret_cast<RouteBlock*>(routes.data + layout.blocks);
  int32_t block_count = 0, begin = 0;
  for (int32_t e = 0; e < experts; ++e) {
    const int32_t end = begin + next[e];
    next[e] = begin;
    for (; begin < end; begin = blocks[block_count].begin + blocks[block_count].count, ++block_count)
      blocks[block_count] = {e, begin, end - begin < kBlockPairs ? end - begin : kBlockPairs};
  }
  routes.data[routes.max_rows * routes.width] = block_count;
  int32_t* pairs = routes.data + layout.pairs;
  for (int32_t row = 0; row < rows; ++row) {
    for (int k = 0; k < routes.chosen; ++k)
      pairs[next[routes.data[row * int64_t(routes.width) + k]]++] = row * routes.chosen + k;
  }
}

}  // namespace

size_t route_partial_bytes(const RouteLaunch& launch) {
  return size_t(launch.out.max_rows) * Pieces(launch.router).row_values() * sizeof(float);
}

void route(const RouteLaunch& launch, const StepView& step, Worker& worker) {
  const Pieces pieces(launch.router);
  const int64_t blocks = (step.rows + kMaxTokens - 1) / kMaxTokens, each = pieces.count();
  const auto route_block = [&](int64_t block) {
    const RowRange rows = rows_of_block(step, block);
    for (int t = 0; t < rows.count; ++t) route_row(launch, step, rows.begin + t);
  };
  worker.for_units(blocks * each, [&](int64_t unit) {
    const int piece = int(unit % each);
    multiply_piece(launch, step, rows_of_block(step, unit / each), piece / pieces.splits,
                   piece % pieces.splits);
  });
  if (blocks > 1) worker.for_units(blocks, route_block);
  worker.for_units(1, [&](int64_t) {
    if (blocks == 1) route_block(0);
    list_work(launch.out, step.rows, launch.router.rows);
  });
}

RIDGELINE_END
