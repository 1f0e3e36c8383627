// Measurements of the machine's ceilings with the team that runs the models.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "launch.h"
#include "team.h"

namespace ridgeline {

// Each measures for about `seconds` and returns its samples, at least two.

// Bytes per second of each pass over `bytes` of memory, by access pattern; `seconds` for each of these.
std::vector<std::pair<std::string, std::vector<double>>> measure_read(Team& team, size_t bytes,
                                                                      double seconds);

// Bytes per second of all workers together when each reads `worker_bytes` of its own again and again.
std::vector<double> measure_cached_read(Team& team, const Kernels& kernels, size_t worker_bytes,
                                        double seconds);

// Operations per second of register-only loops on all workers; none where the level has none of that format.
std::vector<double> measure_peak(Team& team, const Kernels& kernels, PeakFormat format, double seconds);

// Seconds from the end of balanced work in one phase of a run to the start of the next: the team's barrier.
std::vector<double> measure_barrier(Team& team, double seconds);

// Seconds that a run of one phase takes beside its work; before each the caller sleeps `pause_s`, in which
// the others fall asleep too.
std::vector<double> measure_start(Team& team, double pause_s, double seconds);

}  // namespace ridgeline
