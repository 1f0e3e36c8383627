// AVX-512 (F, BW, VL, DQ, VNNI) backend of simd.h.
#pragma once

#include <immintrin.h>

#include <cstring>

RIDGELINE_BEGIN

using vfloat = __m512;
struct vint {
  __m512i v;
};
using vmask = __mmask16;

constexpr int kMaxTokens = 6;
constexpr int kMaxTiles = 2;
constexpr int kMaxQueries = 4;

RIDGELINE_INLINE vmask first_lanes(int n) { return vmask(n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1); }
RIDGELINE_INLINE vmask lanes(int from, int to) { return vmask(first_lanes(to) & ~first_lanes(from)); }

RIDGELINE_INLINE unsigned mask_bits(vmask m) { return m; }
RIDGELINE_INLINE vmask mask_of(unsigned bits) { return vmask(bits); }

RIDGELINE_INLINE vfloat zero() { return _mm512_setzero_ps(); }
RIDGELINE_INLINE vfloat splat(float x) { return _mm512_set1_ps(x); }
RIDGELINE_INLINE vfloat load(const float* p) { return _mm512_loadu_ps(p); }
RIDGELINE_INLINE vfloat load(vmask m, const float* p) { return _mm512_maskz_loadu_ps(m, p); }
RIDGELINE_INLINE void store(float* p, vfloat a) { _mm512_storeu_ps(p, a); }
RIDGELINE_INLINE void store(vmask m, float* p, vfloat a) { _mm512_mask_storeu_ps(p, m, a); }

constexpr bool kRoundsOnce = true;  // fma does
RIDGELINE_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }
RIDGELINE_INLINE vfloat min(vfloat a, vfloat b) { return _mm512_min_ps(a, b); }
RIDGELINE_INLINE vfloat max(vfloat a, vfloat b) { return _mm512_max_ps(a, b); }
RIDGELINE_INLINE vfloat abs(vfloat a) { return _mm512_abs_ps(a); }
RIDGELINE_INLINE vfloat round_even(vfloat a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
RIDGELINE_INLINE vmask less(vfloat a, vfloat b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
RIDGELINE_INLINE vfloat select(vmask m, vfloat yes, vfloat no) { return _mm512_mask_blend_ps(m, no, yes); }
RIDGELINE_INLINE vfloat copy_sign(vfloat magnitude, vfloat sign) {
  const __m512i bit = _mm512_set1_epi32(int(0x80000000u));
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign), _mm512_castps_si512(magnitude), 0xca));
}

constexpr bool kCompresses = true;
RIDGELINE_INLINE void store_chosen(vmask m, float* p, vfloat a) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(m, a));
}

RIDGELINE_INLINE vint izero() { return {_mm512_setzero_si512()}; }
RIDGELINE_INLINE vint isplat(int32_t x) { return {_mm512_set1_epi32(x)}; }
RIDGELINE_INLINE vint iload(const void* p) { return {_mm512_loadu_si512(p)}; }
RIDGELINE_INLINE void istore(void* p, vint a) { _mm512_storeu_si512(p, a.v); }
RIDGELINE_INLINE void store_chosen(vmask m, int32_t* p, vint a) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m, a.v));
}
RIDGELINE_INLINE vint add(vint a, vint b) { return {_mm512_add_epi32(a.v, b.v)}; }
RIDGELINE_INLINE vint sub(vint a, vint b) { return {_mm512_sub_epi32(a.v, b.v)}; }
RIDGELINE_INLINE vint max(vint a, vint b) { return {_mm512_max_epi32(a.v, b.v)}; }
RIDGELINE_INLINE vint multiply(vint a, vint b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
RIDGELINE_INLINE vint bit_and(vint a, vint b) { return {_mm512_and_si512(a.v, b.v)}; }
RIDGELINE_INLINE vint bit_or(vint a, vint b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int kBits>
RIDGELINE_INLINE vint shift_left(vint a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
RIDGELINE_INLINE vint shift_right(vint a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}
RIDGELINE_INLINE vint load_bytes(const void* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
}
RIDGELINE_INLINE vint load_signed_bytes(const void* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
}
RIDGELINE_INLINE vint bits(vfloat a) { return {_mm512_castps_si512(a)}; }
RIDGELINE_INLINE vfloat from_bits(vint a) { return _mm512_castsi512_ps(a.v); }
RIDGELINE_INLINE vint to_int(vfloat a) { return {_mm512_cvtps_epi32(a)}; }
RIDGELINE_INLINE vint truncate(vfloat a) { return {_mm512_cvttps_epi32(a)}; }
RIDGELINE_INLINE vfloat to_float(vint a) { return _mm512_cvtepi32_ps(a.v); }
RIDGELINE_INLINE vfloat times_power_of_two(vfloat a, vfloat n) { return _mm512_scalef_ps(a, n); }

// Pairwise from the halves down; the order is part of the results.
RIDGELINE_INLINE float reduce_add(vfloat a) {
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
RIDGELINE_INLINE float reduce_max(vfloat a) {
  __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
RIDGELINE_INLINE int32_t reduce_add(vint a) { return _mm512_reduce_add_epi32(a.v); }
RIDGELINE_INLINE int32_t reduce_max(vint a) { return _mm512_reduce_max_epi32(a.v); }

RIDGELINE_INLINE vfloat load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
RIDGELINE_INLINE vfloat load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
RIDGELINE_INLINE vfloat load_bf16(vmask m, const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}
// The lanes of a and b in turn: the first sixteen to a, the others to b.
RIDGELINE_INLINE void interleave(vfloat& a, vfloat& b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const vfloat first = _mm512_permutex2var_ps(a, low, b);
  b = _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
  a = first;
}
RIDGELINE_INLINE void store_bf16(vmask m, uint16_t* p, vfloat a) {
  const __m512i x = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, x, _mm512_set1_epi32(0x400000));
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

RIDGELINE_INLINE void store_weights(uint16_t* p, vfloat a) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a));
#else
  store_bf16(first_lanes(16), p, a);
#endif
}

template <int kShift, int kBits>
RIDGELINE_INLINE vint byte_fields(vint a) {
  return {_mm512_and_si512(_mm512_srli_epi16(a.v, kShift), _mm512_set1_epi8((1 << kBits) - 1))};
}
RIDGELINE_INLINE vint load_table(const void* p) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
}
RIDGELINE_INLINE vint look_up(vint table, vint indices) {
  return {_mm512_shuffle_epi8(table.v, indices.v)};
}
// Four signed bytes, the same for every lane.
RIDGELINE_INLINE vint splat_codes(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return {_mm512_set1_epi32(four)};
}
RIDGELINE_INLINE vint dot(vint sum, vint unsigned_bytes, vint signed_bytes) {
  return {_mm512_dpbusd_epi32(sum.v, unsigned_bytes.v, signed_bytes.v)};
}
constexpr int kByteZero = 0;

RIDGELINE_INLINE vint dot_bytes(vint sum, vint unsigned_bytes, vint signed_bytes) {
  return dot(sum, unsigned_bytes, signed_bytes);
}
#if defined(__AVX512BF16__)
constexpr bool kFastBf16Dot = true;
#else
constexpr bool kFastBf16Dot = false;
#endif
// The second of each pair first.
RIDGELINE_INLINE vfloat dot_bf16(vfloat sum, vint a, vint b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, (__m512bh)a.v, (__m512bh)b.v);
#else
  const vint high = isplat(int32_t(0xffff0000u));
  sum = fma(from_bits(bit_and(a, high)), from_bits(bit_and(b, high)), sum);
  return fma(from_bits(shift_left<16>(a)), from_bits(shift_left<16>(b)), sum);
#endif
}
RIDGELINE_INLINE void store_codes(int8_t* p, vint a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v));
}
RIDGELINE_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
RIDGELINE_INLINE void prefetch_near(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

RIDGELINE_END
