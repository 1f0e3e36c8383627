// Python's Drawer: what is asked of each row is read and checked here, in Python's own records.
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <vector>

#include "arrays.h"
#include "bind.h"
#include "memory.h"

namespace ridgeline {
namespace {

using namespace nb::literals;

using Tokens = nb::ndarray<nb::numpy, int32_t>;

constexpr int64_t kLargestVocabulary = 1 << 30;

// What the rows of a call borrow.
struct Borrowed {
  std::vector<LogitEdit> edits;
  std::vector<Array<int64_t>> ids;
  std::vector<Array<float>> amounts;
  std::vector<Array<int32_t>> masks;
};

uint64_t whole(nb::handle draw, const char* name) {
  uint64_t value = 0;
  const nb::object given = draw.attr(name);
  if (!nb::try_cast(given, value)) refuse(name, nb::cast<std::string>(nb::str(given)), "0 to 2^64 - 1");
  return value;
}

void read_draw(nb::handle draw, RowDraw& row) {
  row.wanted = true;
  row.temperature = float(nb::cast<double>(draw.attr("temperature")));
  row.top_k = nb::cast<int64_t>(draw.attr("top_k"));
  row.top_p = nb::cast<double>(draw.attr("top_p"));
  const double min_p = nb::cast<double>(draw.attr("min_p"));
  row.log_min_p = min_p > 0 ? float(std::log(min_p)) : -INFINITY;
  row.seed = whole(draw, "seed");
  row.choice = whole(draw, "choice");
  row.position = whole(draw, "position");
}

void read_edit(nb::handle edit, int64_t vocabulary, Borrowed& borrowed) {
  Array<int64_t> ids(edit.attr("ids"), "ids", 1);
  LogitEdit read{EditKind::ban, ids.data(), ids.size(0), nullptr, 1.0f};
  for (int64_t i = 0; i < read.count; ++i) {
    if (read.ids[i] < 0 || read.ids[i] >= vocabulary)
      refuse("ids", std::to_string(read.ids[i]), "0 to " + std::to_string(vocabulary - 1));
  }
  const nb::object amounts = edit.attr("amounts"), factor = edit.attr("factor");
  if (!amounts.is_none()) {
    Array<float> array(amounts, "amounts", 1);
    array.expect(0, read.count, "amounts");
    read.kind = EditKind::add;
    read.amounts = array.data();
    borrowed.amounts.push_back(std::move(array));
  } else if (!factor.is_none()) {
    read.kind = EditKind::scale;
    read.factor = float(nb::cast<double>(factor));
  }
  borrowed.ids.push_back(std::move(ids));
  borrowed.edits.push_back(read);
}

void read_adjustment(nb::handle adjustment, int64_t vocabulary, RowDraw& row, Borrowed& borrowed) {
  const nb::object mask = adjustment.attr("mask");
  if (!mask.is_none()) {
    Array<int32_t> words(mask, "mask", 1);
    words.expect_at_least(0, (vocabulary + 31) / 32, "mask");
    row.mask = words.data();
    borrowed.masks.push_back(std::move(words));
  }
  const size_t first = borrowed.edits.size();
  for (const nb::handle edit : nb::borrow<nb::sequence>(adjustment.attr("edits"))) {
    read_edit(edit, vocabulary, borrowed);
    row.edited += borrowed.edits.back().count;
  }
  row.edit_count = int64_t(borrowed.edits.size() - first);
}

// Draws with a team's threads; keeps their scratch.
class Drawer {
 public:
  Drawer(std::shared_ptr<Team> team, const std::string& isa) : team_(std::move(team)), kernels_(kernels_named(isa)) {}

  Tokens rows(nb::object logits, nb::sequence draws, nb::sequence adjustments) {
    const size_t adjusted = nb::len(adjustments);
    const Array<float> values(logits, "logits", 2, adjusted > 0 ? Access::write : Access::read);
    const int64_t vocabulary = values.size(1);
    if (vocabulary < 1 || vocabulary > kLargestVocabulary)
      refuse("logits.shape[1]", std::to_string(vocabulary), "1 to " + std::to_string(kLargestVocabulary));
    std::vector<RowDraw> wanted(size_t(values.size(0)));
    if (nb::len(draws) > 0) expect_length("draws", nb::len(draws), wanted.size());
    if (adjusted > 0) expect_length("adjustments", adjusted, wanted.size());
    Borrowed borrowed;
    size_t at = 0;
    for (const nb::handle draw : draws) {
      if (!draw.is_none()) read_draw(draw, wanted[at]);
      ++at;
    }
    at = 0;
    for (const nb::handle adjustment : adjustments) {
      RowDraw& row = wanted[at++];
      if (row.wanted && !adjustment.is_none()) read_adjustment(adjustment, vocabulary, row, borrowed);
    }
    return run(values, wanted, borrowed);
  }

 private:
  static void expect_length(const char* name, size_t seen, size_t expected) {
    if (seen == expected) return;
    refuse(std::string("the length of ") + name, std::to_string(seen), std::to_string(expected) + ", one for each row");
  }

  Tokens run(const Array<float>& logits, std::vector<RowDraw>& draws, const Borrowed& borrowed) {
    int64_t edited = 0;
    size_t at = 0;
    for (RowDraw& draw : draws) {
      draw.edits = borrowed.edits.data() + at;
      at += size_t(draw.edit_count);
      edited = std::max(edited, draw.edited);
    }
    const int32_t vocabulary = int32_t(logits.size(1));
    auto tokens = std::make_unique<std::vector<int32_t>>(draws.size());
    {
      nb::gil_scoped_release release;
      std::lock_guard lock(running_);
      make_room(draw_scratch_bytes(vocabulary, edited));
      team_->run(1, [&](int index) {
        const FloatState state(false);
        Worker worker{team_.get(), index, 0, scratch_[size_t(index)].data()};
        kernels_.draw_rows(logits.data(), int64_t(draws.size()), vocabulary, draws.data(), tokens->data(), worker);
      });
    }
    const size_t count = tokens->size();
    int32_t* data = tokens->data();
    nb::capsule owner(tokens.release(), [](void* p) noexcept { delete static_cast<std::vector<int32_t>*>(p); });
    return Tokens(data, {count}, owner);
  }

  void make_room(size_t bytes) {
    if (scratch_bytes_ >= bytes) return;
    scratch_.clear();
    for (int i = 0; i < team_->threads(); ++i) scratch_.emplace_back(bytes, false);
    scratch_bytes_ = bytes;
  }

  const std::shared_ptr<Team> team_;
  const Kernels& kernels_;
  std::mutex running_;  // guards the scratch
  std::vector<Memory> scratch_;
  size_t scratch_bytes_ = 0;
};

}  // namespace

void bind_draw(nb::module_& m) {
  nb::class_<Drawer>(m, "Drawer")
      .def(nb::init<std::shared_ptr<Team>, const std::string&>(), "team"_a, "isa"_a)
      .def("rows", &Drawer::rows, "logits"_a, "draws"_a, "adjustments"_a = nb::tuple());
}

}  // namespace ridgeline
