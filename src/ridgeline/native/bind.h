// What the binding files share.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "launch.h"
#include "matrix.h"

namespace ridgeline {

// Throws std::invalid_argument for a level that was not built or that this machine lacks.
const Kernels& kernels_named(const std::string& isa);

void bind_blocks(nb::module_& m);
void bind_draw(nb::module_& m);
void bind_tape(nb::module_& m);

}  // namespace ridgeline
