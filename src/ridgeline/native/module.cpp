// The extension `ridgeline.native._native`: bindings only. Its stub, `_native.pyi`, documents it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "bind.h"
#include "memory.h"
#include "pack.h"
#include "probe.h"
#include "tape.h"

namespace ridgeline {

const Kernels& kernels_named(const std::string& isa) {
  if (const Kernels* kernels = find_kernels(isa.c_str())) return *kernels;
  std::string known;
  for (const Kernels* level : available_kernels())
    known += (known.empty() ? "" : ", ") + std::string(level->name);
  refuse("isa", "'" + isa + "'", known);
}

namespace {

using namespace nb::literals;
using Bytes = nb::ndarray<nb::numpy, uint8_t>;
using Floats = nb::ndarray<nb::numpy, float>;

constexpr int64_t kLargestWidth = 1 << 30;

// A NumPy array over memory that it owns.
template <class T>
nb::ndarray<nb::numpy, T> numpy_array(std::initializer_list<size_t> shape, bool huge_pages = true) {
  size_t bytes = sizeof(T);
  for (const size_t n : shape) bytes *= n;
  auto memory = std::make_unique<Memory>(bytes, huge_pages);
  T* data = reinterpret_cast<T*>(memory->data());
  nb::capsule owner(memory.release(), [](void* p) noexcept { delete static_cast<Memory*>(p); });
  return nb::ndarray<nb::numpy, T>(data, shape, owner);
}

// Memory for packed weights, cut from slabs of huge pages, because most matrices are smaller than one. A slab
// lives as long as an array on it. Called with the GIL held.
Bytes weight_array(size_t bytes) {
  constexpr size_t kSlabBytes = size_t(32) << 20;
  static std::weak_ptr<Memory> current;
  static size_t used;
  std::shared_ptr<Memory> slab = current.lock();
  if (slab == nullptr || bytes > slab->bytes() - used) {
    slab = std::make_shared<Memory>(std::max(bytes, kSlabBytes));
    current = slab;
    used = 0;
  }
  uint8_t* data = slab->data() + used;
  used = std::min(slab->bytes(), used + round_up(bytes, kLineBytes));
  nb::capsule owner(new std::shared_ptr<Memory>(std::move(slab)),
                    [](void* p) noexcept { delete static_cast<std::shared_ptr<Memory>*>(p); });
  return Bytes(data, {bytes}, owner);
}

int checked_width(int64_t width) {
  if (width < 1 || width > kLargestWidth) {
    refuse("width", std::to_string(width), "1 to " + std::to_string(kLargestWidth));
  }
  return int(width);
}

nb::object pack(nb::object data, const std::string& storage, int64_t cols, Team& team, nb::object out,
                int64_t experts) {
  const Array<uint8_t> source(data, "data", 2);
  if (experts < 1 || source.size(0) % experts != 0)
    refuse("experts", std::to_string(experts), "what divides data's rows, " + std::to_string(source.size(0)));
  const MatrixShape shape(storage, source.size(0) / experts, cols, experts);
  source.expect(1, int64_t(file_row_bytes(shape.storage, shape.cols)), "data");
  nb::object target = out.is_none() ? nb::cast(weight_array(shape.packed_bytes)) : out;
  const Array<uint8_t> packed(target, "out", 1, Access::write);
  packed.expect(0, int64_t(shape.packed_bytes), "out");
  packed.expect_aligned(kLineBytes, "out");
  nb::gil_scoped_release release;
  const size_t source_bytes = size_t(shape.rows) * file_row_bytes(shape.storage, shape.cols);
  for (size_t e = 0; e < size_t(experts); ++e) {
    pack_matrix(source.data() + e * source_bytes, shape.storage, shape.rows, shape.cols,
                packed.data() + e * (shape.packed_bytes / size_t(experts)), team);
  }
  return target;
}

Floats unpack_row(const Matrix& matrix, int64_t row) {
  const int64_t rows = matrix.shape().rows, all = rows * matrix.shape().experts;
  if (row < 0 || row >= all) refuse("row", std::to_string(row), "0 to " + std::to_string(all - 1));
  Floats values = numpy_array<float>({size_t(matrix.shape().cols)});
  MatrixView view = matrix.view();
  view.data += size_t(row / rows) * view.bytes();
  available_kernels().back()->unpack_row(view, row % rows, values.data());
  return values;
}

Bytes quantise(nb::object x, const std::string& isa) {
  const Array<float> values(x, "x", 2);
  const int width = checked_width(values.size(1));
  Bytes out = numpy_array<uint8_t>({size_t(values.size(0)), a8_layout(width).row_bytes});
  const FloatState state;
  kernels_named(isa).quantise_rows(values.data(), values.size(0), width, out.data());
  return out;
}

Floats dequantise_a8(nb::object a8, int64_t width) {
  const Array<uint8_t> rows(a8, "a8", 2);
  const A8Layout layout = a8_layout(checked_width(width));
  rows.expect(1, int64_t(layout.row_bytes), "a8");
  Floats out = numpy_array<float>({size_t(rows.size(0)), size_t(width)});
  for (int64_t r = 0; r < rows.size(0); ++r) {
    const uint8_t* row = rows.data() + size_t(r) * layout.row_bytes;
    for (int64_t c = 0; c < width; ++c) {
      float scale;
      std::memcpy(&scale, row + layout.scales + size_t(c / kGroup) * 4, 4);
      out.data()[r * width + c] = float(int8_t(row[c])) * scale;
    }
  }
  return out;
}

template <class T>
void copy_page_of(nb::object pool, int64_t source, int64_t target) {
  const Array<T> pages(pool, "pool", 3, Access::write);
  for (const auto& [name, page] : {std::pair{"source", source}, std::pair{"target", target}}) {
    if (page < 0 || page >= pages.size(0)) {
      refuse(name, std::to_string(page), "0 to " + std::to_string(pages.size(0) - 1));
    }
  }
  const int64_t values = pages.size(1) * pages.size(2);
  std::memmove(pages.data() + target * values, pages.data() + source * values, size_t(values) * sizeof(T));
}

void copy_page(nb::object pool, int64_t source, int64_t target) {
  if (Array<float>::holds(pool)) return copy_page_of<float>(pool, source, target);
  if (Array<uint8_t>::holds(pool)) return copy_page_of<uint8_t>(pool, source, target);
  copy_page_of<uint16_t>(pool, source, target);
}

template <class T>
void copy_slots_of(KvFormat format, nb::object pool, int64_t head_dim, nb::object sources, nb::object targets) {
  const Array<T> pages(pool, "pool", 3, Access::write);
  if (head_dim < 2 || head_dim > kMaxHeadDim || head_dim % 2 != 0)
    refuse("head_dim", std::to_string(head_dim), "an even number, 2 to " + std::to_string(kMaxHeadDim));
  const size_t bytes = page_bytes(format, int(head_dim));
  pages.expect(2, int64_t(bytes / sizeof(T)), "pool");
  const Array<int32_t> from(sources, "sources", 1), to(targets, "targets", 1);
  to.expect(0, from.size(0), "targets");
  for (int64_t i = 0; i < from.size(0); ++i) {
    for (const auto& [name, slot] : {std::pair{"sources", from.data()[i]}, std::pair{"targets", to.data()[i]}}) {
      const int64_t slots = pages.size(0) * kPageTokens;
      if (slot < 0 || slot >= slots) refuse(name, std::to_string(slot), "0 to " + std::to_string(slots - 1));
    }
  }
  // All are read before any is written.
  std::vector<uint8_t> held((size_t(from.size(0)) + kPageTokens - 1) / kPageTokens * bytes);
  const KvPool all{pages.data(), pages.size(0), format};
  const int kv_heads = int(pages.size(1));
  for (int head = 0; head < kv_heads; ++head) {
    const auto page = [&](int32_t slot) {
      return all.head(slot / kPageTokens, kv_heads, head, int(head_dim));
    };
    for (int32_t i = 0; i < from.size(0); ++i)
      copy_slot(format, int(head_dim), page(from.data()[i]), from.data()[i] % kPageTokens,
                held.data() + size_t(i / kPageTokens) * bytes, i % kPageTokens);
    for (int32_t i = 0; i < from.size(0); ++i)
      copy_slot(format, int(head_dim), held.data() + size_t(i / kPageTokens) * bytes, i % kPageTokens,
                page(to.data()[i]), to.data()[i] % kPageTokens);
  }
}

void copy_slots(nb::object pool, int64_t head_dim, nb::object sources, nb::object targets) {
  if (Array<float>::holds(pool))
    return copy_slots_of<float>(KvFormat::f32, pool, head_dim, sources, targets);
  if (Array<uint8_t>::holds(pool))
    return copy_slots_of<uint8_t>(KvFormat::int8, pool, head_dim, sources, targets);
  copy_slots_of<uint16_t>(KvFormat::bf16, pool, head_dim, sources, targets);
}

void check_seconds(const char* name, double seconds) {
  if (!(seconds >= 0.0 && seconds <= 60.0)) refuse(name, std::to_string(seconds), "0 to 60");
}

std::vector<std::pair<std::string, std::vector<double>>> probe_read(Team& team, int64_t bytes,
                                                                    double seconds) {
  constexpr int64_t kLeast = 1 << 20;
  if (bytes < kLeast)
    refuse("working_set_bytes", std::to_string(bytes), "at least " + std::to_string(kLeast));
  check_seconds("seconds", seconds);
  nb::gil_scoped_release release;
  return measure_read(team, size_t(bytes), seconds);
}

std::vector<double> probe_cached_read(Team& team, const std::string& isa, int64_t worker_bytes,
                                      double seconds) {
  constexpr int64_t kMost = int64_t(1) << 40;
  if (worker_bytes < int64_t(kReadStep) || worker_bytes > kMost / team.threads()) {
    refuse("worker_bytes", std::to_string(worker_bytes),
           std::to_string(kReadStep) + " to " + std::to_string(kMost / team.threads()));
  }
  check_seconds("seconds", seconds);
  const Kernels& kernels = kernels_named(isa);
  nb::gil_scoped_release release;
  return measure_cached_read(team, kernels, size_t(worker_bytes), seconds);
}

std::vector<double> probe_peak(Team& team, const std::string& isa, const std::string& format,
                               double seconds) {
  constexpr std::pair<const char*, PeakFormat> kFormats[] = {
      {"int8", PeakFormat::int8}, {"bf16", PeakFormat::bf16}, {"fp32", PeakFormat::fp32}};
  const auto* found = std::find_if(std::begin(kFormats), std::end(kFormats),
                                   [&](const auto& known) { return format == known.first; });
  if (found == std::end(kFormats)) refuse("format", "'" + format + "'", "int8, bf16 or fp32");
  check_seconds("seconds", seconds);
  const Kernels& kernels = kernels_named(isa);
  nb::gil_scoped_release release;
  return measure_peak(team, kernels, found->second, seconds);
}

std::vector<double> probe_barrier(Team& team, double seconds) {
  check_seconds("seconds", seconds);
  nb::gil_scoped_release release;
  return measure_barrier(team, seconds);
}

std::vector<double> probe_start(Team& team, double pause_s, double seconds) {
  check_seconds("pause_s", pause_s);
  check_seconds("seconds", seconds);
  nb::gil_scoped_release release;
  return measure_start(team, pause_s, seconds);
}

std::shared_ptr<Team> make_team(int64_t threads) {
  constexpr int64_t kMost = 4096;
  if (threads < 1 || threads > kMost)
    refuse("threads", std::to_string(threads), "1 to " + std::to_string(kMost));
  return std::make_shared<Team>(int(threads));
}

}  // namespace
}  // namespace ridgeline

NB_MODULE(_native, m) {
  using namespace ridgeline;
  m.attr("PAGE_TOKENS") = kPageTokens;
  nb::class_<Team>(m, "Team")
      .def(nb::new_(&make_team), "threads"_a)
      .def_prop_ro("threads", &Team::threads)
      .def("rouse", &Team::rouse)
      .def("close", &Team::close, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<Matrix>(m, "Matrix")
      .def(nb::init<nb::object, const std::string&, int64_t, int64_t, int64_t>(), "packed"_a, "storage"_a,
           "rows"_a, "cols"_a, "experts"_a = 1)
      .def_prop_ro("rows", [](const Matrix& x) { return x.shape().rows; })
      .def_prop_ro("cols", [](const Matrix& x) { return x.shape().cols; })
      .def_prop_ro("experts", [](const Matrix& x) { return x.shape().experts; })
      .def_prop_ro("storage", &Matrix::storage_name)
      .def_prop_ro("nbytes", [](const Matrix& x) { return x.shape().packed_bytes; })
      .def("unpack_row", &unpack_row, "row"_a);
  m.def(
      "isa_levels",
      [](bool built) {
        std::vector<std::string> names;
        for (const Kernels* level : built ? built_kernels() : available_kernels())
          names.emplace_back(level->name);
        return names;
      },
      "built"_a = false);
  m.def("tile_rows", [](const std::string& isa) { return kernels_named(isa).tile_rows; }, "isa"_a);
  m.def(
      "allocate",
      [](int64_t size_bytes, bool huge_pages) {
        if (size_bytes < 0) refuse("size_bytes", std::to_string(size_bytes), "0 or more");
        return numpy_array<uint8_t>({size_t(size_bytes)}, huge_pages);
      },
      "size_bytes"_a, "huge_pages"_a = true);
  m.def(
      "packed_bytes",
      [](const std::string& storage, int64_t rows, int64_t cols) {
        return MatrixShape(storage, rows, cols).packed_bytes;
      },
      "storage"_a, "rows"_a, "cols"_a);
  m.def("pack", &pack, "data"_a, "storage"_a, "cols"_a, "team"_a, "out"_a = nb::none(),
        "experts"_a = 1);
  m.def(
      "routes_size",
      [](int64_t max_rows, int64_t width) {
        constexpr int64_t kMostRows = 1 << 30;
        if (max_rows < 1 || max_rows > kMostRows)
          refuse("max_rows", std::to_string(max_rows), "1 to " + std::to_string(kMostRows));
        return routes_layout(max_rows, checked_width(width)).ints;
      },
      "max_rows"_a, "width"_a);
  m.def("a8_row_bytes", [](int64_t width) { return a8_layout(checked_width(width)).row_bytes; }, "width"_a);
  m.def("quantise", &quantise, "x"_a, "isa"_a);
  m.def("dequantise_a8", &dequantise_a8, "a8"_a, "width"_a);
  m.def("copy_page", &copy_page, "pool"_a, "source"_a, "target"_a);
  m.def("copy_slots", &copy_slots, "pool"_a, "head_dim"_a, "sources"_a, "targets"_a);
  m.def("probe_read", &probe_read, "team"_a, "working_set_bytes"_a, "seconds"_a);
  m.def("probe_cached_read", &probe_cached_read, "team"_a, "isa"_a, "worker_bytes"_a, "seconds"_a);
  m.def("probe_peak", &probe_peak, "team"_a, "isa"_a, "format"_a, "seconds"_a);
  m.def("probe_barrier", &probe_barrier, "team"_a, "seconds"_a);
  m.def("probe_start", &probe_start, "team"_a, "pause_s"_a, "seconds"_a);
  bind_blocks(m);
  bind_draw(m);
  bind_tape(m);
}
