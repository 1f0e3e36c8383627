// A row of logits as the filters see it, in blocks of 64 tokens of which the largest are known, and the search
// for the last token that a filter keeps. Nothing is sorted but a handful at the end of a search.
#pragma once

#include "../draw.h"
#include "simd.h"

RIDGELINE_BEGIN

constexpr int32_t kDrawBlock = 64;
constexpr float kForbidden = -__builtin_inff();

// Scaled logits, those of forbidden tokens -infinity. Blocks whose top is -infinity are not there to be read.
struct DrawnRow {
  const float* x;
  const float* tops;  // the largest of each block
  int32_t count, blocks;
  float best;

  vfloat at(int32_t begin) const {
    if (begin + 16 <= count) return load(x + begin);
    const vmask m = first_lanes(count - begin);
    return select(m, load(m, x + begin), splat(kForbidden));
  }
};

// The lowest logit that is kept, and of the tokens that have just that, the last.
struct Floor {
  float logit;
  int32_t last_id;
};

// Tokens in ascending order, with their logits; room for 16 more than the row has.
struct CandidateList {
  float* logits;
  int32_t* ids;
  int32_t* weights;
  int32_t count;
};

// Weights are whole numbers, so that their sums do not depend on any order: e^distance in units of 2^-30, by
// the arithmetic that `weights` of execution/draw.py spells out. No operation may be contracted.
constexpr float kWeightReach = 22.0f;  // weights are 0 from here down
RIDGELINE_INLINE vint weight_of(vfloat distance) {
  const vfloat d = max(distance, splat(-kWeightReach));
  const vfloat n = round_even(d * splat(1.44269504f));
  const vfloat r = (d - n * splat(0.693145752f)) - n * splat(1.42860677e-6f);
  const float terms[] = {0.5f, 0.166666657f, 0.0416662954f, 0.00833349768f, 0.00139447593f, 0.000197902482f};
  vfloat y = splat(terms[5]);
  for (int i = 4; i >= 0; --i) y = y * r + splat(terms[i]);
  const vfloat e = (r * r * y + r) + splat(1.0f);
  return truncate(times_power_of_two(e, n + splat(30.0f)) + splat(0.5f));
}

// A sum of many int32 of up to 2^30, by halves so that no lane overflows; for up to 2^19 tokens at a time.
struct WeightSum {
  static constexpr int32_t kMost = 1 << 19;
  vint low = izero(), high = izero();

  void add_weights(vint w) {
    low = add(low, bit_and(w, isplat(0x7fff)));
    high = add(high, shift_right<15>(w));
  }
  int64_t total() const {
    int32_t lanes[32];
    istore(lanes, low);
    istore(lanes + 16, high);
    int64_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += int64_t(lanes[i]) + (int64_t(lanes[16 + i]) << 15);
    return sum;
  }
};

RIDGELINE_INLINE vint chosen(vmask m, vint a, vint otherwise) {
  return bits(select(m, from_bits(a), from_bits(otherwise)));
}

// Weights of a list, and their sum.
inline int64_t weigh(CandidateList& list, float best) {
  int64_t total = 0;
  for (int32_t part = 0; part < list.count; part += WeightSum::kMost) {
    WeightSum sum;
    for (int32_t i = part; i < list.count && i < part + WeightSum::kMost; i += 16) {
      const vmask m = first_lanes(list.count - i);
      const vint w = chosen(m, weight_of(load(m, list.logits + i) - splat(best)), izero());
      istore(list.weights + i, w);
      sum.add_weights(w);
    }
    total += sum.total();
  }
  return total;
}

alignas(64) constexpr int32_t kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The finite logits of at least `bound` that the floor keeps.
inline void gather(const DrawnRow& row, float bound, const Floor& floor, CandidateList& list) {
  list.count = 0;
  const float least = bound > floor.logit ? bound : floor.logit;
  for (int32_t block = 0; block < row.blocks; ++block) {
    if (!(row.tops[block] >= least) || row.tops[block] == kForbidden) continue;
    const int32_t end = (block + 1) * kDrawBlock < row.count ? (block + 1) * kDrawBlock : row.count;
    for (int32_t begin = block * kDrawBlock; begin < end; begin += 16) {
      const vfloat x = row.at(begin);
      const unsigned hits = ~mask_bits(less(x, splat(least))) & mask_bits(less(splat(kForbidden), x)) & 0xffff;
      if (!kCompresses && hits == 0) continue;
      store_chosen(mask_of(hits), list.logits + list.count, x);
      store_chosen(mask_of(hits), list.ids + list.count, add(iload(kLanes), isplat(begin)));
      list.count += __builtin_popcount(hits);
    }
  }
  if (least > floor.logit || floor.logit == kForbidden) return;
  int32_t kept = 0;  // of equals at the floor, those up to its last
  for (int32_t i = 0; i < list.count; ++i) {
    if (list.logits[i] == floor.logit && list.ids[i] > floor.last_id) continue;
    list.logits[kept] = list.logits[i];
    list.ids[kept++] = list.ids[i];
  }
  list.count = kept;
}

// Numbers in the order of floats, both zeros one.
RIDGELINE_INLINE int64_t key_of(float x) {
  int32_t b;
  x = x + 0.0f;
  std::memcpy(&b, &x, 4);
  return b < 0 ? -int64_t(b & 0x7fffffff) : int64_t(b);
}
RIDGELINE_INLINE float float_of(int64_t key) {
  const int32_t b = int32_t(key < 0 ? -key : key);
  float x;
  std::memcpy(&x, &b, 4);
  return key < 0 ? -x : x;
}

// The weights of all tokens of a row. Most are far below the best and weigh nothing: where that takes one
// instruction, those that do weigh are brought together first. The list is left without ids.
inline int64_t total_weight(const DrawnRow& row, CandidateList& list) {
  list.count = 0;
  int64_t total = 0;
  const float least = row.best - kWeightReach;
  for (int32_t part = 0; part < row.count; part += WeightSum::kMost) {
    WeightSum sum;
    for (int32_t block = part; block < row.count && block < part + WeightSum::kMost; block += kDrawBlock) {
      if (!(row.tops[block / kDrawBlock] >= least)) continue;
      for (int32_t begin = block; begin < block + kDrawBlock && begin < row.count; begin += 16) {
        const vfloat x = row.at(begin);
        if constexpr (kCompresses) {
          const unsigned hits = ~mask_bits(less(x, splat(least))) & 0xffff;
          store_chosen(mask_of(hits), list.logits + list.count, x);
          list.count += __builtin_popcount(hits);
        } else {
          sum.add_weights(weight_of(x - splat(row.best)));
        }
      }
    }
    total += sum.total();
  }
  return kCompresses ? weigh(list, row.best) : total;
}

// What of a list is at least `bound`.
struct Share {
  int64_t weight;
  int32_t count;
};
inline Share share_above(const CandidateList& list, float bound) {
  Share share{0, 0};
  for (int32_t part = 0; part < list.count; part += WeightSum::kMost) {
    WeightSum sum;
    for (int32_t i = part; i < list.count && i < part + WeightSum::kMost; i += 16) {
      const vmask m = first_lanes(list.count - i);
      const vmask under = less(select(m, load(m, list.logits + i), splat(kForbidden)), splat(bound));
      sum.add_weights(chosen(under, izero(), iload(list.weights + i)));
      share.count += __builtin_popcount(~mask_bits(under) & 0xffff);
    }
    share.weight += sum.total();
  }
  return share;
}

// Keeps what lies from one bound to under another.
inline void narrow(CandidateList& list, float from, float under) {
  int32_t kept = 0;
  for (int32_t i = 0; i < list.count; i += 16) {
    const vfloat x = load(list.logits + i);
    const vint ids = iload(list.ids + i), weights = iload(list.weights + i);
    const unsigned in_list = mask_bits(first_lanes(list.count - i));
    const unsigned hits = ~mask_bits(less(x, splat(from))) & mask_bits(less(x, splat(under))) & in_list;
    store_chosen(mask_of(hits), list.logits + kept, x);
    store_chosen(mask_of(hits), list.ids + kept, ids);
    store_chosen(mask_of(hits), list.weights + kept, weights);
    kept += __builtin_popcount(hits);
  }
  list.count = kept;
}

// By descending logit; equals stay in their order.
inline void sort_handful(CandidateList& list) {
  for (int32_t i = 1; i < list.count; ++i) {
    const float logit = list.logits[i];
    const int32_t id = list.ids[i], weight = list.weights[i];
    int32_t to = i;
    for (; to > 0 && list.logits[to - 1] < logit; --to) {
      list.logits[to] = list.logits[to - 1];
      list.ids[to] = list.ids[to - 1];
      list.weights[to] = list.weights[to - 1];
    }
    list.logits[to] = logit;
    list.ids[to] = id;
    list.weights[to] = weight;
  }
}

// The last of the fewest candidates, by descending logit and then ascending id, whose weights add up to `need`,
// as those of the whole list do. Two bounds are brought together until a handful is between them, or one logit.
inline Floor reach(CandidateList& list, int64_t need) {
  constexpr int32_t kHandful = 24, kLinear = 14;
  const vfloat any = splat(list.logits[0]);
  vfloat most = any, least = any;
  for (int32_t i = 0; i < list.count; i += 16) {
    const vmask m = first_lanes(list.count - i);
    const vfloat x = select(m, load(m, list.logits + i), any);
    most = max(most, x);
    least = min(least, x);
  }
  const float top = reduce_max(most), bottom = -reduce_max(zero() - least);
  int64_t low = key_of(bottom), high = key_of(top) + 1;  // the floor is from low to under high
  int64_t above = 0;                                     // of what is no longer in the list
  Share over{0, 0};                                      // of the list, from `high` on
  int32_t under = 0;                                     // of the list, under `low`
  for (int step = 0; list.count - under - over.count > kHandful && high - low > 1; ++step) {
    int64_t middle = key_of(0.5f * float_of(low) + 0.5f * float_of(high));
    if (step >= kLinear || middle <= low || middle >= high) middle = low + (high - low) / 2;
    const Share share = share_above(list, float_of(middle));
    if (above + share.weight >= need) {
      low = middle;
      under = list.count - share.count;
    } else {
      high = middle;
      over = share;
    }
    if (4 * (list.count - under - over.count) > list.count) continue;
    narrow(list, float_of(low), float_of(high));
    above += over.weight;
    over = {0, 0};
    under = 0;
  }
  narrow(list, float_of(low), float_of(high));
  above += over.weight;
  if (high - low > 1) sort_handful(list);
  int32_t last = 0;
  while (last + 1 < list.count && (above += list.weights[last]) < need) ++last;
  return {list.logits[last], list.ids[last]};
}

RIDGELINE_END
