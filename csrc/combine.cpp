#include "combine.hpp"

#include "parallel.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#ifdef REAP_STREAM_X86
#    include <immintrin.h>
#endif

namespace reap_stream {
namespace {

constexpr std::size_t kElementsPerPiece = std::size_t{1} << 17;
// Columns of a piece: a multiple of a cache line of float32, lest two threads write the same one.
constexpr std::size_t kColumnStep = 64;

using AddRow = void (*)(const std::uint8_t *row, float gate, float *out, std::size_t n);

template <DType dtype>
void add_scalar(const std::uint8_t *row, float gate, float *out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        out[i] += gate * load_f32(row, dtype, i);
    }
}

#ifdef REAP_STREAM_X86

template <DType dtype>
REAP_STREAM_AVX2 void add_avx2(const std::uint8_t *row, float gate, float *out, std::size_t n) {
    const __m256 gates = _mm256_set1_ps(gate);
    std::size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 values;
        if constexpr (dtype == DType::f32) {
            values = _mm256_castsi256_ps(
                _mm256_loadu_si256(reinterpret_cast<const __m256i *>(row + 4 * i)));
        } else {
            const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i *>(row + 2 * i));
            values = dtype == DType::f16 ? _mm256_cvtph_ps(words)
                                         : _mm256_castsi256_ps(_mm256_slli_epi32(
                                               _mm256_cvtepu16_epi32(words), 16));
        }
        const __m256 product = _mm256_mul_ps(gates, values);
        _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_loadu_ps(out + i), product));
    }
    add_scalar<dtype>(row + i * itemsize(dtype), gate, out + i, n - i);
}

template <DType dtype>
REAP_STREAM_AVX512 void
add_avx512(const std::uint8_t *row, float gate, float *out, std::size_t n) {
    const __m512 gates = _mm512_set1_ps(gate);
    std::size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 values;
        if constexpr (dtype == DType::f32) {
            values = _mm512_loadu_ps(row + 4 * i);
        } else {
            const __m256i words
                = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(row + 2 * i));
            values = dtype == DType::f16 ? _mm512_cvtph_ps(words)
                                         : _mm512_castsi512_ps(_mm512_slli_epi32(
                                               _mm512_cvtepu16_epi32(words), 16));
        }
        const __m512 product = _mm512_mul_ps(gates, values);
        _mm512_storeu_ps(out + i, _mm512_add_ps(_mm512_loadu_ps(out + i), product));
    }
    add_scalar<dtype>(row + i * itemsize(dtype), gate, out + i, n - i);
}

#endif

template <DType dtype>
AddRow add_row_of(Isa isa) {
#ifdef REAP_STREAM_X86
    if (isa == Isa::avx512) {
        return add_avx512<dtype>;
    }
    if (isa == Isa::avx2) {
        return add_avx2<dtype>;
    }
#endif
    static_cast<void>(isa);
    return add_scalar<dtype>;
}

AddRow add_row(DType dtype, Isa isa) {
    switch (dtype) {
        case DType::bf16:
            return add_row_of<DType::bf16>(isa);
        case DType::f16:
            return add_row_of<DType::f16>(isa);
        case DType::f32:
            break;
    }
    return add_row_of<DType::f32>(isa);
}

void require_tokens(const std::int64_t *tokens, std::size_t n, std::size_t num_tokens) {
    for (std::size_t i = 0; i < n; ++i) {
        if (tokens[i] < 0 || static_cast<std::size_t>(tokens[i]) >= num_tokens) {
            throw std::invalid_argument("tokens[" + std::to_string(i) + "] is "
                                        + std::to_string(tokens[i]) + "; out has "
                                        + std::to_string(num_tokens) + " rows");
        }
    }
}

} // namespace

void combine(const GatedRows &gated,
             const std::int64_t *tokens,
             float *out,
             std::size_t num_tokens,
             const Execution &execution) {
    require_tokens(tokens, gated.n, num_tokens);
    const AddRow add = add_row(gated.dtype, execution.isa);
    const std::size_t element_nbytes = itemsize(gated.dtype);

    // Tokens repeat, so threads share the columns: each owns its own of every row of `out`.
    const auto columns = [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = 0; i < gated.n; ++i) {
            const std::uint8_t *row = gated.rows + (i * gated.dim + begin) * element_nbytes;
            float *out_row = out + static_cast<std::size_t>(tokens[i]) * gated.dim;
            add(row, gated.gates[i], out_row + begin, end - begin);
        }
    };
    // As wide as they can be, since a narrow column of many rows is slow to walk.
    const std::size_t num_pieces
        = thread_count(execution.threads, gated.n * gated.dim / kElementsPerPiece);
    const std::size_t grain = (gated.dim / num_pieces / kColumnStep + 1) * kColumnStep;
    parallel_chunks(gated.dim, grain, execution.threads, columns);
}

} // namespace reap_stream
