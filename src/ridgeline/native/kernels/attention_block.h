// Attention of one block of rows with one KV head and its query heads.
//
// What a row computes, and in which order, is fixed by its own sequence: segments in order; in a segment
// splits of kSplitSlots slots, in a split tiles of kTileSlots, both anchored at slot 0; the splits' results
// are merged in order. Slots that a row does not see add exact zeros (x * 0 + acc for finite x), so it does
// not matter whether they are computed for the sake of another row of the block. Values that are not finite
// would break that; a tile that holds one takes each row's own slots only. Scores are in units of log 2.
#pragma once

#include <type_traits>

#include "attention.h"
#include "attention_path.h"
#include "attention_state.h"
#include "rows.h"
#include "vector_math.h"

RIDGELINE_BEGIN

namespace {

// Slots [begin, end) of a segment, for one head; `begin` is a page's first.
struct SlotsAt {
  int segment, kv_head, begin, end;
};

// The first that a block's rows see, in segments from `segment` on.
RIDGELINE_INLINE SlotsAt first_slots(const AttentionLaunch& launch, const StepView& step, const RowBlock& block,
                                     int kv_head, int segment) {
  for (; segment < step.segment_begin[block.sequence + 1]; ++segment) {
    const SlotRange slots = visible_slots(launch, step, block, segment);
    if (slots.begin < slots.end) return {segment, kv_head, slots.begin / kPageTokens * kPageTokens, slots.end};
  }
  return {};
}

constexpr float kLog2E = 1.44269504f;
constexpr int kFewQueries = 4 * kMaxQueries;  // up to which widening in the loops takes less time than before them
constexpr float kLowest = -1e30f;  // finite, so that (masked - lowest) is minus infinity and not a NaN

class BlockTask {
 public:
  // `after` is wanted next, if it is known.
  BlockTask(const AttentionLaunch& launch, const StepView& step, const RowBlock& block, int kv_head,
            Buffers buffers, SlotsAt after)
      : launch_(launch),
        step_(step),
        block_(block),
        kv_head_(kv_head),
        b_(buffers),
        after_(after),
        ratio_(launch.heads / launch.kv_heads),
        queries_(block.row_count * ratio_),
        packed_(kFastBf16Dot && launch.rounded_q.data != nullptr && launch.pool.format == KvFormat::bf16),
        score_factor_((launch.softcap == 0 ? launch.scale : launch.softcap) * kLog2E) {
    for (int i = 0; i < queries_; ++i) {
      const int64_t row = block.row_begin + i / ratio_;
      const int64_t column = int64_t(kv_head * ratio_ + i % ratio_) * launch.head_dim;
      if (launch.rounded_q.data == nullptr) {
        b_.q[i] = launch.q.data + row * launch.q.stride + column;
        continue;
      }
      b_.rounded_q[i] = launch.rounded_q.data + row * launch.rounded_q.stride + column;
      if (!packed_) b_.q[i] = widen_query(b_.rounded_q[i], i);
    }
  }

  int queries() const { return queries_; }

  // The whole of it, on this worker.
  void run() {
    clear(b_.total);
    for (int s = step_.segment_begin[block_.sequence]; s < step_.segment_begin[block_.sequence + 1]; ++s) {
      const SlotRange all = visible_slots(launch_, step_, block_, s);
      for (int i = 0, n = split_count(all); i < n; ++i) {
        run_split(s, i, b_.split);
        merge(b_.split);
      }
    }
    write();
  }

  // The state after one split of a segment, counted from the first that the block sees.
  void run_split(int segment, int split, const State& state) {
    find_visible(segment);
    const SlotRange all = visible_slots(launch_, step_, block_, segment);
    const int begin = (all.begin / kSplitSlots + split) * kSplitSlots;
    const SlotRange slots = clip(all, begin, begin + kSplitSlots);
    clear(state);
    for (int i = 0; i < queries_; ++i) store(b_.lanes + 16 * i, zero());
    for (int tile = slots.begin / kTileSlots * kTileSlots; tile < slots.end; tile += kTileSlots) {
      const SlotRange own = clip(slots, tile, tile + kTileSlots);
      if (block_.fork < tile + kTileSlots && segment + 1 == step_.segment_begin[block_.sequence + 1])
        run_tree_tile(segment, tile, own, state);
      else
        run_tile(segment, tile, own, all.end, {0, block_.row_count}, state);
    }
    for (int i = 0; i < queries_; ++i) state.sum[i] = reduce_add(load(b_.lanes + 16 * i));
  }

  void clear_total() { clear(b_.total); }

  // total = total merged with a split's state; one without visible slots changes nothing.
  void merge(const State& split) {
    const State& total = b_.total;
    for (int i = 0; i < queries_; ++i) {
      const float top = total.top[i] > split.top[i] ? total.top[i] : split.top[i];
      const vfloat keep = exp2(splat(total.top[i] - top)), take = exp2(splat(split.top[i] - top));
      store(first_lanes(1), total.sum + i, fma(splat(split.sum[i]), take, splat(total.sum[i]) * keep));
      total.top[i] = top;
      for (int d = i * b_.value_stride; d < (i + 1) * b_.value_stride; d += 16) {
        store(total.o + d, fma(load(split.o + d), take, load(total.o + d) * keep));
      }
    }
  }

  // What the sum of values is multiplied with in the end. A sink joins the softmax here, once for each row.
  float final_scale(int i) const {
    float top = b_.total.top[i], sum = b_.total.sum[i], keep = 1.0f;
    if (launch_.sinks != nullptr) {
      const float sink = launch_.sinks[kv_head_ * ratio_ + i % ratio_] * kLog2E;
      const float new_top = sink > top ? sink : top;
      alignas(64) float decayed[32];
      store(decayed, exp2(splat(top - new_top)));
      store(decayed + 16, exp2(splat(sink - new_top)));
      keep = decayed[0];
      sum = sum * keep + decayed[16];
    }
    return sum == 0.0f ? 0.0f : keep / sum;
  }

  // A row that saw nothing gets zeros. Adding zero turns -0 into 0: the sign of a zero may depend on whether
  // masked slots were computed.
  void write() const {
    const A8Layout layout = a8_layout(launch_.heads * launch_.head_dim);
    for (int i = 0; i < queries_; ++i) {
      const int64_t row = block_.row_begin + i / ratio_;
      const int column = (kv_head_ * ratio_ + i % ratio_) * launch_.head_dim;
      const vfloat factor = splat(final_scale(i));
      for (int d = 0; d < launch_.head_dim; d += kGroup) {
        const float* o = b_.total.o + i * b_.value_stride + d;
        vfloat a = load(o) * factor + zero(), b = load(o + 16) * factor + zero();
        if (values_by_pairs(launch_.pool.format)) interleave(a, b);
        write_group(launch_.out, layout, {row, column + d, launch_.head_dim - d}, a, b);
      }
    }
  }

 private:
  const float* widen_query(const uint16_t* query, int i) const {
    float* wide = b_.wide_q + int64_t(i) * b_.value_stride;
    for (int d = 0; d < launch_.head_dim; d += 16)
      store(wide + d, load_bf16(first_lanes(launch_.head_dim - d), query + d));
    return wide;
  }

  void clear(const State& state) const {
    for (int i = 0; i < queries_; ++i) {
      state.top[i] = kLowest;
      state.sum[i] = 0.0f;
    }
    for (int i = 0; i < queries_ * b_.value_stride; i += 16) store(state.o + i, zero());
  }

  void find_visible(int segment) {
    for (int i = 0; i < queries_; ++i) {
      b_.visible[i] = visible_slots(launch_, step_, block_.row_begin + i / ratio_, segment);
    }
  }

  // As many pages as the tile has, a tile's further on in the order in which they are read: those before them were
  // fetched with the tile before. The slots behind this tile are [begin, end).
  void look_ahead(int segment, int begin, int end, PageRange pages) {
    const int count = pages.end - pages.begin;
    int fetched = kTilePages - count;
    ahead_ = {};
    const auto add = [&](const SlotsAt& at) {
      for (int slot = at.begin; slot < at.end && ahead_.count < count; slot += kPageTokens) {
        if (fetched-- > 0) continue;
        ahead_.page[ahead_.count++] = page_of(launch_, step_, at.segment, at.kv_head, slot);
      }
    };
    add({segment, kv_head_, begin, end});
    if (ahead_.count < count) add(first_slots(launch_, step_, block_, kv_head_, segment + 1));
    add(after_);
  }

  // Rows of the block.
  struct Rows {
    int begin, count;
  };

  // Slots [slots.begin, slots.end) of the tile that begins at slot `begin`; pages of others are not touched.
  void run_tile(int segment, int begin, SlotRange slots, int next_end, Rows rows, const State& state) {
    const PageRange pages = pages_of(begin, slots);
    look_ahead(segment, begin + kTileSlots, next_end, pages);
    TilePages held{};
    for (int p = pages.begin; p < pages.end; ++p)
      held.page[p] = page_of(launch_, step_, segment, kv_head_, begin + p * kPageTokens);
    run_tile(segment, begin, slots, held, rows, state);
    ahead_.count = 0;
  }

  // A tile in which not all rows see their slots in order: those that do together, the others one by one.
  void run_tree_tile(int segment, int begin, SlotRange slots, const State& state) {
    if (block_.in_place > 0) {
      const SlotRange first = b_.visible[0], last = b_.visible[(block_.in_place - 1) * ratio_];
      const SlotRange own = clip(slots, first.begin, last.end);
      if (own.begin < own.end) run_tile(segment, begin, own, last.end, {0, block_.in_place}, state);
    }
    for (int i = block_.in_place; i < block_.row_count; ++i) {
      const SlotRange own = clip(slots, b_.visible[i * ratio_].begin, b_.visible[i * ratio_].end);
      if (own.begin >= own.end) continue;
      const PathRow row{block_.row_begin + i, segment, kv_head_};
      const TilePages held = path_pages(launch_, step_, row, begin, pages_of(begin, own), b_.path);
      run_tile(segment, begin, own, held, {i, 1}, state);
    }
  }

  static PageRange pages_of(int begin, SlotRange slots) {
    return {(slots.begin - begin) / kPageTokens, (slots.end - begin + kPageTokens - 1) / kPageTokens};
  }

  // Some slots of a tile, counted from its first one, which is `begin` of its segment; the pages that hold them; and
  // rows that see them.
  struct Tile {
    int begin;
    SlotRange slots;
    PageRange pages;
    float bias;
    Rows rows;
  };

  void run_tile(int segment, int begin, SlotRange slots, const TilePages& held, Rows rows, const State& state) {
    const SlotRange own{slots.begin - begin, slots.end - begin};
    const Tile tile = {begin, own, pages_of(begin, slots), step_.segment_bias[segment], rows};
    fetch_rest(tile);
    const auto run_on = [&](auto source) {
      for (int p = tile.pages.begin; p < tile.pages.end; ++p)
        source.page[p] = reinterpret_cast<std::remove_reference_t<decltype(source.page[p])>>(held.page[p]);
      run_tile(source, tile, state);
    };
    switch (launch_.pool.format) {
      case KvFormat::bf16: return run_on(Bf16Pages{{}, launch_.head_dim});
      case KvFormat::f32: return run_on(F32Pages{{}, launch_.head_dim});
      case KvFormat::int8: return run_on(Int8Pages{{}, launch_.head_dim});
    }
  }

  // Fetches of the pages ahead what the loops over a tile do not: values in places beyond its slots, and what lies
  // behind values.
  void fetch_rest(const Tile& tile) const {
    const size_t value_bytes = slot_layout(launch_.pool.format, launch_.head_dim).value_bytes;
    for (int i = 0; i < ahead_.count; ++i) {
      const int first = (tile.pages.begin + i) * kPageTokens;
      const SlotRange own = clip(tile.slots, first, first + kPageTokens);
      const size_t from = (kPageTokens + size_t(own.end - own.begin)) * value_bytes;
      for (size_t byte = from; byte < page_bytes(launch_.pool.format, launch_.head_dim); byte += kLineBytes)
        prefetch(ahead_.page[i] + byte);
    }
  }

  // Calls f(std::integral_constant<int, n>, first, next) for n queries of a tile at a time. The first few fetch the
  // pages ahead along with their own work, each its share: `next` has these and, in place of others', the pages of
  // `source`, to no effect.
  template <class Pages, class F>
  void by_queries_of(const Tile& tile, const Pages& source, const F& f) const {
    const int queries = tile.rows.count * ratio_, turns = (queries + kMaxQueries - 1) / kMaxQueries;
    const int shares = turns < kTilePages ? turns : kTilePages;
    by_queries(queries, [&](auto count, int place) RIDGELINE_INLINED {
      const int first = tile.rows.begin * ratio_ + place, share = place / kMaxQueries;
      if (share >= shares) return f(count, first, Nothing{});
      Pages next = source;
      for (int i = share; i < ahead_.count; i += shares) {
        auto& page = next.page[tile.pages.begin + i];
        page = reinterpret_cast<std::remove_reference_t<decltype(page)>>(ahead_.page[i]);
      }
      f(count, first, next);
    });
  }

  // A few queries read the pages as they are, and go through all of a tile before the next ones: what they need stays
  // in the first-level cache.
  template <class Pages>
  void run_tile(const Pages& source, const Tile& tile, const State& state) {
    const bool few = tile.rows.count * ratio_ <= kFewQueries, dense = adds_zeros(source, tile);
    if constexpr (std::is_same_v<Pages, Bf16Pages>) {
      if (packed_) return run_packed_tile(source, tile, few, dense, state);
    }
    if (!few) return run_wide_tile(source, tile, dense, state);
    by_queries_of(tile, source, [&](auto count, int first, const auto& next) RIDGELINE_INLINED {
      constexpr int kQueries = decltype(count)::value;
      score<kQueries>(source, next, tile.pages, b_.q + first, launch_.head_dim, scores(first));
      softmax<false, kQueries>(source, first, tile, state);
      if (dense) return add_values_of<kQueries>(source, next, tile.slots, scores(first), first, state);
      add_own_values<kQueries>(source, tile, first, state);
    });
  }

  // Many queries: keys are widened for all of them, and then values, in the same place.
  template <class Pages>
  void run_wide_tile(const Pages& source, const Tile& tile, bool dense, const State& state) {
    widen_keys(source, tile.pages);
    by_queries_of(tile, source, [&](auto count, int first, const auto& next) RIDGELINE_INLINED {
      constexpr int kQueries = decltype(count)::value;
      score<kQueries>(b_.widened, next, tile.pages, b_.q + first, launch_.head_dim, scores(first));
      softmax<false, kQueries>(source, first, tile, state);
    });
    if (dense) widen_values(source, tile.slots);
    by_queries_of(tile, source, [&](auto count, int first, const auto& next) RIDGELINE_INLINED {
      constexpr int kQueries = decltype(count)::value;
      if (dense) return add_values_of<kQueries>(b_.widened, next, tile.slots, scores(first), first, state);
      add_own_values<kQueries>(source, tile, first, state);
    });
  }

  // Products of bfloat16: of queries and keys, and of weights and values.
  void run_packed_tile(const Bf16Pages& source, const Tile& tile, bool few, bool dense, const State& state) {
    const PairsInPages in_pages{source, tile.slots};
    const PackedPairs packed{reinterpret_cast<int32_t*>(b_.widened.rows), b_.value_stride};
    if (dense && !few) pack_values(in_pages, packed);
    by_queries_of(tile, source, [&](auto count, int first, const auto& next) RIDGELINE_INLINED {
      constexpr int kQueries = decltype(count)::value;
      score<kQueries>(PackedKeys{source}, next, tile.pages, b_.rounded_q + first, launch_.head_dim, scores(first));
      softmax<true, kQueries>(source, first, tile, state);
      const uint16_t* weights = rounded_weights(first);
      const auto next_pairs = pairs_of(next, tile.slots);
      if (!dense) return add_own_values<kQueries>(source, tile, first, state);
      if (few) return add_values_of<kQueries>(in_pages, next_pairs, tile.slots, weights, first, state);
      add_values_of<kQueries>(packed, next_pairs, tile.slots, weights, first, state);
    });
  }

  static PairsInPages pairs_of(const Bf16Pages& pages, SlotRange slots) { return {pages, slots}; }
  static Nothing pairs_of(Nothing, SlotRange) { return {}; }

  float* scores(int i) const { return b_.p + i * kTileSlots; }
  uint16_t* rounded_weights(int i) const { return reinterpret_cast<uint16_t*>(scores(i)); }

  template <int kQueries, class Source, class Next, class Weight>
  RIDGELINE_MEMBER void add_values_of(const Source& source, const Next& next, SlotRange slots,
                                      const Weight* weights, int first, const State& state) const {
    add_values<kQueries>(source, next, slots, weights, b_.decay + first, state.o + first * b_.value_stride,
                         b_.value_stride);
  }

  // The same for the slots that each query sees itself; where it sees none its state stays.
  template <int kQueries, class Pages>
  void add_own_values(const Pages& source, const Tile& tile, int first, const State& state) const {
    for (int i = first; i < first + kQueries; ++i) {
      const SlotRange own = own_slots(i, tile);
      if (own.begin >= own.end) continue;
      if constexpr (std::is_same_v<Pages, Bf16Pages>) {
        if (packed_) {
          add_values_of<1>(PairsInPages{source, own}, Nothing{}, own, rounded_weights(i), i, state);
          continue;
        }
      }
      add_values_of<1>(source, Nothing{}, own, scores(i), i, state);
    }
  }

  // The slots of a tile that a query sees.
  SlotRange own_slots(int i, const Tile& tile) const {
    const SlotRange own = clip(b_.visible[i], tile.begin + tile.slots.begin, tile.begin + tile.slots.end);
    return {own.begin - tile.begin, own.end - tile.begin};
  }

  // Whether the slots that some of the rows do not see add exact zeros for these.
  template <class Pages>
  bool adds_zeros(const Pages& source, const Tile& tile) const {
    SlotRange common = tile.slots;
    for (int i = tile.rows.begin; i < tile.rows.begin + tile.rows.count; ++i) {
      const SlotRange own = own_slots(i * ratio_, tile);
      common = clip(common, own.begin, own.end);
    }
    if (common.begin >= common.end) return are_finite(source, tile.slots);
    return are_finite(source, {tile.slots.begin, common.begin}) &&
           are_finite(source, {common.end, tile.slots.end});
  }

  // Whether the values of some slots, and their factors, are finite.
  template <class Pages>
  bool are_finite(const Pages& source, SlotRange slots) const {
    if (slots.begin >= slots.end) return true;
    const vint magnitude = isplat(0x7fffffff);
    vint largest = izero();
    for (int slot = slots.begin; slot < slots.end; ++slot) {
      const int page = slot / kPageTokens, place = slot % kPageTokens;
      const vfloat factors = source.scale_weights(page, splat(1.0f));
      largest = max(largest, bit_and(bits(select(lanes(place, place + 1), factors, zero())), magnitude));
      const auto* row = source.value_row(page, place);
      for (int column = 0; column < launch_.head_dim; column += kGroup) {
        const FloatPair v = Pages::values(source.value_mask(column), row + column);
        largest = max(largest, max(bit_and(bits(v.even), magnitude), bit_and(bits(v.odd), magnitude)));
      }
    }
    return reduce_max(largest) < 0x7f800000;
  }

  void pack_values(const PairsInPages& pairs, const PackedPairs& out) const {
    for (int column = 0; column < launch_.head_dim; column += kGroup) {
      const vmask mask = pairs.value_mask(column);
      int slot = pairs.slots.begin / 2 * 2;
      const uint16_t* row = pairs.pair_row(slot);
      for (; slot < pairs.slots.end; slot += 2, row = next_pair_row(pairs, unsigned(slot), row)) {
        const SlotPair x = pairs.pair(slot, mask, row + column);
        istore(out.pair_row(slot) + column, x.even);
        istore(out.pair_row(slot) + column + 16, x.odd);
      }
    }
  }

  template <class Pages>
  void widen_keys(const Pages& source, PageRange pages) const {
    for (int p = pages.begin; p < pages.end; ++p) {
      for (int pair = 0; pair < launch_.head_dim / 2; ++pair) {
        const FloatPair keys = source.keys(p, pair);
        float* row = b_.widened.rows + 2 * pair * kTileSlots + p * kPageTokens;
        store(row, keys.even);
        store(row + kTileSlots, keys.odd);
      }
    }
  }

  template <class Pages>
  void widen_values(const Pages& source, SlotRange slots) const {
    for (int column = 0; column < launch_.head_dim; column += kGroup) {
      const auto mask = source.value_mask(column);
      const auto* row = source.value_row(slots.begin / kPageTokens, slots.begin % kPageTokens);
      for (int slot = slots.begin; slot < slots.end; row = next_value_row(source, unsigned(++slot), row)) {
        const FloatPair v = Pages::values(mask, row + column);
        float* wide = b_.widened.rows + slot * b_.value_stride + column;
        store(wide, v.even);
        store(wide + 16, v.odd);
      }
    }
  }

  // Scores to weights, in bfloat16 or in float32, for a few queries; updates their maxima, their sums and the
  // decay of what they have so far.
  template <bool kRounded, int kQueries, class Pages>
  void softmax(const Pages& source, int first, const Tile& tile, const State& state) const {
    if (launch_.softcap != 0) {
      for (int i = first; i < first + kQueries; ++i) cap_scores(source, i, tile.pages);
    }
    bool whole = tile.pages.begin == 0 && tile.pages.end == kTilePages;
    for (int i = first; i < first + kQueries; ++i)
      whole = whole && b_.visible[i].begin <= tile.begin && b_.visible[i].end >= tile.begin + kTileSlots;
    if (whole) return weigh<kRounded, true, kQueries>(source, first, tile, state);
    weigh<kRounded, false, kQueries>(source, first, tile, state);
  }

  template <class Pages>
  void cap_scores(const Pages& source, int i, PageRange pages) const {
    for (int j = pages.begin; j < pages.end; ++j) {
      float* p = scores(i) + j * kPageTokens;
      store(p, tanh(source.scale_products(j, load(p)) * splat(launch_.scale) / splat(launch_.softcap)));
    }
  }

  // All maxima come before the first weight, so that the queries do not wait for one another. `kWhole`: the
  // queries see all of the tile.
  template <bool kRounded, bool kWhole, int kQueries, class Pages>
  void weigh(const Pages& source, int first, const Tile& tile, const State& state) const {
    const int from = kWhole ? 0 : tile.pages.begin, to = kWhole ? kTilePages : tile.pages.end;
    const vfloat factor = splat(score_factor_), shift = splat(tile.bias * kLog2E);
    vfloat s[kQueries][kTilePages];
    float tops[kQueries];
    for (int q = 0; q < kQueries; ++q) {
      const SlotRange own = b_.visible[first + q];
      vfloat largest = splat(-__builtin_inff());
      for (int j = from; j < to; ++j) {
        vfloat product = load(scores(first + q) + j * kPageTokens);
        if (launch_.softcap == 0) product = source.scale_products(j, product);
        s[q][j] = fma(product, factor, shift);
        if constexpr (!kWhole) {
          const int slot = tile.begin + j * kPageTokens;
          s[q][j] = select(lanes(own.begin - slot, own.end - slot), s[q][j], splat(-__builtin_inff()));
        }
        largest = max(largest, s[q][j]);
      }
      const float tile_top = reduce_max(largest);
      tops[q] = tile_top > state.top[first + q] ? tile_top : state.top[first + q];
    }
    for (int q = 0; q < kQueries; ++q) {
      const int i = first + q;
      const vfloat decay = exp2(splat(state.top[i] - tops[q]));
      vfloat sum = load(b_.lanes + 16 * i) * decay;
      for (int j = from; j < to; ++j) {
        const vfloat weight = exp2(s[q][j] - splat(tops[q]));
        sum = sum + weight;
        if constexpr (kRounded)
          store_weights(rounded_weights(i) + j * kPageTokens, weight);
        else
          store(scores(i) + j * kPageTokens, source.scale_weights(j, weight));
      }
      store(b_.lanes + 16 * i, sum);
      store(first_lanes(1), b_.decay + i, decay);
      state.top[i] = tops[q];
    }
  }

  const AttentionLaunch& launch_;
  const StepView& step_;
  const RowBlock block_;
  const int kv_head_;
  const Buffers b_;
  const SlotsAt after_;
  const int ratio_, queries_;
  const bool packed_;  // products are of bfloat16
  const float score_factor_;
  struct {
    const uint8_t* page[kTilePages];
    int count;
  } ahead_ = {};
};

}  // namespace

RIDGELINE_END
