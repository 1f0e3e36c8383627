// A persistent team of threads. The caller is worker 0; the others sleep between runs.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace ridgeline {

// Rounding to nearest even, denormals flushed to zero, all exceptions masked: the same on every thread that
// computes, so that results do not depend on who computes them. Restores the thread's own state.
class FloatState {
 public:
  FloatState();
  ~FloatState();
  FloatState(const FloatState&) = delete;
  FloatState& operator=(const FloatState&) = delete;

 private:
  uint64_t saved_;
};

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return threads_; }
  void close();

  // Calls task(argument, worker) once on every worker and returns when all have. Runs are serialised.
  // Throws std::runtime_error on a closed team or in a forked child, which has no threads.
  void run(void (*task)(void*, int), void* argument);
  template <class F>
  void run(F&& f) {
    run([](void* f_, int worker) { (*static_cast<std::remove_reference_t<F>*>(f_))(worker); }, &f);
  }

  // For use inside a task, by all workers alike.
  void barrier();
  // The next unit of work since the last barrier. A worker's first unit is its own index, without asking.
  __attribute__((always_inline)) int64_t next() { return units_.fetch_add(1, std::memory_order_relaxed); }

 private:
  void work(int worker);
  static void await_change(std::atomic<uint32_t>& word, uint32_t seen, int64_t spin_ns);

  const int threads_;
  const int64_t owner_process_;
  std::mutex mutex_;
  bool closed_ = false;
  void (*task_)(void*, int) = nullptr;
  void* argument_ = nullptr;
  std::vector<std::thread> workers_;
  // One cache line each: all of them are written while others spin.
  alignas(128) std::atomic<uint32_t> job_{0};
  alignas(128) std::atomic<uint32_t> phase_{0};
  alignas(128) std::atomic<int> arrived_{0};
  alignas(128) std::atomic<int64_t> units_{0};
};

// for (int64_t unit = first; unit < count; unit = team.next()), as kernels write it.
template <class F>
inline __attribute__((always_inline)) void for_units(Team& team, int worker, int64_t count, F&& f) {
  for (int64_t unit = worker; unit < count; unit = team.next()) f(unit);
}

}  // namespace ridgeline
