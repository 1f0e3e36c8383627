// Drawing a token from each row of logits; execution/draw.py has the rule, of which these are the bits. Rows are
// drawn from one by one, each by one worker, with denormals kept, as NumPy has them.
#include "candidates.h"
#include "noise.h"
#include "rows.h"

RIDGELINE_BEGIN

namespace {

constexpr float kNoFloor = -__builtin_inff();
constexpr int kBlocksAhead = 16;  // 4 KiB: logits of a batch are no longer in a core's own caches

// A worker's scratch.
struct DrawScratch {
  float *x, *tops, *before;  // scaled logits, tops of blocks, and what edits replaced
  CandidateList list;

  DrawScratch(uint8_t* memory, int32_t vocabulary) {
    const size_t padded = (size_t(vocabulary) + kDrawBlock - 1) / kDrawBlock * kDrawBlock;
    x = reinterpret_cast<float*>(memory);
    list.logits = x + padded + 64;
    list.ids = reinterpret_cast<int32_t*>(list.logits + padded + 64);
    list.weights = list.ids + padded + 64;
    tops = reinterpret_cast<float*>(list.weights + padded + 64);
    before = tops + padded / kDrawBlock + 64;
    list.count = 0;
  }
};

// Makes the edits, keeping what was there.
void edit(float* logits, const RowDraw& draw, float* before) {
  for (int64_t e = 0; e < draw.edit_count; ++e) {
    const LogitEdit& edit = draw.edits[e];
    for (int64_t i = 0; i < edit.count; ++i) {
      float& x = logits[edit.ids[i]];
      *before++ = x;
      if (edit.kind == EditKind::ban) x = kForbidden;
      if (edit.kind == EditKind::add) x = x + edit.amounts[i];
      if (edit.kind == EditKind::scale) x = x > 0.0f ? x / edit.factor : x * edit.factor;
    }
  }
}

// Takes the edits back, the last one first.
void restore(float* logits, const RowDraw& draw, const float* before) {
  before += draw.edited;
  for (int64_t e = draw.edit_count - 1; e >= 0; --e) {
    for (int64_t i = draw.edits[e].count - 1; i >= 0; --i) logits[draw.edits[e].ids[i]] = *--before;
  }
}

// The bits of a block in a mask.
RIDGELINE_INLINE uint64_t permitted(const int32_t* mask, int32_t block, int32_t count) {
  if (mask == nullptr) return ~uint64_t(0);
  const uint64_t low = uint32_t(mask[2 * block]);
  const bool whole = (2 * block + 1) * 32 < count;
  return whole ? low | uint64_t(uint32_t(mask[2 * block + 1])) << 32 : low;
}

// Division by a temperature, to the last bit: the quotient by its reciprocal, corrected once by what remains, is
// correctly rounded (Markstein 1990) where nothing comes near the ends of float32's range; elsewhere it is divided.
// A division takes the time of five such corrections or more. Of the zeros it gives the positive one.
class Divisor {
 public:
  explicit Divisor(float d)
      : d_(splat(d)), inverse_(splat(1.0f / d)), corrects_(kRoundsOnce && d > 0x1p-20f && d < 0x1p20f) {}

  // `magnitude`: the bits of x without its sign.
  vfloat divide(vfloat x, vint magnitude) const {
    const vfloat size = from_bits(magnitude);
    const unsigned within = mask_bits(less(splat(0x1p-60f), size)) & mask_bits(less(size, splat(0x1p60f)));
    if (within != 0xffff || !corrects_) return x / d_;
    const vfloat q = x * inverse_;
    return fma(fma(zero() - q, d_, x), inverse_, q);
  }

 private:
  vfloat d_, inverse_;
  bool corrects_;
};

// Scales and masks a row into `x`, unless there is nothing to do; finds the tops of its blocks and whether all
// that is permitted are numbers.
bool survey(const float* logits, const RowDraw& draw, DrawScratch& scratch, DrawnRow& row) {
  const bool scales = draw.temperature != 0.0f && draw.temperature != 1.0f, copies = scales || draw.mask != nullptr;
  const Divisor temperature(draw.temperature);
  const vfloat forbidden = splat(kForbidden);
  const vint magnitude = isplat(0x7fffffff);
  vint nan = izero();
  vfloat best = forbidden;
  for (int32_t block = 0; block < row.blocks; ++block) {
    uint64_t mask = permitted(draw.mask, block, row.count);
    scratch.tops[block] = kForbidden;
    const float* ahead = logits + (block + kBlocksAhead) * kDrawBlock;
    for (int i = 0; i < kDrawBlock; i += 16) prefetch(ahead + i);
    if (mask == 0) continue;
    vfloat top = forbidden;
    for (int32_t begin = block * kDrawBlock; begin < (block + 1) * kDrawBlock; begin += 16, mask >>= 16) {
      const vmask m = first_lanes(row.count - begin);
      vfloat x = select(m, load(m, logits + begin), forbidden);
      if (draw.mask != nullptr) x = select(mask_of(unsigned(mask & 0xffff)), x, forbidden);
      if (scales) x = temperature.divide(x, bit_and(bits(x), magnitude));
      if (copies) store(scratch.x + begin, x);
      nan = max(nan, bit_and(bits(x), magnitude));
      top = max(top, x);
      if (begin + 16 >= row.count) break;
    }
    scratch.tops[block] = reduce_max(top);
    best = max(best, top);
  }
  row.x = copies ? scratch.x : logits;
  row.tops = scratch.tops;
  row.best = reduce_max(best);
  return reduce_max(nan) <= 0x7f800000;
}

int32_t first_best(const DrawnRow& row) {
  int32_t block = 0;
  while (row.tops[block] != row.best) ++block;
  int32_t id = block * kDrawBlock;
  while (row.x[id] != row.best) ++id;
  return id;
}

// The k largest, of which there are more.
Floor top_k(const DrawnRow& row, int64_t k, const Floor& floor, CandidateList& list) {
  float bound = kNoFloor;
  const auto count_each = [&] {
    for (int32_t i = 0; i < list.count; ++i) list.weights[i] = 1;
  };
  if (k <= row.blocks) {  // so many blocks have a top of at least `bound`, hence at least as many tokens reach it
    list.count = 0;
    for (int32_t i = 0; i < row.blocks; ++i) {
      if (row.tops[i] == kForbidden) continue;
      list.logits[list.count] = row.tops[i];
      list.ids[list.count++] = i;
    }
    if (list.count >= k) {
      count_each();
      bound = reach(list, k).logit;
    }
  }
  gather(row, bound, floor, list);
  if (list.count < k) return floor;  // others are forbidden
  count_each();
  return reach(list, k);
}

// The fewest that hold p of what the floor keeps. Few tokens are near the best, and mostly they hold it.
Floor top_p(const DrawnRow& row, double p, const Floor& floor, CandidateList& list) {
  int64_t total = 0;
  if (floor.logit == kNoFloor) {
    total = total_weight(row, list);
  } else {
    gather(row, kNoFloor, floor, list);
    total = weigh(list, row.best);
  }
  const double enough = __builtin_ceil(p * double(total));
  const int64_t need = enough < 1.0 ? 1 : int64_t(enough);
  for (const float distance : {6.0f, 12.0f, kWeightReach}) {
    gather(row, row.best - distance, floor, list);
    if (weigh(list, row.best) >= need) break;
  }
  return reach(list, need);
}

struct Winner {
  float score;
  int32_t id;

  void offer(float other, int32_t other_id) {
    if (other < score || (other == score && other_id > id)) return;
    score = other;
    id = other_id;
  }
};

// One bit for each of sixteen tokens: those that can win at all, and with the noise that most tokens have at most.
struct Able {
  unsigned ever, usually;
};

// Among the tokens of `kBlocks` blocks of the generator from `begin` on, those that are able to win.
template <int kBlocks>
RIDGELINE_INLINE void try_tokens(const DrawnRow& row, const Floor& floor, const NoiseAddress& address,
                                 const NoiseBounds& bounds, int32_t begin, Able able, Winner& winner) {
  uint32_t numbers[16] = {};
  noise_bits<kBlocks>(address, uint64_t(begin / kNoiseTokens), numbers);
  const unsigned rare = mask_bits(less(splat(float(NoiseBounds::kUsual)), to_float(iload(numbers))));
  for (unsigned left = able.ever & (able.usually | rare); left != 0; left &= left - 1) {
    const int32_t place = __builtin_ctz(left), id = begin + place;
    const float x = row.x[id];
    if (x + bounds.of(numbers[place]) < winner.score) continue;
    if (x == floor.logit && id > floor.last_id) continue;
    winner.offer(x + gumbel(numbers[place]), id);
  }
}

// Gumbel-max over what the floor keeps. Rounded addition is monotonic: what does not reach the best sum so far
// with a bound of its noise cannot win.
int32_t most_after_noise(const DrawnRow& row, const Floor& floor, const NoiseAddress& address) {
  const NoiseBounds bounds = NoiseBounds::make();
  Winner winner{kForbidden, row.count};
  const int32_t best = first_best(row);
  const int32_t first = best / kNoiseTokens * kNoiseTokens;
  try_tokens<1>(row, floor, address, bounds, first, {1u << (best - first), ~0u}, winner);
  for (int32_t block = 0; block < row.blocks; ++block) {
    if (row.tops[block] < floor.logit || row.tops[block] + bounds.most < winner.score) continue;
    const int32_t end = (block + 1) * kDrawBlock < row.count ? (block + 1) * kDrawBlock : row.count;
    for (int32_t begin = block * kDrawBlock; begin < end; begin += 16) {
      const vfloat x = row.at(begin);
      const unsigned out = mask_bits(less(x, splat(floor.logit))) |
                           mask_bits(less(x + splat(bounds.most), splat(winner.score)));
      const Able able{~out & 0xffff, ~mask_bits(less(x + splat(bounds.usual), splat(winner.score)))};
      const bool low = (able.ever & 0xff) != 0, high = able.ever >> 8 != 0;
      if (low && high) try_tokens<2>(row, floor, address, bounds, begin, able, winner);
      if (low && !high) try_tokens<1>(row, floor, address, bounds, begin, able, winner);
      if (high && !low)
        try_tokens<1>(row, floor, address, bounds, begin + kNoiseTokens, {able.ever >> 8, able.usually >> 8}, winner);
    }
  }
  return winner.id;
}

int32_t drawn(const float* logits, int32_t vocabulary, const RowDraw& draw, DrawScratch& scratch) {
  DrawnRow row{logits, nullptr, vocabulary, (vocabulary + kDrawBlock - 1) / kDrawBlock, 0.0f};
  if (!survey(logits, draw, scratch, row)) return kNotDrawn;
  if (row.best == kForbidden || row.best == __builtin_inff()) return kNotDrawn;
  if (draw.temperature == 0.0f) return first_best(row);
  Floor floor{kNoFloor, vocabulary};
  if (draw.top_k > 0 && draw.top_k < vocabulary) floor = top_k(row, draw.top_k, floor, scratch.list);
  if (draw.top_p < 1.0) floor = top_p(row, draw.top_p, floor, scratch.list);
  const float least = row.best + draw.log_min_p;
  if (least > floor.logit) floor = {least, vocabulary};
  return most_after_noise(row, floor, {draw.seed, draw.position, draw.choice});
}

// Whether anything is left that may be drawn: what a mask permits gives way to nothing else.
bool leaves_nothing(const float* logits, int32_t vocabulary, const RowDraw& draw) {
  for (int32_t id = 0; id < vocabulary; ++id) {
    const bool may = (uint32_t(draw.mask[id / 32]) >> (id % 32) & 1) != 0;
    if (may && logits[id] != kForbidden) return false;
  }
  return true;
}

int32_t drawn_after_edits(float* logits, int32_t vocabulary, const RowDraw& draw, DrawScratch& scratch) {
  if (draw.edit_count == 0) return drawn(logits, vocabulary, draw, scratch);
  edit(logits, draw, scratch.before);
  const bool nothing = draw.mask != nullptr && leaves_nothing(logits, vocabulary, draw);
  const int32_t token = nothing ? kNotDrawn : drawn(logits, vocabulary, draw, scratch);
  restore(logits, draw, scratch.before);
  return nothing ? drawn(logits, vocabulary, draw, scratch) : token;
}

}  // namespace

void draw_rows(float* logits, int64_t rows, int32_t vocabulary, const RowDraw* draws, int32_t* tokens, Worker& worker) {
  DrawScratch scratch(worker.scratch, vocabulary);
  for_rows(worker, rows, 1, [&](int64_t row) {
    const RowDraw& draw = draws[row];
    tokens[row] = draw.wanted ? drawn_after_edits(logits + row * vocabulary, vocabulary, draw, scratch) : kNotDrawn;
  });
}

RIDGELINE_END
