// A tape of kernel launches and the run of one step over it.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "launch.h"
#include "memory.h"
#include "team.h"

namespace ridgeline {

using AnyLaunch = std::variant<EmbedLaunch, NormLaunch, QuantiseLaunch, AddLaunch, ActivateLaunch,
                               LinearLaunch, RouteLaunch, ExpertLaunch, CombineLaunch, SoftcapLaunch,
                               RopeStoreLaunch, AttentionLaunch>;

// How launches use the page tables of a group.
struct GroupUse {
  int32_t group, window;
  int64_t pool_pages;
  bool writes;
  bool operator==(const GroupUse&) const = default;
};

// What a step must satisfy, collected from the launches.
struct StepNeeds {
  int32_t max_rows = 0;
  int32_t token_ids = INT32_MAX;     // token ids are below this
  int32_t position_ids = INT32_MAX;  // positions are below this
  int32_t logits_width = 0;
  std::vector<GroupUse> groups;
};

// Throws std::invalid_argument with one line. Afterwards no index of the step leads a kernel out of its
// arrays.
void check_step(const StepView& step, int64_t logits_rows, const StepNeeds& needs);

class Tape {
 public:
  Tape(std::shared_ptr<Team> team, const Kernels& kernels, int32_t max_rows);

  const Kernels& kernels() const { return kernels_; }
  int32_t max_rows() const { return needs_.max_rows; }
  const std::vector<std::string>& names() const { return names_; }

  // Whether launches that are appended from now on compute only the rows that have outputs, each where it lies.
  void only_outputs(bool only) { only_outputs_ = only; }
  // Throws std::invalid_argument if a launch of this kind cannot be for some rows only.
  void append(std::string name, AnyLaunch launch);
  // Checks the step and runs it on the team; with `seconds`, also times each launch.
  void run(StepView step, int64_t logits_rows, std::vector<double>* seconds);

 private:
  void collect(const AnyLaunch& launch);
  void launch(const AnyLaunch& launch, const StepView& step, Worker& worker) const;

  std::shared_ptr<Team> team_;
  const Kernels& kernels_;
  StepNeeds needs_;
  struct Entry {
    AnyLaunch launch;
    bool only_outputs;
  };
  // The rows of a StepView that are chosen.
  struct ChosenRows {
    std::vector<int32_t> rows;
    std::vector<RowRun> runs;
    std::vector<RowBlock> blocks;

    void show(StepView& step) const;
  };
  void choose_all(StepView& step);
  void choose_outputs(StepView& step);

  std::vector<Entry> launches_;
  std::vector<std::string> names_;
  bool only_outputs_ = false, any_only_outputs_ = false;
  ChosenRows all_, wanted_;
  size_t scratch_bytes_ = 0, partial_bytes_;
  std::vector<Memory> scratch_;  // one per worker
  Memory partials_;
  std::mutex running_;  // guards all_, wanted_ and scratch_
};

}  // namespace ridgeline
