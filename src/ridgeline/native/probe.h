// Measurements of the machine's ceilings with the team that runs the models.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "launch.h"
#include "team.h"

namespace ridgeline {

// GB/s (1e9 bytes) of reading `bytes` of memory once per pass, by access pattern; the best pass counts.
std::vector<std::pair<std::string, double>> measure_read(Team& team, size_t bytes, double seconds);

// Operations per second of register-only loops on all workers; 0 where the level has none of that format.
double measure_peak(Team& team, const Kernels& kernels, PeakFormat format);

}  // namespace ridgeline
