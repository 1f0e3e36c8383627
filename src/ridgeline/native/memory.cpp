#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "layout.h"

namespace ridgeline {
namespace {
constexpr size_t kHugePageBytes = size_t(2) << 20;
}

Memory::Memory(size_t bytes, bool huge_pages) : bytes_(bytes) {
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  if (bytes >= kHugePageBytes) {
    mapped_bytes_ = round_up(bytes, kHugePageBytes) + kHugePageBytes;
    base_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    data_ = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(base_), kHugePageBytes));
#if defined(MADV_HUGEPAGE)
    if (huge_pages) madvise(data_, round_up(bytes, kHugePageBytes), MADV_HUGEPAGE);
#else
    (void)huge_pages;
#endif
    return;
  }
  const size_t size = round_up(bytes > 0 ? bytes : 1, kLineBytes);
  base_ = std::aligned_alloc(kLineBytes, size);
  if (base_ == nullptr) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(base_);
  std::memset(data_, 0, size);
}

Memory::~Memory() {
  if (mapped_bytes_ > 0) {
    munmap(base_, mapped_bytes_);
  } else {
    std::free(base_);
  }
}

Memory::Memory(Memory&& other) noexcept { *this = std::move(other); }

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(mapped_bytes_, other.mapped_bytes_);
  std::swap(base_, other.base_);
  return *this;
}

}  // namespace ridgeline
