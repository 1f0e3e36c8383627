// Zeroed, aligned memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ridgeline {

class Memory {
 public:
  Memory() = default;
  // Throws std::bad_alloc. Large blocks take memory only when they are touched; with `huge_pages` they are
  // aligned to 2 MiB and ask the system for pages of that size, which it then takes at once.
  explicit Memory(size_t bytes, bool huge_pages = true);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0, mapped_bytes_ = 0;  // mapped_bytes_ is 0 for memory of the C library
  void* base_ = nullptr;
};

}  // namespace ridgeline
