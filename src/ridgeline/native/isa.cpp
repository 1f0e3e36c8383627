// Which ISA levels were built, and which of them this machine runs, the fastest first.
#include <algorithm>
#include <cstring>

#include "launch.h"

#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace ridgeline {

namespace portable {
extern const Kernels kernels;
}
#if defined(RIDGELINE_WITH_AVX512_VNNI)
namespace avx512_vnni {
extern const Kernels kernels;
}
#endif

#if defined(RIDGELINE_WITH_AVX512_BF16)
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif
#if defined(RIDGELINE_WITH_AVX2)
namespace avx2 {
extern const Kernels kernels;
}
#endif
#if defined(RIDGELINE_WITH_NEON_DOT)
namespace neon_dot {
extern const Kernels kernels;
}

namespace {
bool has_dot_product() {
#if defined(__APPLE__)
  return true;  // the first of Apple's own processors for computers has it
#elif defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return false;
#endif
}
}  // namespace
#endif

namespace {

// The compiler's questions ask for the operating system's support as well.
bool runs_here([[maybe_unused]] const Kernels* level) {
#if defined(RIDGELINE_WITH_AVX512_VNNI)
  const bool vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
  if (level == &avx512_vnni::kernels) return vnni;
#if defined(RIDGELINE_WITH_AVX512_BF16)
  if (level == &avx512_bf16::kernels) return vnni && __builtin_cpu_supports("avx512bf16");
#endif
#endif
#if defined(RIDGELINE_WITH_AVX2)
  // Every processor with AVX2 has F16C, and not every compiler knows it by name here.
  if (level == &avx2::kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(RIDGELINE_WITH_NEON_DOT)
  if (level == &neon_dot::kernels) return has_dot_product();
#endif
  return true;
}

#if defined(RIDGELINE_WITH_AVX512_BF16)
// Whether a product of bfloat16 pairs does more than the float products that it stands for. Zen 4 begins as many of
// either, so that pairs do twice as much; Emerald Rapids begins a fourth as many, half as much. As results depend
// on the level, what is asked lies far from both.
bool pairs_are_fast(const Kernels& level) {
  return level.peak_ratio(PeakFormat::bf16, PeakFormat::fp32) > 1.4;
}
#endif

}  // namespace

std::vector<const Kernels*> built_kernels() {
  std::vector<const Kernels*> levels;
#if defined(RIDGELINE_WITH_AVX512_BF16)
  levels.push_back(&avx512_bf16::kernels);
#endif
#if defined(RIDGELINE_WITH_AVX512_VNNI)
  levels.push_back(&avx512_vnni::kernels);
#endif
#if defined(RIDGELINE_WITH_AVX2)
  levels.push_back(&avx2::kernels);
#endif
#if defined(RIDGELINE_WITH_NEON_DOT)
  levels.push_back(&neon_dot::kernels);
#endif
  levels.push_back(&portable::kernels);
  return levels;
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> levels = built_kernels();
  std::erase_if(levels, [](const Kernels* level) { return !runs_here(level); });
#if defined(RIDGELINE_WITH_AVX512_BF16)
  static const bool slow = runs_here(&avx512_bf16::kernels) && !pairs_are_fast(avx512_bf16::kernels);
  if (slow) std::swap(levels[0], levels[1]);  // what runs avx512_bf16 runs avx512_vnni
#endif
  return levels;
}

const Kernels* find_kernels(const char* name) {
  for (const Kernels* kernels : available_kernels()) {
    if (std::strcmp(kernels->name, name) == 0) return kernels;
  }
  return nullptr;
}

}  // namespace ridgeline
