// Sum of squares of one row, in float64 over kLanes lanes: element i goes to lane i % kLanes, and the
// lanes are added as a tree. A square of bf16, f16 or f32 is exact in float64, so a fused multiply-add
// rounds as a multiplication and an addition do, and every Isa gives the same bits. The largest
// |element| is the same in any order; where an element is NaN it is of no use, as the sum tells.
#pragma once

#include "cpu.hpp"
#include "numbers.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace reap_stream {

constexpr std::size_t kLanes = 32;

struct RowSize {
    double squares = 0.0;
    float largest = 0.0F;
};

using MeasureRow = RowSize (*)(const std::uint8_t *row, std::size_t dim);

// Adds lane i and lane i + width/2 for width = kLanes, kLanes/2, ..., 2.
inline double add_lanes(double (&lanes)[kLanes]) {
    for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
        for (std::size_t i = 0; i < half; ++i) {
            lanes[i] += lanes[i + half];
        }
    }
    return lanes[0];
}

// The elements from `begin` on, squares into their lanes; `begin` is a multiple of kLanes.
template <DType dtype>
inline RowSize finish_row(double (&lanes)[kLanes],
                          float largest,
                          const std::uint8_t *row,
                          std::size_t begin,
                          std::size_t dim) {
    for (std::size_t i = begin; i < dim; ++i) {
        const float value = load_f32(row, dtype, i);
        lanes[i % kLanes] += double{value} * double{value};
        largest = std::max(largest, std::fabs(value));
    }
    return {add_lanes(lanes), largest};
}

#ifdef REAP_STREAM_X86
MeasureRow measure_row_avx2(DType dtype);
MeasureRow measure_row_avx512(DType dtype);
#endif

} // namespace reap_stream
