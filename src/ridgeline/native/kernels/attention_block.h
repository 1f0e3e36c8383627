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

  // Fetches the share of them that goes with some of the queries, of which the first half fetch everything: all
  // at once it would wait for memory, and later it would come too late.
  void fetch_ahead(int first, int queries, int all) const {
    const int lines = int(page_bytes(launch_.pool.format, launch_.head_dim) / kLineBytes);
    const auto share = [&](int done) { return lines * (2 * done < all ? 2 * done : all) / all; };
    const int from = share(first), to = share(first + queries);
    for (int p = 0; p < ahead_.count; ++p) {
      for (int line = from; line < to; ++line) prefetch(ahead_.page[p] + size_t(line) * kLineBytes);
    }
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

  void run_tile(int segment, int begin, SlotRange slots, const TilePages& held, Rows rows, const State& state) {
    const SlotRange own{slots.begin - begin, slots.end - begin};
    const PageRange pages = pages_of(begin, slots);
    const auto run_on = [&](auto source) {
      for (int p = pages.begin; p < pages.end; ++p)
        source.page[p] = reinterpret_cast<std::remove_reference_t<decltype(source.page[p])>>(held.page[p]);
      if (rows.count == 1) fetch_rest(own, pages);
      run_tile(source, begin, own, pages, step_.segment_bias[segment], rows, state);
    };
    switch (launch_.pool.format) {
      case KvFormat::bf16: return run_on(Bf16Pages{{}, launch_.head_dim});
      case KvFormat::f32: return run_on(F32Pages{{}, launch_.head_dim});
      case KvFormat::int8: return run_on(Int8Pages{{}, launch_.head_dim});
    }
  }

  // Fetches of the pages ahead what a single row's loops over `slots` do not: values in places beyond these, and
  // what lies behind values.
  void fetch_rest(SlotRange slots, PageRange pages) const {
    const size_t value_bytes = slot_layout(launch_.pool.format, launch_.head_dim).value_bytes;
    for (int i = 0; i < ahead_.count; ++i) {
      const SlotRange own = clip(slots, (pages.begin + i) * kPageTokens, (pages.begin + i + 1) * kPageTokens);
      const size_t from = (kPageTokens + size_t(own.end - own.begin)) * value_bytes;
      for (size_t byte = from; byte < page_bytes(launch_.pool.format, launch_.head_dim); byte += kLineBytes)
        prefetch(ahead_.page[i] + byte);
    }
  }

  // What a few of a single row's queries, from the `first` on, fetch: their share of the pages ahead. Instead of
  // the others they fetch those of `source`, to no effect.
  template <class Pages>
  Pages share_of_next(Pages source, PageRange pages, int first) const {
    const int shares = (ratio_ + kMaxQueries - 1) / kMaxQueries;
    for (int i = first / kMaxQueries; i < ahead_.count; i += shares) {
      auto& page = source.page[pages.begin + i];
      page = reinterpret_cast<std::remove_reference_t<decltype(page)>>(ahead_.page[i]);
    }
    return source;
  }

  // A single row sees all of the slots, so nothing is masked and its few queries read the pages as they are.
  // A few queries go through all of it before the next ones: what they need stays in the first-level cache.
  template <class Pages>
  void run_tile(const Pages& source, int begin, SlotRange slots, PageRange pages, float bias, Rows rows,
                const State& state) {
    if constexpr (std::is_same_v<Pages, Bf16Pages>) {
      if (packed_) return run_packed_tile(source, begin, slots, pages, bias, rows, state);
    }
    const bool alone = rows.count == 1;
    if (!alone) widen_keys(source, pages);
    const bool finite = alone || widen_values(source, slots, pages);
    by_queries(rows.count * ratio_, [&](auto count, int place) RIDGELINE_INLINED {
      constexpr int kQueries = decltype(count)::value;
      const int first = rows.begin * ratio_ + place;
      float *p = b_.p + first * kTileSlots, *o = state.o + first * b_.value_stride;
      const float* decay = b_.decay + first;
      if (alone) {
        const Pages next = share_of_next(source, pages, place);
        score<kQueries>(source, next, pages, b_.q + first, launch_.head_dim, p);
        softmax<false, kQueries>(source, first, begin, pages, bias, state);
        return add_values<kQueries>(source, next, slots, p, decay, o, b_.value_stride);
      }
      score<kQueries>(b_.widened, b_.widened, pages, b_.q + first, launch_.head_dim, p);
      softmax<false, kQueries>(source, first, begin, pages, bias, state);
      fetch_ahead(place, kQueries, rows.count * ratio_);
      if (finite) return add_values<kQueries>(b_.widened, b_.widened, slots, p, decay, o, b_.value_stride);
      for (int i = first; i < first + kQueries; ++i) add_own_values(i, begin, slots, state);
    });
  }

  // The same with products of bfloat16: of queries and keys, and of weights and values.
  void run_packed_tile(const Bf16Pages& source, int begin, SlotRange slots, PageRange pages, float bias,
                       Rows rows, const State& state) {
    const PairsInPages in_pages{source, slots};
    const PackedPairs packed{reinterpret_cast<int32_t*>(b_.widened.value_rows), b_.value_stride};
    const bool alone = rows.count == 1;
    const bool dense = alone || (seen_by_all(rows, begin, slots) ? pack_values<false>(in_pages, packed)
                                                                 : pack_values<true>(in_pages, packed));
    by_queries(rows.count * ratio_, [&](auto count, int place) RIDGELINE_INLINED {
      constexpr int kQueries = decltype(count)::value;
      const int first = rows.begin * ratio_ + place;
      float *p = b_.p + first * kTileSlots, *o = state.o + first * b_.value_stride;
      const uint16_t* weights = rounded_weights(first);
      const float* decay = b_.decay + first;
      if (alone) {
        const Bf16Pages next = share_of_next(source, pages, place);
        using Keys = PackedKeys<true>;
        score<kQueries>(Keys{source}, Keys{next}, pages, b_.rounded_q + first, launch_.head_dim, p);
        softmax<true, kQueries>(source, first, begin, pages, bias, state);
        const PairsInPages next_pairs{next, slots};
        return add_values<kQueries>(in_pages, next_pairs, slots, weights, decay, o, b_.value_stride);
      }
      const PackedKeys<false> keys{source};
      score<kQueries>(keys, keys, pages, b_.rounded_q + first, launch_.head_dim, p);
      softmax<true, kQueries>(source, first, begin, pages, bias, state);
      fetch_ahead(place, kQueries, rows.count * ratio_);
      if (dense) return add_values<kQueries>(packed, packed, slots, weights, decay, o, b_.value_stride);
      for (int i = first; i < first + kQueries; ++i) {
        const SlotRange own = own_slots(i, begin, slots);
        if (own.begin >= own.end) continue;
        const PairsInPages seen{source, own};
        add_values<1>(seen, seen, own, rounded_weights(i), b_.decay + i, state.o + i * b_.value_stride,
                      b_.value_stride);
      }
    });
  }

  uint16_t* rounded_weights(int i) const { return reinterpret_cast<uint16_t*>(b_.p + i * kTileSlots); }

  // Whether each of the rows sees all of a tile's slots.
  bool seen_by_all(Rows rows, int begin, SlotRange slots) const {
    for (int i = rows.begin; i < rows.begin + rows.count; ++i) {
      const SlotRange own = b_.visible[i * ratio_];
      if (own.begin > begin + slots.begin || own.end < begin + slots.end) return false;
    }
    return true;
  }

  // The values of `pairs`, in its slots. False if one is infinite or not a number, where that is checked.
  template <bool kCheck>
  bool pack_values(const PairsInPages& pairs, const PackedPairs& out) const {
    const vint exponents = isplat(0x7f807f80), lowest = isplat(0x00800080);
    vint carries = izero();  // out of exponents of ones
    for (int column = 0; column < launch_.head_dim; column += kGroup) {
      const vmask mask = pairs.value_mask(column);
      int slot = pairs.slots.begin / 2 * 2;
      const uint16_t* row = pairs.pair_row(slot);
      for (; slot < pairs.slots.end; slot += 2, row = next_pair_row(pairs, unsigned(slot), row)) {
        const SlotPair x = pairs.pair(slot, mask, row + column);
        if (kCheck) {
          carries = bit_or(carries, add(bit_and(x.even, exponents), lowest));
          carries = bit_or(carries, add(bit_and(x.odd, exponents), lowest));
        }
        istore(out.pair_row(slot) + column, x.even);
        istore(out.pair_row(slot) + column + 16, x.odd);
      }
    }
    return reduce_max(shift_right<1>(bit_and(carries, isplat(int32_t(0x80008000u))))) == 0;
  }

  // The slots of a tile that a query sees.
  SlotRange own_slots(int i, int begin, SlotRange slots) const {
    const SlotRange own = clip(b_.visible[i], begin + slots.begin, begin + slots.end);
    return {own.begin - begin, own.end - begin};
  }

  // The values of the slots that a query sees; where it sees none its state stays.
  void add_own_values(int i, int begin, SlotRange slots, const State& state) const {
    const SlotRange own = own_slots(i, begin, slots);
    if (own.begin >= own.end) return;
    add_values<1>(b_.widened, b_.widened, own, b_.p + i * kTileSlots, b_.decay + i,
                  state.o + i * b_.value_stride, b_.value_stride);
  }

  template <class Pages>
  void widen_keys(const Pages& source, PageRange pages) const {
    for (int p = pages.begin; p < pages.end; ++p) {
      for (int pair = 0; pair < launch_.head_dim / 2; ++pair) {
        const FloatPair keys = source.keys(p, pair);
        float* row = b_.widened.key_rows + 2 * pair * kTileSlots + p * kPageTokens;
        store(row, keys.even);
        store(row + kTileSlots, keys.odd);
      }
    }
  }

  // False if a value, or its factor, is infinite or not a number.
  template <class Pages>
  bool widen_values(const Pages& source, SlotRange slots, PageRange pages) const {
    const vint magnitude = isplat(0x7fffffff);
    vint largest = izero();
    for (int p = pages.begin; p < pages.end; ++p) {
      const vmask own = lanes(slots.begin - p * kPageTokens, slots.end - p * kPageTokens);
      const vfloat factors = select(own, source.scale_weights(p, splat(1.0f)), zero());
      largest = max(largest, bit_and(bits(factors), magnitude));
    }
    for (int column = 0; column < launch_.head_dim; column += kGroup) {
      const auto mask = source.value_mask(column);
      const auto* row = source.value_row(slots.begin / kPageTokens, slots.begin % kPageTokens);
      for (int slot = slots.begin; slot < slots.end; row = next_value_row(source, unsigned(++slot), row)) {
        const FloatPair v = Pages::values(mask, row + column);
        largest = max(largest, max(bit_and(bits(v.even), magnitude), bit_and(bits(v.odd), magnitude)));
        float* wide = b_.widened.value_rows + slot * b_.value_stride + column;
        store(wide, v.even);
        store(wide + 16, v.odd);
      }
    }
    return reduce_max(largest) < 0x7f800000;
  }

  // Scores to weights, in bfloat16 or in float32, for a few queries; updates their maxima, their sums and the
  // decay of what they have so far.
  template <bool kRounded, int kQueries, class Pages>
  void softmax(const Pages& source, int first, int begin, PageRange pages, float bias, const State& state) {
    if (launch_.softcap != 0) {
      for (int i = first; i < first + kQueries; ++i) cap_scores(source, i, pages);
    }
    bool whole = pages.begin == 0 && pages.end == kTilePages;
    for (int i = first; i < first + kQueries; ++i)
      whole = whole && b_.visible[i].begin <= begin && b_.visible[i].end >= begin + kTileSlots;
    if (whole) return weigh<kRounded, true, kQueries>(source, first, begin, pages, bias, state);
    weigh<kRounded, false, kQueries>(source, first, begin, pages, bias, state);
  }

  template <class Pages>
  void cap_scores(const Pages& source, int i, PageRange pages) const {
    for (int j = pages.begin; j < pages.end; ++j) {
      float* p = b_.p + i * kTileSlots + j * kPageTokens;
      store(p, tanh(source.scale_products(j, load(p)) * splat(launch_.scale) / splat(launch_.softcap)));
    }
  }

  // All maxima come before the first weight, so that the queries do not wait for one another. `kWhole`: the
  // queries see all of the tile.
  template <bool kRounded, bool kWhole, int kQueries, class Pages>
  void weigh(const Pages& source, int first, int begin, PageRange pages, float bias, const State& state) const {
    const int from = kWhole ? 0 : pages.begin, to = kWhole ? kTilePages : pages.end;
    const vfloat factor = splat(score_factor_), shift = splat(bias * kLog2E);
    vfloat s[kQueries][kTilePages];
    float tops[kQueries];
    for (int q = 0; q < kQueries; ++q) {
      const SlotRange own = b_.visible[first + q];
      vfloat largest = splat(-__builtin_inff());
      for (int j = from; j < to; ++j) {
        vfloat product = load(b_.p + (first + q) * kTileSlots + j * kPageTokens);
        if (launch_.softcap == 0) product = source.scale_products(j, product);
        s[q][j] = fma(product, factor, shift);
        if constexpr (!kWhole) {
          const int slot = begin + j * kPageTokens;
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
          store(b_.p + i * kTileSlots + j * kPageTokens, source.scale_weights(j, weight));
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
