// The sums behind REAP (Lasby et al., arXiv 2510.13999, eq. 9): for the rows that the router sent to
// one expert, tokens, gate weights g, norms ||f||, and g * ||f||, per calibration source. Beside them
// the largest norm and the largest |element| (Su et al., arXiv 2507.23279).
#pragma once

#include "fp8.hpp"
#include "numbers.hpp"

#include <cstddef>
#include <cstdint>

namespace reap_stream {

// Rows of an expert's output: n rows of dim elements, with one gate weight each.
struct GatedRows {
    const std::uint8_t *rows = nullptr;
    DType dtype = DType::bf16;
    const float *gates = nullptr;
    std::size_t n = 0;
    std::size_t dim = 0;
};

// One element per calibration source; added to in place.
struct SaliencySums {
    std::int64_t *tokens = nullptr;
    double *gate_sum = nullptr;
    double *norm_sum = nullptr;
    double *gate_norm_sum = nullptr;
    double *norm_max = nullptr;
    double *output_max = nullptr;
    std::size_t num_sources = 0;
};

// Returns how many rows were left out of every sum because their norm or gate is not finite.
// The sums do not depend on the instruction set or the number of threads: see saliency.cpp.
// Throws std::invalid_argument, before any sum changes, when a source is not in [0, num_sources).
std::size_t accumulate_saliency(const GatedRows &gated,
                                const std::int32_t *sources,
                                const SaliencySums &sums,
                                const Execution &execution);

} // namespace reap_stream
