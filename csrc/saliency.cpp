#include "saliency.hpp"

#include "parallel.hpp"
#include "saliency_kernels.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

namespace reap_stream {
namespace {

constexpr std::size_t kElementsPerPiece = std::size_t{1} << 17;

template <DType dtype>
RowSize measure_scalar(const std::uint8_t *row, std::size_t dim) {
    double lanes[kLanes] = {};
    return finish_row<dtype>(lanes, 0.0F, row, 0, dim);
}

MeasureRow measure_row(DType dtype, Isa isa) {
#ifdef REAP_STREAM_X86
    if (isa == Isa::avx512) {
        return measure_row_avx512(dtype);
    }
    if (isa == Isa::avx2) {
        return measure_row_avx2(dtype);
    }
#endif
    static_cast<void>(isa);
    switch (dtype) {
        case DType::bf16:
            return measure_scalar<DType::bf16>;
        case DType::f16:
            return measure_scalar<DType::f16>;
        case DType::f32:
            break;
    }
    return measure_scalar<DType::f32>;
}

void require_sources(const std::int32_t *sources, std::size_t n, std::size_t num_sources) {
    for (std::size_t i = 0; i < n; ++i) {
        if (sources[i] < 0 || static_cast<std::size_t>(sources[i]) >= num_sources) {
            throw std::invalid_argument("sources[" + std::to_string(i) + "] is "
                                        + std::to_string(sources[i]) + "; there are "
                                        + std::to_string(num_sources) + " sources");
        }
    }
}

} // namespace

std::size_t accumulate_saliency(const GatedRows &gated,
                                const std::int32_t *sources,
                                const SaliencySums &sums,
                                const Execution &execution) {
    require_sources(sources, gated.n, sums.num_sources);
    const MeasureRow measure = measure_row(gated.dtype, execution.isa);
    const std::size_t row_nbytes = gated.dim * itemsize(gated.dtype);
    const std::size_t grain = kElementsPerPiece / std::max<std::size_t>(gated.dim, 1);

    std::vector<RowSize> sizes(gated.n);
    const auto measure_rows = [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
            sizes[i] = measure(gated.rows + i * row_nbytes, gated.dim);
        }
    };
    parallel_chunks(gated.n, grain, execution.threads, measure_rows);

    // Rows are measured in any order, sums in the order of the rows: float64 addition is not
    // associative, and the number of threads must not show in a score.
    const DefaultFloatMode mode;
    std::size_t not_finite = 0;
    for (std::size_t i = 0; i < gated.n; ++i) {
        const double norm = std::sqrt(sizes[i].squares);
        const double gate = gated.gates[i];
        if (!std::isfinite(norm) || !std::isfinite(gate)) {
            ++not_finite;
            continue;
        }
        const auto source = static_cast<std::size_t>(sources[i]);
        sums.tokens[source] += 1;
        sums.gate_sum[source] += gate;
        sums.norm_sum[source] += norm;
        sums.gate_norm_sum[source] += gate * norm;
        sums.norm_max[source] = std::max(sums.norm_max[source], norm);
        sums.output_max[source] = std::max(sums.output_max[source], double{sizes[i].largest});
    }
    return not_finite;
}

} // namespace reap_stream
