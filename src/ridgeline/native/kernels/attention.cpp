// Paged attention with online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022).
//
// What a row computes, and in which order, is fixed by its own sequence: segments in order; in a segment splits
// of kSplitSlots slots, in a split tiles of kTileSlots, both anchored at slot 0; the splits' results are merged
// in order. Slots that a row does not see add exact zeros (x * 0 + acc for finite x), so it does not matter
// whether they are computed for the sake of another row of the block. Values that are not finite would break
// that; a tile that holds one takes each row's own slots only.
#include "attention.h"

#include "rows.h"
#include "vector_math.h"

RIDGELINE_BEGIN

namespace {

constexpr int kSplitSlots = 512;
constexpr float kLowest = -1e30f;  // finite, so that (masked - lowest) is minus infinity and not a NaN

struct Range {
  int begin, end;  // slots of a segment
};

Range clip(Range r, int begin, int end) {
  r.begin = r.begin < begin ? begin : r.begin;
  r.end = r.end > end ? end : r.end;
  return r;
}

// Running softmax of a block's queries. Rows of o are value_stride apart.
struct State {
  float *lowest_max, *sum, *o;  // (queries), (queries), (queries, value_stride)
};

// Cuts a worker's scratch into arrays; the first pass only counts.
struct Arena {
  uint8_t* base;
  size_t used = 0;
  template <class T>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(base + used);
    used += round_up(count * sizeof(T), kLineBytes);
    return p;
  }
};

struct Buffers {
  int queries, value_stride;
  float *keys, *values, *p, *decay, *lanes;
  const float** q;
  Range* visible;
  State split, total;
};

Buffers lay_out(const AttentionLaunch& launch, Arena& arena) {
  Buffers b{};
  b.queries = kBlockRows * (launch.heads / launch.kv_heads);
  b.value_stride = int(round_up(size_t(launch.head_dim), 16));
  const auto queries = size_t(b.queries), stride = size_t(b.value_stride);
  b.keys = arena.take<float>(size_t(launch.head_dim) * kTileSlots);
  b.values = arena.take<float>(kTileSlots * stride);
  b.p = arena.take<float>(queries * kTileSlots);
  b.decay = arena.take<float>(queries);
  b.lanes = arena.take<float>(queries * 16);
  b.q = arena.take<const float*>(queries);
  b.visible = arena.take<Range>(queries);
  for (State* s : {&b.split, &b.total}) {
    s->lowest_max = arena.take<float>(queries);
    s->sum = arena.take<float>(queries);
    s->o = arena.take<float>(queries * stride);
  }
  return b;
}

// One block of rows with one KV head and its query heads.
class BlockTask {
 public:
  BlockTask(const AttentionLaunch& launch, const StepView& step, const RowBlock& block, int kv_head, Buffers buffers)
      : launch_(launch), step_(step), block_(block), kv_head_(kv_head), b_(buffers),
        ratio_(launch.heads / launch.kv_heads), queries_(block.row_count * ratio_) {
    for (int i = 0; i < queries_; ++i) {
      b_.q[i] = launch.q.data + (block.row_begin + i / ratio_) * launch.q.stride +
                int64_t(kv_head * ratio_ + i % ratio_) * launch.head_dim;
    }
  }

  void run() {
    clear(b_.total);
    for (int s = step_.segment_begin[block_.sequence]; s < step_.segment_begin[block_.sequence + 1]; ++s) {
      const Range all = find_visible(s);
      for (int begin = all.begin / kSplitSlots * kSplitSlots; begin < all.end; begin += kSplitSlots) {
        run_split(s, clip(all, begin, begin + kSplitSlots));
        merge();
      }
    }
    write();
  }

 private:
  void clear(const State& state) {
    for (int i = 0; i < queries_; ++i) {
      state.lowest_max[i] = kLowest;
      state.sum[i] = 0.0f;
    }
    for (int i = 0; i < queries_ * b_.value_stride; i += 16) store(state.o + i, zero());
  }

  // Fills each query's visible slots of a segment; returns the range that holds them all.
  Range find_visible(int segment) {
    Range all{0, 0};
    const int length = step_.segment_length[segment];
    const int64_t first = step_.segment_first_position[segment];
    for (int i = 0; i < queries_; ++i) {
      const int64_t position = step_.positions[block_.row_begin + i / ratio_] - first;
      int64_t begin = launch_.window == 0 ? 0 : position - launch_.window + 1;
      int64_t end = step_.segment_causal[segment] ? position + 1 : length;
      begin = begin < 0 ? 0 : begin;
      end = end > length ? length : end;
      b_.visible[i] = begin < end ? Range{int(begin), int(end)} : Range{0, 0};
      if (begin >= end) continue;
      if (all.begin == all.end) {
        all = b_.visible[i];
      } else {
        all = {all.begin < begin ? all.begin : int(begin), all.end > end ? all.end : int(end)};
      }
    }
    return all;
  }

  void run_split(int segment, Range slots) {
    clear(b_.split);
    for (int i = 0; i < queries_; ++i) store(b_.lanes + 16 * i, zero());
    for (int begin = slots.begin / kTileSlots * kTileSlots; begin < slots.end; begin += kTileSlots) {
      run_tile(segment, begin, clip(slots, begin, begin + kTileSlots));
    }
    for (int i = 0; i < queries_; ++i) b_.split.sum[i] = reduce_add(load(b_.lanes + 16 * i));
  }

  // Where the page of a slot begins in the pool, for this head, counted in values.
  int64_t page_of(int segment, int slot) const {
    const int32_t* table = step_.tables + launch_.group * step_.pages + step_.table_begin[segment];
    const int64_t page = table[slot / kPageTokens];
    return (page * launch_.kv_heads + kv_head_) * int64_t(page_values(launch_.head_dim));
  }

  // Slots [slots.begin, slots.end) of the tile at `begin`; no other slot's value is read as a number.
  void run_tile(int segment, int begin, Range slots) {
    const int first_page = (slots.begin - begin) / kPageTokens;
    const int pages = (slots.end - begin + kPageTokens - 1) / kPageTokens - first_page;
    for (int p = first_page; p < first_page + pages; ++p) {
      widen_keys(page_of(segment, begin + p * kPageTokens), b_.keys + p * kPageTokens);
    }
    const bool finite = widen_values(segment, begin, slots);
    score(b_.q, queries_, b_.keys + first_page * kPageTokens, launch_.head_dim, pages, b_.p + first_page * kPageTokens);
    const float bias = step_.segment_bias[segment];
    for (int i = 0; i < queries_; ++i) softmax(i, begin, first_page, pages, bias);
    if (finite) {
      const int offset = slots.begin - begin;
      add_values(b_.p + offset, queries_, b_.values + offset * b_.value_stride, b_.value_stride,
                 slots.end - slots.begin, b_.decay, b_.split.o);
      return;
    }
    for (int i = 0; i < queries_; ++i) {
      const Range own = clip(b_.visible[i], slots.begin, slots.end);
      const int offset = own.begin - begin, count = own.end > own.begin ? own.end - own.begin : 0;
      add_values(b_.p + i * kTileSlots + offset, 1, b_.values + offset * b_.value_stride, b_.value_stride, count,
                 b_.decay + i, b_.split.o + i * b_.value_stride);
    }
  }

  void widen_keys(int64_t page, float* keys) const {
    if (launch_.pool.wide) {
      const float* from = static_cast<const float*>(launch_.pool.data) + page;
      for (int d = 0; d < launch_.head_dim; ++d) store(keys + d * kTileSlots, load(from + d * kPageTokens));
      return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(launch_.pool.data) + page;
    for (int pair = 0; pair < launch_.head_dim / 2; ++pair) {
      vfloat even, odd;
      load_bf16_pairs(from + pair * kPageTokens * 2, even, odd);
      store(keys + (2 * pair) * kTileSlots, even);
      store(keys + (2 * pair + 1) * kTileSlots, odd);
    }
  }

  // False if a value is infinite or not a number.
  bool widen_values(int segment, int begin, Range slots) const {
    vint largest = izero();
    const int head_dim = launch_.head_dim;
    for (int slot = slots.begin; slot < slots.end; ++slot) {
      const int64_t row = page_of(segment, slot) + int64_t(page_values(head_dim)) / 2 +
                          int64_t(slot % kPageTokens) * head_dim;
      float* out = b_.values + (slot - begin) * b_.value_stride;
      for (int d = 0; d < head_dim; d += 16) {
        const vmask m = first_lanes(head_dim - d);
        const vfloat v = launch_.pool.wide ? load(m, static_cast<const float*>(launch_.pool.data) + row + d)
                                           : load_bf16(m, static_cast<const uint16_t*>(launch_.pool.data) + row + d);
        largest = max(largest, bit_and(bits(v), isplat(0x7fffffff)));
        store(out + d, v);
      }
    }
    return reduce_max(largest) < 0x7f800000;
  }

  // Scores to weights, for one query; updates its maximum, its sum and the decay of what it has so far.
  void softmax(int i, int begin, int first_page, int pages, float bias) {
    const Range own = b_.visible[i];
    float* p = b_.p + i * kTileSlots + first_page * kPageTokens;
    vfloat s[kTilePages], top = splat(-__builtin_inff());
    for (int j = 0; j < pages; ++j) {
      const int base = begin + (first_page + j) * kPageTokens;
      const vfloat scores = fma(load(p + j * kPageTokens), splat(launch_.scale), splat(bias));
      s[j] = select(lanes(own.begin - base, own.end - base), scores, splat(-__builtin_inff()));
      top = max(top, s[j]);
    }
    const float old_max = b_.split.lowest_max[i], tile_max = reduce_max(top);
    const float new_max = tile_max > old_max ? tile_max : old_max;
    const vfloat decay = exp(splat(old_max - new_max));
    vfloat sum = load(b_.lanes + 16 * i) * decay;
    for (int j = 0; j < pages; ++j) {
      const vfloat weight = exp(s[j] - splat(new_max));
      sum = sum + weight;
      store(p + j * kPageTokens, weight);
    }
    store(b_.lanes + 16 * i, sum);
    store(first_lanes(1), b_.decay + i, decay);
    b_.split.lowest_max[i] = new_max;
  }

  // total = total merged with split; a split without visible slots changes nothing.
  void merge() {
    for (int i = 0; i < queries_; ++i) {
      const float a = b_.total.lowest_max[i], b = b_.split.lowest_max[i], top = a > b ? a : b;
      const vfloat keep = exp(splat(a - top)), take = exp(splat(b - top));
      vfloat sum = fma(splat(b_.split.sum[i]), take, splat(b_.total.sum[i]) * keep);
      store(first_lanes(1), b_.total.sum + i, sum);
      b_.total.lowest_max[i] = top;
      for (int d = 0; d < b_.value_stride; d += 16) {
        float* total = b_.total.o + i * b_.value_stride + d;
        store(total, fma(load(b_.split.o + i * b_.value_stride + d), take, load(total) * keep));
      }
    }
  }

  // A row that saw nothing gets zeros. Adding zero turns -0 into 0: the sign of a zero may depend on whether
  // masked slots were computed.
  void write() const {
    const A8Layout layout = a8_layout(launch_.heads * launch_.head_dim);
    for (int i = 0; i < queries_; ++i) {
      const int64_t row = block_.row_begin + i / ratio_;
      const int column = (kv_head_ * ratio_ + i % ratio_) * launch_.head_dim;
      const float sum = b_.total.sum[i];
      const vfloat factor = splat(sum == 0.0f ? 0.0f : 1.0f / sum);
      for (int d = 0; d < launch_.head_dim; d += kGroup) {
        const float* o = b_.total.o + i * b_.value_stride + d;
        const vfloat a = load(o) * factor + zero();
        const vfloat b = d + 16 < b_.value_stride ? load(o + 16) * factor + zero() : zero();
        if (launch_.out.a8.data != nullptr) {
          quantise_group(a, b, launch_.out.a8.data + row * launch_.out.a8.stride, layout, (column + d) / kGroup);
        } else {
          float* out = launch_.out.f32.data + row * launch_.out.f32.stride + column + d;
          store_f32(out, launch_.head_dim - d, a, false);
          store_f32(out + 16, launch_.head_dim - d - 16, b, false);
        }
      }
    }
  }

  const AttentionLaunch& launch_;
  const StepView& step_;
  const RowBlock block_;
  const int kv_head_;
  const Buffers b_;
  const int ratio_, queries_;
};

}  // namespace

size_t attention_scratch_bytes(const AttentionLaunch& launch) {
  Arena arena{nullptr};
  lay_out(launch, arena);
  return arena.used;
}

void attention(const AttentionLaunch& launch, const StepView& step, Worker& worker) {
  Arena arena{worker.scratch};
  const Buffers buffers = lay_out(launch, arena);
  const int64_t units = int64_t(step.block_count) * launch.kv_heads;
  worker.for_units(units, [&](int64_t unit) {
    // Later blocks of a prompt see more: starting with them leaves small ones for the end.
    const RowBlock& block = step.blocks[step.block_count - 1 - unit / launch.kv_heads];
    BlockTask(launch, step, block, int(unit % launch.kv_heads), buffers).run();
  });
}

RIDGELINE_END
