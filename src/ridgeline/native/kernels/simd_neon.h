// NEON backend of simd.h, for AArch64 with the dot-product instructions: four registers of four lanes.
#pragma once

#include <arm_neon.h>

#include <cstring>

RIDGELINE_BEGIN

struct vfloat {
  float32x4_t v[4];
};
struct vint {
  int32x4_t v[4];
};
// Lanes of 0 or all ones. `all` spares the common case of whole vectors a loop over lanes; it may be false
// for a mask of all lanes.
struct vmask {
  uint32x4_t v[4];
  bool all;
};

constexpr int kMaxTokens = 4;
constexpr int kMaxTiles = 1;
constexpr int kMaxQueries = 1;
constexpr bool kFastBf16Dot = false;

// A vector of f(0) to f(3).
template <class F>
RIDGELINE_INLINE vfloat floats(F&& f) {
  return {{f(0), f(1), f(2), f(3)}};
}
template <class F>
RIDGELINE_INLINE vint ints(F&& f) {
  return {{f(0), f(1), f(2), f(3)}};
}
RIDGELINE_INLINE int8x16_t as_bytes(int32x4_t a) { return vreinterpretq_s8_s32(a); }
RIDGELINE_INLINE uint8x16_t as_unsigned_bytes(int32x4_t a) { return vreinterpretq_u8_s32(a); }

RIDGELINE_INLINE uint32x4_t lanes_of(int first, int from, int to) {
  const int32_t numbers[4] = {0, 1, 2, 3};
  const int32x4_t lane = vaddq_s32(vld1q_s32(numbers), vdupq_n_s32(first));
  return vandq_u32(vcgeq_s32(lane, vdupq_n_s32(from)), vcltq_s32(lane, vdupq_n_s32(to)));
}
RIDGELINE_INLINE vmask lanes(int from, int to) {
  return {{lanes_of(0, from, to), lanes_of(4, from, to), lanes_of(8, from, to), lanes_of(12, from, to)},
          from <= 0 && to >= 16};
}
RIDGELINE_INLINE vmask first_lanes(int n) { return lanes(0, n); }
RIDGELINE_INLINE uint32x4_t lane_bits(int i) {
  const uint32_t ones[4] = {1u << (4 * i), 2u << (4 * i), 4u << (4 * i), 8u << (4 * i)};
  return vld1q_u32(ones);
}
RIDGELINE_INLINE unsigned mask_bits(vmask m) {
  unsigned all = 0;
  for (int i = 0; i < 4; ++i) all |= vaddvq_u32(vandq_u32(m.v[i], lane_bits(i)));
  return all;
}
RIDGELINE_INLINE vmask mask_of(unsigned bits) {
  const uint32x4_t all = vdupq_n_u32(bits);
  return {{vtstq_u32(all, lane_bits(0)), vtstq_u32(all, lane_bits(1)), vtstq_u32(all, lane_bits(2)),
           vtstq_u32(all, lane_bits(3))},
          false};
}
// Calls f(lane) for the lanes of a mask.
template <class F>
RIDGELINE_INLINE void for_lanes(vmask m, F&& f) {
  uint32_t lane[16];
  for (int i = 0; i < 4; ++i) vst1q_u32(lane + 4 * i, m.v[i]);
  for (int i = 0; i < 16; ++i) {
    if (lane[i] != 0) f(i);
  }
}

RIDGELINE_INLINE vfloat splat(float x) { return {{vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}}; }
RIDGELINE_INLINE vfloat zero() { return splat(0.0f); }
RIDGELINE_INLINE vfloat load(const float* p) {
  return floats([&](int i) { return vld1q_f32(p + 4 * i); });
}
RIDGELINE_INLINE vfloat load(vmask m, const float* p) {
  if (m.all) return load(p);
  float values[16] = {};
  for_lanes(m, [&](int i) { values[i] = p[i]; });
  return load(values);
}
RIDGELINE_INLINE void store(float* p, vfloat a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
RIDGELINE_INLINE void store(vmask m, float* p, vfloat a) {
  if (m.all) return store(p, a);
  float values[16];
  store(values, a);
  for_lanes(m, [&](int i) { p[i] = values[i]; });
}

RIDGELINE_INLINE vfloat operator+(vfloat a, vfloat b) {
  return floats([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
RIDGELINE_INLINE vfloat operator-(vfloat a, vfloat b) {
  return floats([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
RIDGELINE_INLINE vfloat operator*(vfloat a, vfloat b) {
  return floats([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
RIDGELINE_INLINE vfloat operator/(vfloat a, vfloat b) {
  return floats([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
constexpr bool kRoundsOnce = true;  // fma does
RIDGELINE_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
  return floats([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
// Like the x86 instructions: the second operand where either is not a number.
RIDGELINE_INLINE vfloat min(vfloat a, vfloat b) {
  return floats([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
RIDGELINE_INLINE vfloat max(vfloat a, vfloat b) {
  return floats([&](int i) { return vbslq_f32(vcltq_f32(b.v[i], a.v[i]), a.v[i], b.v[i]); });
}
RIDGELINE_INLINE vfloat abs(vfloat a) {
  return floats([&](int i) { return vabsq_f32(a.v[i]); });
}
RIDGELINE_INLINE vfloat round_even(vfloat a) {
  return floats([&](int i) { return vrndnq_f32(a.v[i]); });
}
RIDGELINE_INLINE vmask less(vfloat a, vfloat b) {
  return {{vcltq_f32(a.v[0], b.v[0]), vcltq_f32(a.v[1], b.v[1]), vcltq_f32(a.v[2], b.v[2]),
           vcltq_f32(a.v[3], b.v[3])},
          false};
}
RIDGELINE_INLINE vfloat select(vmask m, vfloat yes, vfloat no) {
  return floats([&](int i) { return vbslq_f32(m.v[i], yes.v[i], no.v[i]); });
}
RIDGELINE_INLINE vfloat copy_sign(vfloat magnitude, vfloat sign) {
  const uint32x4_t bit = vdupq_n_u32(0x80000000u);
  return floats([&](int i) { return vbslq_f32(bit, sign.v[i], magnitude.v[i]); });
}

RIDGELINE_INLINE vint isplat(int32_t x) { return {{vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}}; }
RIDGELINE_INLINE vint izero() { return isplat(0); }
RIDGELINE_INLINE vint iload(const void* p) {
  const auto* bytes = static_cast<const uint8_t*>(p);
  return ints([&](int i) { return vreinterpretq_s32_u8(vld1q_u8(bytes + 16 * i)); });
}
RIDGELINE_INLINE void istore(void* p, vint a) {
  for (int i = 0; i < 4; ++i) vst1q_u8(static_cast<uint8_t*>(p) + 16 * i, as_unsigned_bytes(a.v[i]));
}
RIDGELINE_INLINE vint add(vint a, vint b) {
  return ints([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
RIDGELINE_INLINE vint sub(vint a, vint b) {
  return ints([&](int i) { return vsubq_s32(a.v[i], b.v[i]); });
}
RIDGELINE_INLINE vint max(vint a, vint b) {
  return ints([&](int i) { return vmaxq_s32(a.v[i], b.v[i]); });
}
RIDGELINE_INLINE vint multiply(vint a, vint b) {
  return ints([&](int i) { return vmulq_s32(a.v[i], b.v[i]); });
}
RIDGELINE_INLINE vint bit_and(vint a, vint b) {
  return ints([&](int i) { return vandq_s32(a.v[i], b.v[i]); });
}
RIDGELINE_INLINE vint bit_or(vint a, vint b) {
  return ints([&](int i) { return vorrq_s32(a.v[i], b.v[i]); });
}
template <int kBits>
RIDGELINE_INLINE vint shift_left(vint a) {
  return ints([&](int i) { return vshlq_n_s32(a.v[i], kBits); });
}
template <int kBits>
RIDGELINE_INLINE vint shift_right(vint a) {
  if constexpr (kBits == 0) return a;  // the instruction has no shift by 0
  else return ints([&](int i) {
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v[i]), kBits));
  });
}
RIDGELINE_INLINE vint load_bytes(const void* p) {
  const uint8x16_t bytes = vld1q_u8(static_cast<const uint8_t*>(p));
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
           vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
}
RIDGELINE_INLINE vint load_signed_bytes(const void* p) {
  const int8x16_t bytes = vld1q_s8(static_cast<const int8_t*>(p));
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
           vmovl_s16(vget_high_s16(high))}};
}
RIDGELINE_INLINE vint bits(vfloat a) {
  return ints([&](int i) { return vreinterpretq_s32_f32(a.v[i]); });
}
RIDGELINE_INLINE vfloat from_bits(vint a) {
  return floats([&](int i) { return vreinterpretq_f32_s32(a.v[i]); });
}
RIDGELINE_INLINE vint to_int(vfloat a) {
  return ints([&](int i) { return vcvtnq_s32_f32(a.v[i]); });
}
RIDGELINE_INLINE vint truncate(vfloat a) {
  return ints([&](int i) { return vcvtq_s32_f32(a.v[i]); });
}
RIDGELINE_INLINE vfloat to_float(vint a) {
  return floats([&](int i) { return vcvtq_f32_s32(a.v[i]); });
}
// n is an integer from -126 to 127.
RIDGELINE_INLINE vfloat times_power_of_two(vfloat a, vfloat n) {
  return a * from_bits(shift_left<23>(add(to_int(n), isplat(127))));
}

// Pairwise from the halves down; the order is part of the results.
RIDGELINE_INLINE float reduce_add(vfloat a) {
  const float32x4_t q = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t pair = vadd_f32(vget_low_f32(q), vget_high_f32(q));
  return vget_lane_f32(pair, 0) + vget_lane_f32(pair, 1);
}
RIDGELINE_INLINE float reduce_max(vfloat a) {
  const vfloat h = max(a, {{a.v[2], a.v[3], a.v[2], a.v[3]}});
  float s[4];
  vst1q_f32(s, vbslq_f32(vcltq_f32(h.v[1], h.v[0]), h.v[0], h.v[1]));
  for (int n = 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) s[i] = s[i] > s[i + n] ? s[i] : s[i + n];
  }
  return s[0];
}
RIDGELINE_INLINE int32_t reduce_add(vint a) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}
RIDGELINE_INLINE int32_t reduce_max(vint a) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.v[0], a.v[1]), vmaxq_s32(a.v[2], a.v[3])));
}

RIDGELINE_INLINE vfloat load_f16(const uint16_t* p) {
  return floats([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
RIDGELINE_INLINE vfloat load_bf16(const uint16_t* p) {
  return floats([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
RIDGELINE_INLINE vfloat load_bf16(vmask m, const uint16_t* p) {
  if (m.all) return load_bf16(p);
  uint16_t values[16] = {};
  for_lanes(m, [&](int i) { values[i] = p[i]; });
  return load_bf16(values);
}
// The lanes of a and b in turn: the first sixteen to a, the others to b.
RIDGELINE_INLINE vfloat interleaved(const float32x4_t* a, const float32x4_t* b) {
  return {{vzip1q_f32(a[0], b[0]), vzip2q_f32(a[0], b[0]), vzip1q_f32(a[1], b[1]), vzip2q_f32(a[1], b[1])}};
}
RIDGELINE_INLINE void interleave(vfloat& a, vfloat& b) {
  const vfloat first = interleaved(a.v, b.v);
  b = interleaved(a.v + 2, b.v + 2);
  a = first;
}
RIDGELINE_INLINE uint16x4_t bf16_rounded(float32x4_t a) {
  const uint32x4_t x = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(x, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t quiet = vorrq_u32(x, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), rounded, quiet), 16);
}
RIDGELINE_INLINE void store_bf16(vmask m, uint16_t* p, vfloat a) {
  uint16_t values[16];
  uint16_t* to = m.all ? p : values;
  for (int i = 0; i < 4; ++i) vst1_u16(to + 4 * i, bf16_rounded(a.v[i]));
  if (!m.all) for_lanes(m, [&](int i) { p[i] = values[i]; });
}
RIDGELINE_INLINE void store_weights(uint16_t* p, vfloat a) { store_bf16(first_lanes(16), p, a); }

template <int kShift, int kBits>
RIDGELINE_INLINE vint byte_fields(vint a) {
  const uint8x16_t field = vdupq_n_u8((1 << kBits) - 1);
  return ints([&](int i) {
    uint8x16_t bytes = as_unsigned_bytes(a.v[i]);
    if constexpr (kShift > 0) bytes = vshrq_n_u8(bytes, kShift);
    return vreinterpretq_s32_u8(vandq_u8(bytes, field));
  });
}
RIDGELINE_INLINE vint load_table(const void* p) {
  const int32x4_t table = vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
  return {{table, table, table, table}};
}
RIDGELINE_INLINE vint look_up(vint table, vint indices) {
  return ints([&](int i) {
    return vreinterpretq_s32_u8(vqtbl1q_u8(as_unsigned_bytes(table.v[i]), as_unsigned_bytes(indices.v[i])));
  });
}
// Four signed bytes, the same for every lane.
RIDGELINE_INLINE vint splat_codes(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return isplat(four);
}
// The instruction takes signed bytes: those up to 127 as they are, any byte less 128.
constexpr int kByteZero = 128;

RIDGELINE_INLINE vint dot(vint sum, vint unsigned_bytes, vint signed_bytes) {
  return ints([&](int i) {
    return vdotq_s32(sum.v[i], as_bytes(unsigned_bytes.v[i]), as_bytes(signed_bytes.v[i]));
  });
}
RIDGELINE_INLINE vint dot_bytes(vint sum, vint unsigned_bytes, vint signed_bytes) {
  const int32x4_t zero_point = vdupq_n_s32(int32_t(0x80808080u));
  return ints([&](int i) {
    return vdotq_s32(sum.v[i], as_bytes(veorq_s32(unsigned_bytes.v[i], zero_point)),
                     as_bytes(signed_bytes.v[i]));
  });
}
// The second of each pair first.
RIDGELINE_INLINE vfloat dot_bf16(vfloat sum, vint a, vint b) {
  const vint high = isplat(int32_t(0xffff0000u));
  sum = fma(from_bits(bit_and(a, high)), from_bits(bit_and(b, high)), sum);
  return fma(from_bits(shift_left<16>(a)), from_bits(shift_left<16>(b)), sum);
}
RIDGELINE_INLINE void store_codes(int8_t* p, vint a) {
  for (int half = 0; half < 2; ++half) {
    const int16x4_t first = vqmovn_s32(a.v[2 * half]), second = vqmovn_s32(a.v[2 * half + 1]);
    vst1_s8(p + 8 * half, vqmovn_s16(vcombine_s16(first, second)));
  }
}
RIDGELINE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
RIDGELINE_INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

RIDGELINE_END
