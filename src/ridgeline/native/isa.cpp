// Which ISA levels were built, and which of them this machine runs.
#include <cstring>

#include "launch.h"

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

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> levels;
#if defined(RIDGELINE_WITH_AVX512_VNNI)
  // These ask for the operating system's support as well.
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
#if defined(RIDGELINE_WITH_AVX512_BF16)
  if (runs && __builtin_cpu_supports("avx512bf16")) levels.push_back(&avx512_bf16::kernels);
#endif
  if (runs) levels.push_back(&avx512_vnni::kernels);
#endif
  levels.push_back(&portable::kernels);
  return levels;
}

const Kernels* find_kernels(const char* name) {
  for (const Kernels* kernels : available_kernels()) {
    if (std::strcmp(kernels->name, name) == 0) return kernels;
  }
  return nullptr;
}

}  // namespace ridgeline
