// Loops of the arithmetic that the linear kernels do, from registers only, and of loads without arithmetic:
// what the cores could reach.
#include <chrono>

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

// Dot products with as many operations on bits beside them, which are not counted.
double int8_unpacked_ops(int64_t iterations) {
  constexpr int kDots = 10, kFields = kDots / 2;
  vint acc[kDots], fields[kFields], a = isplat(0x01020304), b = isplat(0x03fd0201), mask = isplat(0x0f0f0f0f);
  asm volatile("" : "+m"(a), "+m"(b), "+m"(mask));
  for (auto& x : acc) x = izero();
  for (auto& x : fields) x = a;
  for (int64_t i = 0; i < iterations; ++i) {
    for (auto& x : acc) x = dot(x, a, b);
    for (auto& x : fields) x = bit_and(shift_right<4>(x), mask);
  }
  int32_t sum = 0;
  for (auto& x : acc) sum += reduce_add(x);
  for (auto& x : fields) sum += reduce_add(x);
  asm volatile("" ::"r"(sum));
  return double(iterations) * kDots * 64 * 2;
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

double bf16_ops(int64_t iterations) {
  vfloat acc[kChains];
  vint a = isplat(0x3f803f80), b = isplat(0x3c003c00);  // pairs of 1 and of 1/128
  asm volatile("" : "+m"(a), "+m"(b));
  for (auto& x : acc) x = splat(1.0f);
  for (int64_t i = 0; i < iterations; ++i) {
    for (auto& x : acc) x = dot_bf16(x, a, b);
  }
  float sum = 0;
  for (auto& x : acc) sum += reduce_add(x);
  asm volatile("" ::"g"(sum));
  return double(iterations) * kChains * 32 * 2;
}

}  // namespace

// Operations done, a multiply-add being two.
double peak_ops(PeakFormat format, int64_t iterations) {
  switch (format) {
    case PeakFormat::int8: return int8_ops(iterations);
    case PeakFormat::int8_unpacked: return int8_unpacked_ops(iterations);
    case PeakFormat::bf16: return bf16_ops(iterations);
    default: return fp32_ops(iterations);
  }
}

// How many times as many operations a second one format reaches as another: of each the best of some tries that
// take microseconds, beyond the reach of most noise.
double peak_ratio(PeakFormat above, PeakFormat below) {
  using Clock = std::chrono::steady_clock;
  constexpr int kTries = 8;
  constexpr int64_t kIterations = 1000;
  double best[2] = {0, 0};
  for (int i = 0; i < 2 * kTries; ++i) {
    const auto began = Clock::now();
    const double ops = peak_ops(i % 2 ? below : above, kIterations);
    const double rate = ops / std::chrono::duration<double>(Clock::now() - began).count();
    if (rate > best[i % 2]) best[i % 2] = rate;
  }
  return best[0] / best[1];
}

// Loads whole lines, `bytes` being a multiple of kReadStep; the sum keeps the loads from being optimised away.
int32_t read_lines(const uint8_t* data, size_t bytes) {
  constexpr int kLoads = int(kReadStep / 64);
  vint sums[kLoads];
  for (auto& sum : sums) sum = izero();
  for (size_t at = 0; at < bytes; at += kReadStep) {
    for (int i = 0; i < kLoads; ++i) sums[i] = add(sums[i], iload(data + at + size_t(i) * 64));
  }
  int32_t sum = 0;
  for (auto& one : sums) sum += reduce_add(one);
  return sum;
}

RIDGELINE_END
