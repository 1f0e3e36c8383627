// Loops whose index is a constant of each turn.
#pragma once

#include <utility>

#include "simd.h"

RIDGELINE_BEGIN

#define RIDGELINE_INLINED __attribute__((always_inline))

// body(std::integral_constant<int, i>) for i from 0 to kCount - 1.
template <int kCount, class Body>
RIDGELINE_INLINE void unrolled(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) RIDGELINE_INLINED {
    (body(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

RIDGELINE_END
