// Sum of squares of one row, in float64 over kLanes lanes: element i goes to lane i % kLanes, and the
// lanes are added as a tree. A square of bf16, f16 or f32 is exact in float64, so a fused multiply-add
// rounds as a multiplication and an addition do, and every Isa gives the same bits.
#pragma once

#include "cpu.hpp"
#include "numbers.hpp"

#include <cstddef>
#include <cstdint>

namespace reap_stream {

constexpr std::size_t kLanes = 32;

using SumOfSquares = double (*)(const std::uint8_t *row, std::size_t dim);

// Adds lane i and lane i + width/2 for width = kLanes, kLanes/2, ..., 2.
inline double add_lanes(double (&lanes)[kLanes]) {
    for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
        for (std::size_t i = 0; i < half; ++i) {
            lanes[i] += lanes[i + half];
        }
    }
    return lanes[0];
}

// The elements from `begin` on, into their lanes; `begin` is a multiple of kLanes.
template <DType dtype>
inline void
add_squares(double (&lanes)[kLanes], const std::uint8_t *row, std::size_t begin, std::size_t dim) {
    for (std::size_t i = begin; i < dim; ++i) {
        const double value = load_f32(row, dtype, i);
        lanes[i % kLanes] += value * value;
    }
}

#ifdef REAP_STREAM_X86
SumOfSquares sum_of_squares_avx2(DType dtype);
SumOfSquares sum_of_squares_avx512(DType dtype);
#endif

} // namespace reap_stream
