// The lanes of saliency_kernels.hpp as eight AVX2 or four AVX-512 registers of float64.
#include "saliency_kernels.hpp"

#ifdef REAP_STREAM_X86

#    include <immintrin.h>

namespace reap_stream {
namespace {

template <DType dtype>
REAP_STREAM_AVX2 inline __m256 load_eight(const std::uint8_t *row, std::size_t i) {
    if constexpr (dtype == DType::f32) {
        return _mm256_castsi256_ps(
            _mm256_loadu_si256(reinterpret_cast<const __m256i *>(row + 4 * i)));
    } else {
        const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i *>(row + 2 * i));
        if constexpr (dtype == DType::f16) {
            return _mm256_cvtph_ps(words);
        }
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
    }
}

template <DType dtype>
REAP_STREAM_AVX2 RowSize measure_avx2(const std::uint8_t *row, std::size_t dim) {
    __m256d sums[kLanes / 4];
    for (__m256d &sum : sums) {
        sum = _mm256_setzero_pd();
    }
    const __m256 sign = _mm256_set1_ps(-0.0F);
    __m256 largest = _mm256_setzero_ps();
    std::size_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) {
        for (std::size_t k = 0; k < kLanes / 8; ++k) {
            const __m256 values = load_eight<dtype>(row, i + 8 * k);
            largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, values));
            const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(values));
            const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1));
            sums[2 * k] = _mm256_fmadd_pd(low, low, sums[2 * k]);
            sums[2 * k + 1] = _mm256_fmadd_pd(high, high, sums[2 * k + 1]);
        }
    }
    double lanes[kLanes];
    for (std::size_t k = 0; k < kLanes / 4; ++k) {
        _mm256_storeu_pd(lanes + 4 * k, sums[k]);
    }
    float eight[8];
    _mm256_storeu_ps(eight, largest);
    return finish_row<dtype>(lanes, *std::max_element(eight, eight + 8), row, i, dim);
}

template <DType dtype>
REAP_STREAM_AVX512 inline __m512 load_sixteen(const std::uint8_t *row, std::size_t i) {
    if constexpr (dtype == DType::f32) {
        return _mm512_loadu_ps(row + 4 * i);
    } else {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(row + 2 * i));
        if constexpr (dtype == DType::f16) {
            return _mm512_cvtph_ps(words);
        }
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    }
}

template <DType dtype>
REAP_STREAM_AVX512 RowSize measure_avx512(const std::uint8_t *row, std::size_t dim) {
    __m512d sums[kLanes / 8];
    for (__m512d &sum : sums) {
        sum = _mm512_setzero_pd();
    }
    __m512 largest = _mm512_setzero_ps();
    std::size_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) {
        for (std::size_t k = 0; k < kLanes / 16; ++k) {
            const __m512 values = load_sixteen<dtype>(row, i + 16 * k);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(values));
            const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(values));
            const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(values, 1));
            sums[2 * k] = _mm512_fmadd_pd(low, low, sums[2 * k]);
            sums[2 * k + 1] = _mm512_fmadd_pd(high, high, sums[2 * k + 1]);
        }
    }
    double lanes[kLanes];
    for (std::size_t k = 0; k < kLanes / 8; ++k) {
        _mm512_storeu_pd(lanes + 8 * k, sums[k]);
    }
    return finish_row<dtype>(lanes, _mm512_reduce_max_ps(largest), row, i, dim);
}

} // namespace

MeasureRow measure_row_avx2(DType dtype) {
    switch (dtype) {
        case DType::bf16:
            return measure_avx2<DType::bf16>;
        case DType::f16:
            return measure_avx2<DType::f16>;
        case DType::f32:
            break;
    }
    return measure_avx2<DType::f32>;
}

MeasureRow measure_row_avx512(DType dtype) {
    switch (dtype) {
        case DType::bf16:
            return measure_avx512<DType::bf16>;
        case DType::f16:
            return measure_avx512<DType::f16>;
        case DType::f32:
            break;
    }
    return measure_avx512<DType::f32>;
}

} // namespace reap_stream

#endif
