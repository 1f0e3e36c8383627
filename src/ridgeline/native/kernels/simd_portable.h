// Portable backend of simd.h: the compiler's 64-byte vectors, which it cuts to what the machine has.
#pragma once

#include <cmath>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

RIDGELINE_BEGIN

typedef float vfloat __attribute__((vector_size(64)));
typedef int32_t vint __attribute__((vector_size(64)));
typedef uint32_t vuint __attribute__((vector_size(64)));
typedef uint8_t vbytes __attribute__((vector_size(16)));
typedef int32_t vmask __attribute__((vector_size(64)));  // lanes of 0 or -1

constexpr int kMaxTokens = 4;
constexpr int kMaxTiles = 1;
constexpr int kMaxQueries = 1;
constexpr bool kFastBf16Dot = false;

template <class To, class From>
RIDGELINE_INLINE To cast(From x) {
  To y;
  static_assert(sizeof x == sizeof y);
  std::memcpy(&y, &x, sizeof y);
  return y;
}

RIDGELINE_INLINE vint isplat(int32_t x) { return x - vint{}; }
RIDGELINE_INLINE vmask lanes(int from, int to) {
  const vint lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (lane >= isplat(from)) & (lane < isplat(to));
}
RIDGELINE_INLINE vmask first_lanes(int n) { return lanes(0, n); }

RIDGELINE_INLINE unsigned mask_bits(vmask m) {
  unsigned all = 0;
  for (int i = 0; i < 16; ++i) all |= unsigned(m[i] & 1) << i;
  return all;
}
RIDGELINE_INLINE vmask mask_of(unsigned bits) {
  const vint lane = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return (isplat(int32_t(bits)) & lane) != 0;
}

RIDGELINE_INLINE vfloat zero() { return vfloat{}; }
RIDGELINE_INLINE vfloat splat(float x) { return x - vfloat{}; }
RIDGELINE_INLINE vfloat load(const float* p) {
  vfloat a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
RIDGELINE_INLINE vfloat load(vmask m, const float* p) {
  if (m[0] & m[15]) return load(p);  // masks of memory have no holes
  vfloat a{};
  for (int i = 0; i < 16; ++i) {
    if (m[i]) a[i] = p[i];
  }
  return a;
}
RIDGELINE_INLINE void store(float* p, vfloat a) { std::memcpy(p, &a, sizeof a); }
RIDGELINE_INLINE void store(vmask m, float* p, vfloat a) {
  for (int i = 0; i < 16; ++i) {
    if (m[i]) p[i] = a[i];
  }
}

#if defined(__FP_FAST_FMAF)
constexpr bool kRoundsOnce = true;  // fma does
#else
constexpr bool kRoundsOnce = false;
#endif
RIDGELINE_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(__FP_FAST_FMAF)
  for (int i = 0; i < 16; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}
RIDGELINE_INLINE vfloat select(vmask m, vfloat yes, vfloat no) {
  return cast<vfloat>((cast<vint>(yes) & m) | (cast<vint>(no) & ~m));
}
RIDGELINE_INLINE vmask less(vfloat a, vfloat b) { return a < b; }
// Like the x86 instructions: the second operand where either is not a number.
RIDGELINE_INLINE vfloat min(vfloat a, vfloat b) { return select(a < b, a, b); }
RIDGELINE_INLINE vfloat max(vfloat a, vfloat b) { return select(b < a, a, b); }
RIDGELINE_INLINE vfloat abs(vfloat a) { return cast<vfloat>(cast<vint>(a) & 0x7fffffff); }
RIDGELINE_INLINE vfloat copy_sign(vfloat magnitude, vfloat sign) {
  return cast<vfloat>((cast<vint>(magnitude) & 0x7fffffff) | (cast<vint>(sign) & int32_t(0x80000000u)));
}
// Adding 1.5 * 2^23 leaves no bits for a fraction; right for magnitudes below 2^22.
RIDGELINE_INLINE vfloat round_even(vfloat a) { return (a + 12582912.0f) - 12582912.0f; }

RIDGELINE_INLINE vint izero() { return vint{}; }
RIDGELINE_INLINE vint iload(const void* p) {
  vint a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
RIDGELINE_INLINE void istore(void* p, vint a) { std::memcpy(p, &a, sizeof a); }
RIDGELINE_INLINE vint add(vint a, vint b) { return a + b; }
RIDGELINE_INLINE vint sub(vint a, vint b) { return a - b; }
RIDGELINE_INLINE vint max(vint a, vint b) { return (a & (b < a)) | (b & ~(b < a)); }
RIDGELINE_INLINE vint multiply(vint a, vint b) { return a * b; }
RIDGELINE_INLINE vint bit_and(vint a, vint b) { return a & b; }
RIDGELINE_INLINE vint bit_or(vint a, vint b) { return a | b; }
template <int kBits>
RIDGELINE_INLINE vint shift_left(vint a) {
  return a << kBits;
}
template <int kBits>
RIDGELINE_INLINE vint shift_right(vint a) {
  return cast<vint>(cast<vuint>(a) >> kBits);
}
RIDGELINE_INLINE vint load_bytes(const void* p) {
  vbytes a;
  std::memcpy(&a, p, sizeof a);
  return __builtin_convertvector(a, vint);
}
RIDGELINE_INLINE vint load_signed_bytes(const void* p) {
  return (load_bytes(p) << 24) >> 24;
}
RIDGELINE_INLINE vint bits(vfloat a) { return cast<vint>(a); }
RIDGELINE_INLINE vfloat from_bits(vint a) { return cast<vfloat>(a); }
// Right for magnitudes below 2^22; others, and what is not a number, give any integer.
RIDGELINE_INLINE vint to_int(vfloat a) { return cast<vint>(a + 12582912.0f) - 0x4b400000; }
RIDGELINE_INLINE vint truncate(vfloat a) { return __builtin_convertvector(a, vint); }
RIDGELINE_INLINE vfloat to_float(vint a) { return __builtin_convertvector(a, vfloat); }
// n is an integer from -126 to 127.
RIDGELINE_INLINE vfloat times_power_of_two(vfloat a, vfloat n) {
  return a * cast<vfloat>((to_int(n) + 127) << 23);
}

// Pairwise from the halves down; the order is part of the results.
RIDGELINE_INLINE float reduce_add(vfloat a) {
  float s[16];
  std::memcpy(s, &a, sizeof s);
  for (int n = 8; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) s[i] += s[i + n];
  }
  return s[0];
}
RIDGELINE_INLINE float reduce_max(vfloat a) {
  float s[16];
  std::memcpy(s, &a, sizeof s);
  for (int n = 8; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) s[i] = s[i] > s[i + n] ? s[i] : s[i + n];
  }
  return s[0];
}
RIDGELINE_INLINE int32_t reduce_add(vint a) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += a[i];
  return sum;
}
RIDGELINE_INLINE int32_t reduce_max(vint a) {
  int32_t largest = a[0];
  for (int i = 1; i < 16; ++i) largest = a[i] > largest ? a[i] : largest;
  return largest;
}

RIDGELINE_INLINE vint load_u16(const uint16_t* p) {
  vint a;
  for (int i = 0; i < 16; ++i) a[i] = p[i];
  return a;
}
// Rebias the exponent; subnormals go through a subtraction, because denormal operands count as zero here.
RIDGELINE_INLINE vfloat load_f16(const uint16_t* p) {
  const vint half = load_u16(p), sign = (half & 0x8000) << 16, magnitude = (half & 0x7fff) << 13;
  const vint special = (magnitude >= isplat(0x7c00 << 13)) & (112 << 23);
  const vint normal = magnitude + (112 << 23) + special;
  const vfloat small = cast<vfloat>(magnitude + (113 << 23)) - cast<vfloat>(isplat(113 << 23));
  return cast<vfloat>(cast<vint>(select(magnitude < isplat(0x400 << 13), small, cast<vfloat>(normal))) |
                      sign);
}
RIDGELINE_INLINE vfloat load_bf16(const uint16_t* p) { return cast<vfloat>(load_u16(p) << 16); }
RIDGELINE_INLINE vfloat load_bf16(vmask m, const uint16_t* p) {
  if (m[0] & m[15]) return load_bf16(p);
  vint a{};
  for (int i = 0; i < 16; ++i) {
    if (m[i]) a[i] = p[i];
  }
  return cast<vfloat>(a << 16);
}
// The lanes of a and b in turn: the first sixteen to a, the others to b.
RIDGELINE_INLINE void interleave(vfloat& a, vfloat& b) {
  vfloat first, second;
  for (int i = 0; i < 8; ++i) {
    first[2 * i] = a[i];
    first[2 * i + 1] = b[i];
    second[2 * i] = a[8 + i];
    second[2 * i + 1] = b[8 + i];
  }
  a = first;
  b = second;
}
RIDGELINE_INLINE void store_bf16(vmask m, uint16_t* p, vfloat a) {
  const vint x = cast<vint>(a), nan = a != a;
  const vint rounded = ((x + 0x7fff + ((x >> 16) & 1)) & ~nan) | ((x | 0x400000) & nan);
  for (int i = 0; i < 16; ++i) {
    if (m[i]) p[i] = uint16_t(uint32_t(rounded[i]) >> 16);
  }
}
RIDGELINE_INLINE void store_weights(uint16_t* p, vfloat a) { store_bf16(first_lanes(16), p, a); }

template <int kShift, int kBits>
RIDGELINE_INLINE vint byte_fields(vint a) {
  return shift_right<kShift>(a) & isplat(0x01010101 * ((1 << kBits) - 1));
}
RIDGELINE_INLINE vint load_table(const void* p) {
  vint table{};
  std::memcpy(&table, p, 16);
  return table;
}
RIDGELINE_INLINE vint look_up(vint table, vint indices) {
  uint8_t from[64], at[64], to[64];
  std::memcpy(from, &table, 64);
  std::memcpy(at, &indices, 64);
  for (int i = 0; i < 64; ++i) to[i] = from[at[i] & 15];
  return iload(to);
}
// Four signed bytes, the same for every lane.
RIDGELINE_INLINE vint splat_codes(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return isplat(four);
}
RIDGELINE_INLINE vint dot(vint sum, vint unsigned_bytes, vint signed_bytes) {
#if defined(__SSE2__)
  // Bytes 0 and 2, then 1 and 3, of each lane as 16-bit pairs.
  const vint even = unsigned_bytes & 0x00ff00ff, odd = (unsigned_bytes >> 8) & 0x00ff00ff;
  for (int i = 0; i < 4; ++i) {
    __m128i part[3], codes;
    std::memcpy(&part[0], reinterpret_cast<const char*>(&sum) + 16 * i, 16);
    std::memcpy(&part[1], reinterpret_cast<const char*>(&even) + 16 * i, 16);
    std::memcpy(&part[2], reinterpret_cast<const char*>(&odd) + 16 * i, 16);
    std::memcpy(&codes, reinterpret_cast<const char*>(&signed_bytes) + 16 * i, 16);
    const __m128i even_codes = _mm_srai_epi16(_mm_slli_epi16(codes, 8), 8),
                  odd_codes = _mm_srai_epi16(codes, 8);
    part[0] = _mm_add_epi32(part[0], _mm_madd_epi16(part[1], even_codes));
    part[0] = _mm_add_epi32(part[0], _mm_madd_epi16(part[2], odd_codes));
    std::memcpy(reinterpret_cast<char*>(&sum) + 16 * i, &part[0], 16);
  }
  return sum;
#else
  for (int shift = 0; shift < 32; shift += 8) {
    sum += ((unsigned_bytes >> shift) & 0xff) * ((signed_bytes << (24 - shift)) >> 24);
  }
  return sum;
#endif
}
constexpr int kByteZero = 0;

RIDGELINE_INLINE vint dot_bytes(vint sum, vint unsigned_bytes, vint signed_bytes) {
  return dot(sum, unsigned_bytes, signed_bytes);
}
// The second of each pair first.
RIDGELINE_INLINE vfloat dot_bf16(vfloat sum, vint a, vint b) {
  const vint high = isplat(int32_t(0xffff0000u));
  sum = fma(cast<vfloat>(a & high), cast<vfloat>(b & high), sum);
  return fma(cast<vfloat>(a << 16), cast<vfloat>(b << 16), sum);
}
RIDGELINE_INLINE void store_codes(int8_t* p, vint a) {
  for (int i = 0; i < 16; ++i) p[i] = int8_t(a[i] < -128 ? -128 : a[i] > 127 ? 127 : a[i]);
}
RIDGELINE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
RIDGELINE_INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

RIDGELINE_END
