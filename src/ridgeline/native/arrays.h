// NumPy arrays as the bindings take them: checked, borrowed through the buffer protocol, and kept alive.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace ridgeline {

namespace nb = nanobind;

[[noreturn]] inline void refuse(const std::string& name, const std::string& seen,
                                const std::string& accepted) {
  throw std::invalid_argument(name + " is " + seen + "; accepted: " + accepted);
}

enum class Access { read, write };

template <class T>
struct ItemFormat;
template <>
struct ItemFormat<float> {
  static constexpr const char *codes = "f", *name = "float32";
};
template <>
struct ItemFormat<int32_t> {
  static constexpr const char *codes = "il", *name = "int32";
};
template <>
struct ItemFormat<int64_t> {
  static constexpr const char *codes = "lq", *name = "int64";
};
template <>
struct ItemFormat<uint8_t> {
  static constexpr const char *codes = "B", *name = "uint8";
};
template <>
struct ItemFormat<uint16_t> {
  static constexpr const char *codes = "H", *name = "uint16";
};
template <>
struct ItemFormat<uint64_t> {
  static constexpr const char *codes = "LQ", *name = "uint64";
};

// A C-contiguous array of T. Holds a reference; create and destroy with the GIL held.
template <class T>
class Array {
 public:
  Array() = default;
  // Throws std::invalid_argument naming the argument.
  Array(nb::handle object, const char* name, int dimensions, Access access = Access::read) {
    const std::string accepted = std::string("a C-contiguous ") + ItemFormat<T>::name + " array of " +
                                 std::to_string(dimensions) +
                                 (dimensions == 1 ? " dimension" : " dimensions");
    if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
      PyErr_Clear();
      buffer_.obj = nullptr;
      refuse(name, std::string("a ") + Py_TYPE(object.ptr())->tp_name, accepted);
    }
    held_ = true;
    if (!is_item_type())
      fail(name, "of item type '" + std::string(buffer_.format ? buffer_.format : "B") + "'", accepted);
    if (buffer_.ndim != dimensions)
      fail(name, "of " + std::to_string(buffer_.ndim) + " dimensions", accepted);
    if (!PyBuffer_IsContiguous(&buffer_, 'C')) fail(name, "not C-contiguous", accepted);
    if (access == Access::write && buffer_.readonly) fail(name, "read-only", accepted + ", writable");
  }
  ~Array() { release(); }
  Array(Array&& other) noexcept { *this = std::move(other); }
  Array& operator=(Array&& other) noexcept {
    release();
    buffer_ = other.buffer_;
    held_ = std::exchange(other.held_, false);
    return *this;
  }

  // Whether `object` is an array of this item type, of whatever shape.
  static bool holds(nb::handle object) {
    Array probe;
    if (PyObject_GetBuffer(object.ptr(), &probe.buffer_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
      PyErr_Clear();
      return false;
    }
    probe.held_ = true;
    return probe.is_item_type();
  }

  explicit operator bool() const { return held_; }
  T* data() const { return held_ ? static_cast<T*>(buffer_.buf) : nullptr; }
  int64_t size(int dimension) const { return buffer_.shape[dimension]; }
  nb::handle object() const { return buffer_.obj; }

  // Refuses an array whose dimension is not `expected`.
  void expect(int dimension, int64_t expected, const char* name) const {
    if (size(dimension) == expected) return;
    refuse(std::string(name) + ".shape[" + std::to_string(dimension) + "]", std::to_string(size(dimension)),
           std::to_string(expected));
  }
  void expect_at_least(int dimension, int64_t least, const char* name) const {
    if (size(dimension) >= least) return;
    refuse(std::string(name) + ".shape[" + std::to_string(dimension) + "]", std::to_string(size(dimension)),
           "at least " + std::to_string(least));
  }
  void expect_aligned(size_t bytes, const char* name) const {
    if (reinterpret_cast<uintptr_t>(buffer_.buf) % bytes == 0) return;
    refuse(name, "not aligned", "memory aligned to " + std::to_string(bytes) + " bytes");
  }

 private:
  bool is_item_type() const {
    if (buffer_.itemsize != Py_ssize_t(sizeof(T))) return false;
    const char* format = buffer_.format == nullptr ? "B" : buffer_.format;
    if (*format == '@' || *format == '=' || *format == '<') ++format;
    return *format != '\0' && format[1] == '\0' &&
           std::string(ItemFormat<T>::codes).find(*format) != std::string::npos;
  }
  [[noreturn]] void fail(const char* name, const std::string& seen, const std::string& accepted) {
    release();
    refuse(name, seen, accepted);
  }
  void release() {
    if (std::exchange(held_, false)) PyBuffer_Release(&buffer_);
  }

  Py_buffer buffer_{};
  bool held_ = false;
};

// An optional array argument: empty for None.
template <class T>
Array<T> optional_array(nb::handle object, const char* name, int dimensions, Access access = Access::read) {
  return object.is_none() ? Array<T>() : Array<T>(object, name, dimensions, access);
}

}  // namespace ridgeline
