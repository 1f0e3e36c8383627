// A persistent team of threads that walk the same phases of work. The caller is worker 0; the others sleep
// between runs.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace ridgeline {

// Rounding to nearest even, denormals flushed to zero (or kept, as NumPy has them), all exceptions masked: the
// same on every thread that computes, so that results do not depend on who computes them. Restores the thread's
// own state.
class FloatState {
 public:
  explicit FloatState(bool flush_denormals = true);
  ~FloatState();
  FloatState(const FloatState&) = delete;
  FloatState& operator=(const FloatState&) = delete;

 private:
  uint64_t saved_;
};

class Team;

// A thread's place in a run.
struct Worker {
  Team* team;
  int index;
  int phase = 0;               // calls of for_units so far; all workers make the same calls
  uint8_t* scratch = nullptr;  // the worker's own, for whoever runs the team

  // The next phase: calls f(unit) for units 0 to count - 1, each once, by whichever worker comes to it, and
  // returns when all are done. Who computes what changes from run to run and must not change any result.
  template <class F>
  void for_units(int64_t count, F&& f);
};

// A phase ends when its units are done, not when all workers have come: a thread that the system does not let
// run delays the others only if it holds a unit, and one that sleeps through a run is not waited for.
class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return threads_; }
  void close();
  // Wakes workers that sleep, for a run that will come soon: the system takes longer to wake a thread than the caller
  // to say what the run is. One that nothing comes for sleeps again.
  void rouse();

  // Calls task(argument, worker) on worker 0 and on those that come in time; at most `phases` phases. A
  // worker may be called twice. Runs are serialised. Throws std::runtime_error on a closed team or in a
  // forked child, which has no threads.
  void run(int phases, void (*task)(void*, int), void* argument);
  template <class F>
  void run(int phases, F&& f) {
    run(phases, [](void* p, int worker) { (*static_cast<std::remove_reference_t<F>*>(p))(worker); }, &f);
  }

 private:
  friend struct Worker;

  // Both kinds count units, in the low half, of the run whose number is in the high half; a word of an older
  // run counts as 0, so nothing is reset between runs. One cache line each.
  struct alignas(64) Word {
    std::atomic<uint64_t> value{0};
  };

  // The first unit of a worker's own run of units; that of `threads_` is the end.
  __attribute__((always_inline)) int64_t run_begin(int worker, int64_t count) const {
    return count * worker / threads_;
  }
  // Takes one of `limit` units; -1 if none is left.
  __attribute__((always_inline)) int64_t take(std::atomic<uint64_t>& word, int64_t limit) const {
    uint64_t seen = word.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t taken = (seen >> 32) == epoch_ ? int64_t(uint32_t(seen)) : 0;
      if (taken >= limit) return -1;
      const uint64_t next = uint64_t(epoch_) << 32 | uint64_t(taken + 1);
      if (word.compare_exchange_weak(seen, next, std::memory_order_relaxed)) return taken;
    }
  }
  void finish_phase(int phase, int64_t done_by_me, int64_t count);
  void work(int worker);
  bool enter();
  template <class Ready>
  void await(Ready ready, int64_t spin_ns);
  void wake();

  const int threads_;
  const int64_t owner_process_;
  std::mutex mutex_;
  bool closed_ = false;
  uint32_t epoch_ = 0;
  void (*task_)(void*, int) = nullptr;
  void* argument_ = nullptr;
  std::unique_ptr<Word[]> words_;  // per phase: units taken of each worker's run, then units done
  int phase_capacity_ = 0;
  std::vector<std::thread> workers_;
  alignas(128) std::atomic<uint32_t> job_{0};
  alignas(128) std::atomic<uint32_t> gate_{0};  // bit 31: open; below: workers inside
  alignas(128) std::atomic<uint32_t> sleepers_{0};
  std::atomic<uint32_t> pulse_{0};  // what sleepers wait on; changes when a condition of theirs may hold, or will soon
};

template <class F>
__attribute__((always_inline)) inline void Worker::for_units(int64_t count, F&& f) {
  const int threads = team->threads_;
  int64_t done = 0;
  // A worker starts with its own run of neighbours, the same in every step, and then helps the others.
  for (int i = 0; i < threads; ++i) {
    const int owner = index + i < threads ? index + i : index + i - threads;
    const int64_t begin = team->run_begin(owner, count), limit = team->run_begin(owner + 1, count) - begin;
    std::atomic<uint64_t>& word = team->words_[size_t(phase) * size_t(threads + 1) + size_t(owner)].value;
    for (int64_t unit; (unit = team->take(word, limit)) >= 0; ++done) f(begin + unit);
  }
  team->finish_phase(phase++, done, count);
}

}  // namespace ridgeline
