// Kernels at a row's place in its sequence: rope, with the write of K and V into their page.
#include "rows.h"

RIDGELINE_BEGIN

namespace {

void centre_head(float* head, int head_dim) {
  vfloat acc = zero();
  for (int d = 0; d < head_dim; d += 16) acc = acc + load(first_lanes(head_dim - d), head + d);
  const vfloat mean = splat(reduce_add(acc) / float(head_dim));
  for (int d = 0; d < head_dim; d += 16) {
    const vmask m = first_lanes(head_dim - d);
    store(m, head + d, load(m, head + d) - mean);
  }
}

// The norm of head h, whose gain is among `gains`. A layer norm is the RMS norm of what is left of the mean.
void norm_head(float* head, int h, const float* gains, const RopeStoreLaunch& launch) {
  const int head_dim = launch.head_dim;
  const float* weight = gains + int64_t(h) * launch.norm_stride;
  if (launch.layer_norm) centre_head(head, head_dim);
  vfloat acc = zero();
  for (int d = 0; d < head_dim; d += 16) {
    const vfloat x = load(first_lanes(head_dim - d), head + d);
    acc = fma(x, x, acc);
  }
  const vfloat factor = splat(1.0f / __builtin_sqrtf(reduce_add(acc) / float(head_dim) + launch.eps));
  for (int d = 0; d < head_dim; d += 16) {
    const vmask m = first_lanes(head_dim - d);
    store(m, head + d, load(m, head + d) * factor * load(m, weight + d));
  }
}

// Turns the pairs (i, i + rotary_dim / 2).
void rotate_head(float* head, int rotary_dim, const float* cos, const float* sin) {
  const int half = rotary_dim / 2;
  for (int d = 0; d < half; d += 16) {
    const vmask m = first_lanes(half - d);
    const vfloat a = load(m, head + d), b = load(m, head + half + d), c = load(m, cos + d),
                 s = load(m, sin + d);
    store(m, head + d, a * c - b * s);
    store(m, head + half + d, b * c + a * s);
  }
}

// One slot's key and value into a page, as layout.h has them.
void store_f32(const float* key, const float* value, int head_dim, float* page, int slot) {
  for (int d = 0; d < head_dim; ++d) page[d * kPageTokens + slot] = key[d];
  std::memcpy(page + page_values(head_dim) / 2 + size_t(slot) * head_dim, value,
              size_t(head_dim) * sizeof(float));
}

void round_head(const float* head, int head_dim, uint16_t* out) {
  for (int d = 0; d < head_dim; d += 16) {
    const vmask m = first_lanes(head_dim - d);
    store_bf16(m, out + d, load(m, head + d));
  }
}

void store_bf16(const float* key, const float* value, int head_dim, uint16_t* page, int slot) {
  alignas(64) uint16_t values[kMaxHeadDim];
  round_head(key, head_dim, values);
  for (int pair = 0; pair < head_dim / 2; ++pair)
    std::memcpy(page + (pair * kPageTokens + slot) * 2, values + 2 * pair, 4);
  round_head(value, head_dim, page + page_values(head_dim) / 2 + size_t(slot) * head_dim);
}

// Codes of a head by the rule of an A8 group, and zeros up to the next 16; returns their scale.
float quantise_head(const float* head, int head_dim, int8_t* codes) {
  vint magnitudes = izero();
  for (int d = 0; d < head_dim; d += 16)
    magnitudes = max(magnitudes, bits(abs(load(first_lanes(head_dim - d), head + d))));
  const float largest = largest_magnitude(magnitudes);
  const vfloat inverse = splat(code_factor(largest));
  for (int d = 0; d < head_dim; d += 16)
    store_codes(codes + d, to_int(load(first_lanes(head_dim - d), head + d) * inverse));
  return largest * kInverse127;
}

void store_int8(const float* key, const float* value, int head_dim, uint8_t* page, int slot) {
  alignas(64) int8_t codes[kMaxHeadDim];
  float* scales = reinterpret_cast<float*>(page + page_values(head_dim)) + slot;
  scales[0] = quantise_head(key, head_dim, codes);
  for (int d = 0; d < head_dim; ++d) page[d * kPageTokens + slot] = uint8_t(codes[d]);
  scales[kPageTokens] = quantise_head(value, head_dim, codes);
  std::memcpy(page + page_values(head_dim) / 2 + size_t(slot) * head_dim, codes, size_t(head_dim));
}

void store_slot(KvFormat format, const float* key, const float* value, int head_dim, uint8_t* page,
                int slot) {
  switch (format) {
    case KvFormat::f32: return store_f32(key, value, head_dim, reinterpret_cast<float*>(page), slot);
    case KvFormat::bf16: return store_bf16(key, value, head_dim, reinterpret_cast<uint16_t*>(page), slot);
    case KvFormat::int8: return store_int8(key, value, head_dim, page, slot);
  }
}

// A row's angles, or null where nothing is turned.
struct Angles {
  const float *cos, *sin;
};
Angles angles_of(const RopeStoreLaunch& launch, int64_t row) {
  if (launch.cos == nullptr) return {};
  const int64_t first = row * (launch.rotary_dim / 2);
  return {launch.cos + first, launch.sin + first};
}

void turn_query(const RopeStoreLaunch& launch, int64_t row, int head) {
  const int head_dim = launch.head_dim;
  const int64_t column = int64_t(head) * head_dim;
  const Angles angles = angles_of(launch, row);
  alignas(64) float copy[kMaxHeadDim];
  float* q = launch.q.data + row * launch.q.stride + column;
  const bool rounds = launch.rounded_q.data != nullptr;
  if (rounds) q = static_cast<float*>(std::memcpy(copy, q, size_t(head_dim) * 4));
  if (launch.q_norm != nullptr) norm_head(q, head, launch.q_norm, launch);
  if (angles.cos != nullptr) rotate_head(q, launch.rotary_dim, angles.cos, angles.sin);
  if (rounds) round_head(q, head_dim, launch.rounded_q.data + row * launch.rounded_q.stride + column);
}

void store_key_and_value(const RopeStoreLaunch& launch, const StepView& step, int64_t row, int head) {
  const int head_dim = launch.head_dim, slot = step.slots[row];
  const int segment = step.segment_begin[step.row_sequence[row] + 1] - 1;
  const int32_t* table = step.tables + launch.group * step.pages + step.table_begin[segment];
  const Angles angles = angles_of(launch, row);
  alignas(64) float k[kMaxHeadDim];
  std::memcpy(k, launch.k.data + row * launch.k.stride + int64_t(head) * head_dim, size_t(head_dim) * 4);
  if (launch.k_norm != nullptr) norm_head(k, head, launch.k_norm, launch);
  if (angles.cos != nullptr) rotate_head(k, launch.rotary_dim, angles.cos, angles.sin);
  const float* v = launch.v.data + row * launch.v.stride + int64_t(head) * head_dim;
  uint8_t* page = launch.pool.head(table[slot / kPageTokens], launch.kv_heads, head, head_dim);
  store_slot(launch.pool.format, k, v, head_dim, page, slot % kPageTokens);
}

}  // namespace

// One head of some neighbours is a unit: their keys share the lines of a page, which two workers would take from
// each other with every value.
void rope_store(const RopeStoreLaunch& launch, const StepView& step, Worker& worker) {
  constexpr int64_t kRowsPerUnit = kPageTokens;
  const int64_t heads = launch.heads + launch.kv_heads;
  worker.for_units(heads * ((step.rows + kRowsPerUnit - 1) / kRowsPerUnit), [&](int64_t unit) {
    const int head = int(unit % heads);
    const int64_t begin = unit / heads * kRowsPerUnit;
    const int64_t end = begin + kRowsPerUnit < step.rows ? begin + kRowsPerUnit : step.rows;
    for (int64_t row = begin; row < end; ++row) {
      if (head < launch.heads)
        turn_query(launch, row, head);
      else
        store_key_and_value(launch, step, row, head - launch.heads);
    }
  });
}

RIDGELINE_END
