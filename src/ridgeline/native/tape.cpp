#include "tape.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <type_traits>

namespace ridgeline {
namespace {

template <class... F>
struct Overloaded : F... {
  using F::operator()...;
};
template <class... F>
Overloaded(F...) -> Overloaded<F...>;  // some compilers do not deduce it themselves

// What workers leave for each other in a launch, but for large routers; taken from the system only where it
// is used.
constexpr size_t kPartialBytes = size_t(16) << 20;
// Routing is three phases, attention by splits two, every other launch one at most.
constexpr int kPhasesPerLaunch = 3;

// Finds the rows that do not lie where they stand. They come last: where the ancestors of one are not all the rows
// before it, neither are those of the rows after it.
void find_branches(const StepView& step, RowBlock& block) {
  block.in_place = block.row_count;
  block.fork = INT32_MAX;
  if (step.parents == nullptr) return;
  const int64_t first = step.segment_first_position[step.segment_begin[block.sequence + 1] - 1];
  for (int32_t i = block.row_count - 1; i >= 0; --i) {
    const int32_t row = block.row_begin + i;
    if (step.positions[row] - first == step.slots[row]) return;
    block.in_place = i;
    block.fork = std::min(block.fork, path_fork(step, row, first));
  }
}

// Cuts runs of rows into blocks, none of which has rows of two sequences.
void cut_blocks(const StepView& step, const std::vector<RowRun>& runs, std::vector<RowBlock>& blocks) {
  blocks.clear();
  for (const RowRun& run : runs) {
    const int32_t run_end = run.begin + run.count;
    for (int32_t begin = run.begin, end = begin; begin < run_end; begin = end) {
      const int32_t s = step.row_sequence[begin];
      end = std::min(run_end, step.sequence_row_begin[s + 1]);
      const int32_t count = (end - begin + kBlockRows - 1) / kBlockRows;
      const int32_t size = (end - begin + count - 1) / count;  // no small block at the end
      for (int32_t row = begin; row < end; row += size) {
        blocks.push_back({s, row, std::min(size, end - row), 0, 0});
        find_branches(step, blocks.back());
      }
    }
  }
}

bool computes_chosen_rows(const AnyLaunch& launch) {
  return std::visit(
      [](const auto& l) {
        using L = std::decay_t<decltype(l)>;
        return std::is_same_v<L, NormLaunch> || std::is_same_v<L, QuantiseLaunch> ||
               std::is_same_v<L, AddLaunch> || std::is_same_v<L, ActivateLaunch> ||
               std::is_same_v<L, LinearLaunch> || std::is_same_v<L, AttentionLaunch>;
      },
      launch);
}

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Tape::Tape(std::shared_ptr<Team> team, const Kernels& kernels, int32_t max_rows)
    : team_(std::move(team)), kernels_(kernels), partial_bytes_(kPartialBytes) {
  needs_.max_rows = max_rows;
}

void Tape::collect(const AnyLaunch& launch) {
  const auto use = [&](GroupUse g) {
    if (std::find(needs_.groups.begin(), needs_.groups.end(), g) == needs_.groups.end())
      needs_.groups.push_back(g);
  };
  std::visit(
      Overloaded{
          [&](const EmbedLaunch& l) {
            int32_t& limit = l.by_position ? needs_.position_ids : needs_.token_ids;
            limit = std::min(limit, l.matrix.rows);
          },
          [&](const LinearLaunch& l) {
            scratch_bytes_ = std::max(scratch_bytes_, kernels_.linear_scratch_bytes(l));
            for (const LinearPart& part : l.parts) {
              if (part.out.is_logits()) needs_.logits_width = std::max(needs_.logits_width, part.matrix.rows);
            }
          },
          [&](const RouteLaunch& l) {
            partial_bytes_ = std::max(partial_bytes_, kernels_.route_partial_bytes(l));
          },
          [&](const ExpertLaunch& l) {
            scratch_bytes_ = std::max(scratch_bytes_, kernels_.expert_scratch_bytes(l));
          },
          [&](const SoftcapLaunch& l) { needs_.logits_width = std::max(needs_.logits_width, l.width); },
          [&](const RopeStoreLaunch& l) { use({l.group, 0, l.pool.pages, true}); },
          [&](const AttentionLaunch& l) {
            use({l.group, l.window, l.pool.pages, false});
            scratch_bytes_ = std::max(scratch_bytes_, kernels_.attention_scratch_bytes(l));
          },
          [](const auto&) {},
      },
      launch);
}

void Tape::append(std::string name, AnyLaunch launch) {
  std::lock_guard lock(running_);
  if (only_outputs_ && !computes_chosen_rows(launch))
    throw std::invalid_argument("only_outputs is on before " + name + "; accepted: off");
  collect(launch);
  launches_.push_back({std::move(launch), only_outputs_});
  any_only_outputs_ = any_only_outputs_ || only_outputs_;
  names_.push_back(std::move(name));
  scratch_.clear();
}

void Tape::launch(const AnyLaunch& launch, const StepView& step, Worker& worker) const {
  std::visit(Overloaded{
                 [&](const EmbedLaunch& l) { kernels_.embed(l, step, worker); },
                 [&](const NormLaunch& l) { kernels_.norm(l, step, worker); },
                 [&](const QuantiseLaunch& l) { kernels_.quantise(l, step, worker); },
                 [&](const AddLaunch& l) { kernels_.add(l, step, worker); },
                 [&](const ActivateLaunch& l) { kernels_.activate(l, step, worker); },
                 [&](const LinearLaunch& l) { kernels_.linear(l, step, worker); },
                 [&](const RouteLaunch& l) { kernels_.route(l, step, worker); },
                 [&](const ExpertLaunch& l) { kernels_.experts(l, step, worker); },
                 [&](const CombineLaunch& l) { kernels_.combine(l, step, worker); },
                 [&](const SoftcapLaunch& l) { kernels_.softcap(l, step, worker); },
                 [&](const RopeStoreLaunch& l) { kernels_.rope_store(l, step, worker); },
                 [&](const AttentionLaunch& l) { kernels_.attention(l, step, worker); },
             },
             launch);
}

void Tape::ChosenRows::show(StepView& step) const {
  step.runs = runs.data();
  step.run_count = int32_t(runs.size());
  step.blocks = blocks.data();
  step.block_count = int32_t(blocks.size());
}

void Tape::choose_all(StepView& step) {
  step.chosen = nullptr;
  step.chosen_rows = step.rows;
  all_.runs.assign(1, {0, step.rows});
  cut_blocks(step, all_.runs, all_.blocks);
  all_.show(step);
}

// A row that is wanted twice is computed once.
void Tape::choose_outputs(StepView& step) {
  std::vector<int32_t>& rows = wanted_.rows;
  rows.assign(step.output_rows, step.output_rows + step.outputs);
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
  if (int32_t(rows.size()) == step.rows) return;
  wanted_.runs.clear();
  for (const int32_t row : rows) {
    if (wanted_.runs.empty() || wanted_.runs.back().begin + wanted_.runs.back().count != row)
      wanted_.runs.push_back({row, 0});
    ++wanted_.runs.back().count;
  }
  cut_blocks(step, wanted_.runs, wanted_.blocks);
  step.chosen = rows.data();
  step.chosen_rows = int32_t(rows.size());
  wanted_.show(step);
}

void Tape::run(StepView step, int64_t logits_rows, std::vector<double>* seconds) {
  std::lock_guard lock(running_);
  check_step(step, logits_rows, needs_);
  while (scratch_.size() < size_t(team_->threads())) scratch_.emplace_back(scratch_bytes_);
  choose_all(step);
  if (partials_.bytes() < partial_bytes_) partials_ = Memory(partial_bytes_, false);
  step.partials = partials_.data();
  step.partial_bytes = int64_t(partials_.bytes());
  StepView wanted = step;
  if (any_only_outputs_) choose_outputs(wanted);
  if (seconds != nullptr) seconds->reserve(launches_.size());
  team_->run(kPhasesPerLaunch * int(launches_.size()), [&](int index) {
    Worker worker{team_.get(), index, 0, scratch_[size_t(index)].data()};
    const bool timed = index == 0 && seconds != nullptr;
    double start = timed ? now_s() : 0.0;
    for (const Entry& entry : launches_) {
      launch(entry.launch, entry.only_outputs ? wanted : step, worker);
      if (!timed) continue;
      const double end = now_s();
      seconds->push_back(end - start);
      start = end;
    }
  });
}

}  // namespace ridgeline
