// Loops of the arithmetic that the linear kernels do, from registers only: what the cores could reach.
#include "../launch.h"
#include "simd.h"

RIDGELINE_BEGIN

namespace {

constexpr int kChains = 12;  // enough to hide the latency of any of the instructions

double int8_ops(int64_t iterations) {
  vint acc[kChains], a = isplat(0x01020304), b = isplat(0x03fd0201);
  asm volatile("" : "+m"(a), "+m"(b));  // unknown to the compiler
  for (auto& x : acc) x = izero();
  for (int64_t i = 0; i < iterations; ++i) {
    for (auto& x : acc) x = dot(x, a, b);
  }
  int32_t sum = 0;
  for (auto& x : acc) sum += reduce_add(x);
  asm volatile("" ::"r"(sum));
  return double(iterations) * kChains * 64 * 2;
}

double fp32_ops(int64_t iterations) {
  vfloat acc[kChains], a = splat(0.999f), b = splat(0.001f);
  asm volatile("" : "+m"(a), "+m"(b));
  for (auto& x : acc) x = splat(1.0f);
  for (int64_t i = 0; i < iterations; ++i) {
    for (auto& x : acc) x = fma(x, a, b);
  }
  float sum = 0;
  for (auto& x : acc) sum += reduce_add(x);
  asm volatile("" ::"g"(sum));
  return double(iterations) * kChains * 16 * 2;
}

// The linear kernels do not use these instructions, so they are asked for here alone.
#if defined(__AVX512VNNI__)
__attribute__((target("avx512bf16"))) double bf16_ops(int64_t iterations) {
  vfloat acc[kChains];
  __m512i bits = _mm512_set1_epi32(0x3f803f80);
  asm volatile("" : "+m"(bits));
  const __m512bh a = (__m512bh)bits;
  for (auto& x : acc) x = splat(1.0f);
  for (int64_t i = 0; i < iterations; ++i) {
    for (auto& x : acc) x = _mm512_dpbf16_ps(x, a, a);
  }
  float sum = 0;
  for (auto& x : acc) sum += reduce_add(x);
  asm volatile("" ::"g"(sum));
  return double(iterations) * kChains * 32 * 2;
}
bool has_bf16() { return __builtin_cpu_supports("avx512bf16"); }
#else
double bf16_ops(int64_t) { return 0.0; }
bool has_bf16() { return false; }
#endif

}  // namespace

// Operations done, a multiply-add being two; 0 where the level or the machine has no such instruction.
double peak_ops(PeakFormat format, int64_t iterations) {
  switch (format) {
    case PeakFormat::int8: return int8_ops(iterations);
    case PeakFormat::bf16: return has_bf16() ? bf16_ops(iterations) : 0.0;
    default: return fp32_ops(iterations);
  }
}

RIDGELINE_END
