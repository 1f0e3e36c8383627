// The bindings for weights a block at a time: packed from the rows of a file, or read back as they were packed.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <memory>

#include "bind.h"
#include "blocks.h"
#include "pack.h"

namespace ridgeline {
namespace {

using namespace nb::literals;
using Sums = nb::ndarray<nb::numpy, uint64_t>;

bool pack_rows(nb::object data, const std::string& storage, int64_t cols, Team& team, nb::object out) {
  const Array<uint8_t> source(data, "data", 2);
  const MatrixShape shape(storage, source.size(0), cols);
  source.expect(1, int64_t(file_row_bytes(shape.storage, shape.cols)), "data");
  const Array<uint8_t> packed(out, "out", 1, Access::write);
  packed.expect(0, int64_t(shape.packed_bytes), "out");
  nb::gil_scoped_release release;
  return pack_matrix(source.data(), shape.storage, shape.rows, shape.cols, packed.data(), team);
}

Sums block_sums(nb::object data, Team& team) {
  const Array<uint8_t> bytes(data, "data", 1);
  const size_t count = size_t(block_count(size_t(bytes.size(0))));
  auto sums = std::make_unique<uint64_t[]>(count);
  {
    nb::gil_scoped_release release;
    sum_blocks(bytes.data(), size_t(bytes.size(0)), sums.get(), team);
  }
  uint64_t* values = sums.get();
  nb::capsule owner(sums.release(), [](void* p) noexcept { delete[] static_cast<uint64_t*>(p); });
  return Sums(values, {count}, owner);
}

bool read_packed(int64_t descriptor, int64_t offset, nb::object out, nb::object sums, Team& team) {
  if (descriptor < 0 || descriptor > INT32_MAX)
    refuse("descriptor", std::to_string(descriptor), "that of an open file");
  if (offset < 0) refuse("offset", std::to_string(offset), "0 or more");
  const Array<uint8_t> bytes(out, "out", 1, Access::write);
  const Array<uint64_t> expected(sums, "sums", 1);
  expected.expect(0, block_count(size_t(bytes.size(0))), "sums");
  nb::gil_scoped_release release;
  return read_blocks(int(descriptor), offset, bytes.data(), size_t(bytes.size(0)), expected.data(), team);
}

}  // namespace

void bind_blocks(nb::module_& m) {
  m.attr("BLOCK_BYTES") = kBlockBytes;
  m.def("pack_rows", &pack_rows, "data"_a, "storage"_a, "cols"_a, "team"_a, "out"_a);
  m.def("block_sums", &block_sums, "data"_a, "team"_a);
  m.def("read_packed", &read_packed, "descriptor"_a, "offset"_a, "out"_a, "sums"_a, "team"_a);
}

}  // namespace ridgeline
