// AVX2 (with FMA and F16C) backend of simd.h: two registers of eight lanes.
#pragma once

#include <immintrin.h>

#include <cstring>

RIDGELINE_BEGIN

struct vfloat {
  __m256 lo, hi;
};
struct vint {
  __m256i lo, hi;
};
// Lanes of 0 or -1. `all` spares the common case of whole vectors the masked instructions, of which some
// processors' stores are slow; it may be false for a mask of all lanes.
struct vmask {
  __m256i lo, hi;
  bool all;
};

constexpr int kMaxTokens = 4;
constexpr int kMaxTiles = 1;
constexpr int kMaxQueries = 1;
constexpr bool kFastBf16Dot = false;

RIDGELINE_INLINE vmask lanes(int from, int to) {
  const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
  const __m256i before = _mm256_set1_epi32(from), end = _mm256_set1_epi32(to);
  return {_mm256_andnot_si256(_mm256_cmpgt_epi32(before, low), _mm256_cmpgt_epi32(end, low)),
          _mm256_andnot_si256(_mm256_cmpgt_epi32(before, high), _mm256_cmpgt_epi32(end, high)),
          from <= 0 && to >= 16};
}
RIDGELINE_INLINE vmask first_lanes(int n) { return lanes(0, n); }
RIDGELINE_INLINE unsigned mask_bits(vmask m) {
  return unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(m.lo))) |
         unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(m.hi))) << 8;
}

RIDGELINE_INLINE vmask mask_of(unsigned bits) {
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), high = _mm256_slli_epi32(low, 8);
  const __m256i all = _mm256_set1_epi32(int(bits));
  return {_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low),
          _mm256_cmpeq_epi32(_mm256_and_si256(all, high), high), false};
}

RIDGELINE_INLINE vfloat zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
RIDGELINE_INLINE vfloat splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
RIDGELINE_INLINE vfloat load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
RIDGELINE_INLINE vfloat load(vmask m, const float* p) {
  if (m.all) return load(p);
  return {_mm256_maskload_ps(p, m.lo), _mm256_maskload_ps(p + 8, m.hi)};
}
RIDGELINE_INLINE void store(float* p, vfloat a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
RIDGELINE_INLINE void store(vmask m, float* p, vfloat a) {
  if (m.all) return store(p, a);
  _mm256_maskstore_ps(p, m.lo, a.lo);
  _mm256_maskstore_ps(p + 8, m.hi, a.hi);
}

RIDGELINE_INLINE vfloat operator+(vfloat a, vfloat b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
RIDGELINE_INLINE vfloat operator-(vfloat a, vfloat b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
RIDGELINE_INLINE vfloat operator*(vfloat a, vfloat b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
RIDGELINE_INLINE vfloat operator/(vfloat a, vfloat b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
constexpr bool kRoundsOnce = true;  // fma does
RIDGELINE_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
RIDGELINE_INLINE vfloat min(vfloat a, vfloat b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
RIDGELINE_INLINE vfloat max(vfloat a, vfloat b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
RIDGELINE_INLINE vfloat abs(vfloat a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
RIDGELINE_INLINE vfloat round_even(vfloat a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
RIDGELINE_INLINE vmask less(vfloat a, vfloat b) {
  return {_mm256_castps_si256(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_castps_si256(_mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)), false};
}
RIDGELINE_INLINE vfloat select(vmask m, vfloat yes, vfloat no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_castsi256_ps(m.lo)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_castsi256_ps(m.hi))};
}
RIDGELINE_INLINE vfloat copy_sign(vfloat magnitude, vfloat sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  const vfloat size = abs(magnitude);
  return {_mm256_or_ps(size.lo, _mm256_and_ps(bit, sign.lo)),
          _mm256_or_ps(size.hi, _mm256_and_ps(bit, sign.hi))};
}

RIDGELINE_INLINE vint izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
RIDGELINE_INLINE vint isplat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
RIDGELINE_INLINE vint iload(const void* p) {
  const auto* halves = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
RIDGELINE_INLINE void istore(void* p, vint a) {
  auto* halves = static_cast<__m256i*>(p);
  _mm256_storeu_si256(halves, a.lo);
  _mm256_storeu_si256(halves + 1, a.hi);
}
RIDGELINE_INLINE vint add(vint a, vint b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
RIDGELINE_INLINE vint sub(vint a, vint b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
RIDGELINE_INLINE vint max(vint a, vint b) {
  return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}
RIDGELINE_INLINE vint multiply(vint a, vint b) {
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
RIDGELINE_INLINE vint bit_and(vint a, vint b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
RIDGELINE_INLINE vint bit_or(vint a, vint b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
template <int kBits>
RIDGELINE_INLINE vint shift_left(vint a) {
  return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)};
}
template <int kBits>
RIDGELINE_INLINE vint shift_right(vint a) {
  return {_mm256_srli_epi32(a.lo, kBits), _mm256_srli_epi32(a.hi, kBits)};
}
RIDGELINE_INLINE vint load_bytes(const void* p) {
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
RIDGELINE_INLINE vint load_signed_bytes(const void* p) {
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
RIDGELINE_INLINE vint bits(vfloat a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
RIDGELINE_INLINE vfloat from_bits(vint a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
RIDGELINE_INLINE vint to_int(vfloat a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
RIDGELINE_INLINE vint truncate(vfloat a) { return {_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi)}; }
RIDGELINE_INLINE vfloat to_float(vint a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
// n is an integer from -126 to 127.
RIDGELINE_INLINE vfloat times_power_of_two(vfloat a, vfloat n) {
  return a * from_bits(shift_left<23>(add(to_int(n), isplat(127))));
}

// Pairwise from the halves down; the order is part of the results.
RIDGELINE_INLINE float reduce_add(vfloat a) {
  const __m256 h = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
RIDGELINE_INLINE float reduce_max(vfloat a) {
  const __m256 h = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
RIDGELINE_INLINE int32_t reduce_add(vint a) {
  const __m256i h = _mm256_add_epi32(a.lo, a.hi);
  __m128i q = _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
RIDGELINE_INLINE int32_t reduce_max(vint a) {
  const __m256i h = _mm256_max_epi32(a.lo, a.hi);
  __m128i q = _mm_max_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}

RIDGELINE_INLINE vfloat load_f16(const uint16_t* p) {
  const auto* halves = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
RIDGELINE_INLINE vfloat load_bf16(const uint16_t* p) {
  const auto* halves = reinterpret_cast<const __m128i*>(p);
  return from_bits(shift_left<16>(
      {_mm256_cvtepu16_epi32(_mm_loadu_si128(halves)), _mm256_cvtepu16_epi32(_mm_loadu_si128(halves + 1))}));
}
RIDGELINE_INLINE vfloat load_bf16(vmask m, const uint16_t* p) {
  if (m.all) return load_bf16(p);
  uint16_t values[16] = {};
  for (unsigned left = mask_bits(m), i = 0; left != 0; left >>= 1, ++i) {
    if (left & 1) values[i] = p[i];
  }
  return load_bf16(values);
}
// The lanes of a and b in turn: the first sixteen to a, the others to b.
RIDGELINE_INLINE vfloat interleaved(__m256 a, __m256 b) {
  const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
  return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}
RIDGELINE_INLINE void interleave(vfloat& a, vfloat& b) {
  const vfloat first = interleaved(a.lo, b.lo);
  b = interleaved(a.hi, b.hi);
  a = first;
}
RIDGELINE_INLINE __m256i bf16_rounded(__m256 a) {
  const __m256i x = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  return _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                                                _mm256_castsi256_ps(quiet), nan)),
                           16);
}
RIDGELINE_INLINE void store_bf16(vmask m, uint16_t* p, vfloat a) {
  const __m256i packed = _mm256_permute4x64_epi64(
      _mm256_packus_epi32(bf16_rounded(a.lo), bf16_rounded(a.hi)), 0xd8);
  if (m.all) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  uint16_t values[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), packed);
  for (unsigned left = mask_bits(m), i = 0; left != 0; left >>= 1, ++i) {
    if (left & 1) p[i] = values[i];
  }
}
RIDGELINE_INLINE void store_weights(uint16_t* p, vfloat a) { store_bf16(first_lanes(16), p, a); }

template <int kShift, int kBits>
RIDGELINE_INLINE vint byte_fields(vint a) {
  const __m256i field = _mm256_set1_epi8((1 << kBits) - 1);
  return {_mm256_and_si256(_mm256_srli_epi16(a.lo, kShift), field),
          _mm256_and_si256(_mm256_srli_epi16(a.hi, kShift), field)};
}
RIDGELINE_INLINE vint load_table(const void* p) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  return {table, table};
}
RIDGELINE_INLINE vint look_up(vint table, vint indices) {
  return {_mm256_shuffle_epi8(table.lo, indices.lo), _mm256_shuffle_epi8(table.hi, indices.hi)};
}
// Four signed bytes, the same for every lane.
RIDGELINE_INLINE vint splat_codes(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return isplat(four);
}

constexpr int kByteZero = 128;

// The products of neighbours are added with 16 bits: two of 127 * -128, or of 128 * 127, still fit.
RIDGELINE_INLINE __m256i add_products(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
  const __m256i pairs = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
RIDGELINE_INLINE vint dot(vint sum, vint unsigned_bytes, vint signed_bytes) {
  return {add_products(sum.lo, unsigned_bytes.lo, signed_bytes.lo),
          add_products(sum.hi, unsigned_bytes.hi, signed_bytes.hi)};
}
// |a| * (b with a's sign), a being the byte minus 128.
RIDGELINE_INLINE __m256i add_signed_products(__m256i sum, __m256i bytes, __m256i b) {
  const __m256i a = _mm256_xor_si256(bytes, _mm256_set1_epi8(char(0x80)));
  return add_products(sum, _mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
}
RIDGELINE_INLINE vint dot_bytes(vint sum, vint unsigned_bytes, vint signed_bytes) {
  return {add_signed_products(sum.lo, unsigned_bytes.lo, signed_bytes.lo),
          add_signed_products(sum.hi, unsigned_bytes.hi, signed_bytes.hi)};
}
// The second of each pair first.
RIDGELINE_INLINE vfloat dot_bf16(vfloat sum, vint a, vint b) {
  const vint high = isplat(int32_t(0xffff0000u));
  sum = fma(from_bits(bit_and(a, high)), from_bits(bit_and(b, high)), sum);
  return fma(from_bits(shift_left<16>(a)), from_bits(shift_left<16>(b)), sum);
}
RIDGELINE_INLINE void store_codes(int8_t* p, vint a) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
RIDGELINE_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
RIDGELINE_INLINE void prefetch_near(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

RIDGELINE_END
