// Loops of the arithmetic that the linear kernels do, from registers only: what the cores could reach.
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

}  // namespace

// 0: int8, 2: fp32. Operations done, a multiply-add being two.
double peak_ops(int format, int64_t iterations) {
  return format == 0 ? int8_ops(iterations) : format == 2 ? fp32_ops(iterations) : 0.0;
}

RIDGELINE_END
