// Reading and writing rows: the rule of A8 quantisation, and storing two vectors to any target.
#pragma once

#include "../launch.h"
#include "simd.h"

RIDGELINE_BEGIN

constexpr float kInverse127 = 1.0f / 127.0f, kTiny = 0x1p-100f;

// The largest of some magnitudes. Compared as integers, so that a NaN is the largest and shows in the scale.
RIDGELINE_INLINE float largest_magnitude(vint magnitudes) {
  const int32_t largest = reduce_max(magnitudes);
  float magnitude;
  std::memcpy(&magnitude, &largest, 4);
  return magnitude;
}

// What values are multiplied with to become codes. None that is finite needs clipping: amax * (127 / amax) is
// below 127.5 with any rounding. Codes are zeros where 127 / amax would come near the end of float32's range.
RIDGELINE_INLINE float code_factor(float largest) { return largest < kTiny ? 0.0f : 127.0f / largest; }

// One group of an A8 row from 32 values: scale = amax / 127, codes rounded to nearest even.
RIDGELINE_INLINE void quantise_group(vfloat a, vfloat b, uint8_t* row, const A8Layout& layout, int group) {
  const float largest = largest_magnitude(max(bits(abs(a)), bits(abs(b))));
  const float scale = largest * kInverse127;
  const vfloat inverse = splat(code_factor(largest));
  const vint first = to_int(a * inverse), second = to_int(b * inverse);
  int8_t* codes = reinterpret_cast<int8_t*>(row) + size_t(group) * kGroup;
  store_codes(codes, first);
  store_codes(codes + 16, second);
  const int32_t sums[2] = {reduce_add(first), reduce_add(second)};
  const float scaled_sum = scale * float(sums[0] + sums[1]);
  std::memcpy(row + layout.scales + 4 * size_t(group), &scale, 4);
  std::memcpy(row + layout.sums + 8 * size_t(group), sums, 8);
  std::memcpy(row + layout.scaled_sums + 4 * size_t(group), &scaled_sum, 4);
}

RIDGELINE_INLINE void store_f32(float* p, int count, vfloat a, bool accumulate) {
  if (count >= 16) return store(p, accumulate ? load(p) + a : a);
  const vmask m = first_lanes(count);
  store(m, p, accumulate ? load(m, p) + a : a);
}

// Where 32 values go, or the `count` that are left of a row. In A8 rows the column is a multiple of 32.
struct GroupAt {
  int64_t row;
  int column, count;
};

// Writes two vectors, which hold zeros beyond the row's end.
RIDGELINE_INLINE void write_group(const Target& out, const A8Layout& layout, GroupAt at, vfloat a, vfloat b) {
  if (out.a8.data != nullptr) {
    quantise_group(a, b, out.a8.data + at.row * out.a8.stride, layout, at.column / kGroup);
  } else if (out.bf16.data != nullptr) {
    uint16_t* p = out.bf16.data + at.row * out.bf16.stride + at.column;
    const int count = at.count + at.count % 2;  // a last value has a partner
    store_bf16(first_lanes(count), p, a);
    store_bf16(first_lanes(count - 16), p + 16, b);
  } else {
    float* p = out.f32.data + at.row * out.f32.stride + at.column;
    store_f32(p, at.count, a, out.accumulate);
    store_f32(p + 16, at.count - 16, b, out.accumulate);
  }
}

// Writes one row of `width` values, 32 at a time: values(column, first, second) fills two vectors, with zeros
// beyond the width.
template <class Values>
RIDGELINE_INLINE void write_row(const Target& out, int64_t row, int width, Values&& values) {
  const A8Layout layout = a8_layout(width);
  for (int column = 0; column < width; column += kGroup) {
    vfloat a, b;
    values(column, a, b);
    write_group(out, layout, {row, column, width - column}, a, b);
  }
}

// Calls f(row) for every row, in chunks that the team's workers take.
template <class F>
RIDGELINE_INLINE void for_rows(Worker& worker, int64_t rows, int64_t chunk, F&& f) {
  worker.for_units((rows + chunk - 1) / chunk, [&](int64_t unit) {
    const int64_t end = (unit + 1) * chunk < rows ? (unit + 1) * chunk : rows;
    for (int64_t row = unit * chunk; row < end; ++row) f(row);
  });
}

RIDGELINE_END
