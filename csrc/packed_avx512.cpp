// Thirty-two or sixteen codes at a time. What is left at the end of a group goes through the scalar
// twin.
#include "packed_kernels.hpp"

#ifdef REAP_STREAM_X86

#    include "bf16_simd.hpp"
#    include "numbers.hpp"

#    include <immintrin.h>

namespace reap_stream {
namespace {

REAP_STREAM_AVX512 inline __m512 scaled(__m512 numbers, float zero, float scale) {
    return _mm512_mul_ps(_mm512_sub_ps(numbers, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
}

REAP_STREAM_AVX512 inline __m256i to_bf16(__m512 values) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(avx512::rounded_to_bf16(values), 16));
}

// Of sixteen words with one byte of two codes each: both codes, one a byte, the low one first.
REAP_STREAM_AVX512 inline __m256i unpacked(__m256i pairs) {
    const __m256i both = _mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4));
    return _mm256_and_si256(both, _mm256_set1_epi8(0xF));
}
REAP_STREAM_AVX512 inline __m512i unpack32(const std::uint8_t *codes) {
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes));
    return _mm512_cvtepu8_epi16(unpacked(_mm256_cvtepu8_epi16(pairs)));
}
REAP_STREAM_AVX512 inline __m128i unpack16(const std::uint8_t *codes) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes));
    return _mm256_castsi256_si128(unpacked(_mm256_cvtepu8_epi16(pairs)));
}

PackedRow rest_of(const PackedRow &row, std::size_t col, std::size_t n, std::size_t group,
                  std::size_t bits, std::size_t out_itemsize) {
    return {row.codes + col * bits / 8, n, n, row.scale + group, row.zero + group, row.numbers,
            row.out + col * out_itemsize};
}

REAP_STREAM_AVX512 void nibbles_bf16(const PackedRow &row) {
    const __m512 numbers = _mm512_loadu_ps(row.numbers);
    std::size_t group = 0;
    for (std::size_t col = 0; col < row.cols; ++group) {
        const std::size_t end = row.cols - col > row.group ? col + row.group : row.cols;
        const __m256i values = to_bf16(scaled(numbers, row.zero[group], row.scale[group]));
        const __m512i table = _mm512_castsi256_si512(values);
        for (; col + 32 <= end; col += 32) {
            const __m512i codes = unpack32(row.codes + col / 2);
            _mm512_storeu_si512(row.out + 2 * col, _mm512_permutexvar_epi16(codes, table));
        }
        if (col + 16 <= end) {
            const __m256i codes = _mm256_cvtepu8_epi16(unpack16(row.codes + col / 2));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(row.out + 2 * col),
                                _mm256_permutexvar_epi16(codes, values));
            col += 16;
        }
        if (col < end) {
            kPackedScalar.nibbles_bf16(rest_of(row, col, end - col, group, 4, 2));
            col = end;
        }
    }
}

REAP_STREAM_AVX512 void nibbles_f32(const PackedRow &row) {
    const __m512 numbers = _mm512_loadu_ps(row.numbers);
    std::size_t group = 0;
    for (std::size_t col = 0; col < row.cols; ++group) {
        const std::size_t end = row.cols - col > row.group ? col + row.group : row.cols;
        const __m512 table = scaled(numbers, row.zero[group], row.scale[group]);
        for (; col + 16 <= end; col += 16) {
            const __m512i codes = _mm512_cvtepu8_epi32(unpack16(row.codes + col / 2));
            _mm512_storeu_ps(row.out + 4 * col, _mm512_permutexvar_ps(codes, table));
        }
        if (col < end) {
            kPackedScalar.nibbles_f32(rest_of(row, col, end - col, group, 4, 4));
            col = end;
        }
    }
}

template <DType dtype>
REAP_STREAM_AVX512 void bytes(const PackedRow &row) {
    std::size_t group = 0;
    for (std::size_t col = 0; col < row.cols; ++group) {
        const std::size_t end = row.cols - col > row.group ? col + row.group : row.cols;
        for (; col + 16 <= end; col += 16) {
            const __m128i codes
                = _mm_loadu_si128(reinterpret_cast<const __m128i *>(row.codes + col));
            const __m512 numbers = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
            const __m512 values = scaled(numbers, row.zero[group], row.scale[group]);
            std::uint8_t *out = row.out + col * itemsize(dtype);
            if constexpr (dtype == DType::bf16) {
                _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), to_bf16(values));
            } else {
                _mm512_storeu_ps(out, values);
            }
        }
        if (col < end) {
            const auto rest = dtype == DType::bf16 ? kPackedScalar.bytes_bf16
                                                   : kPackedScalar.bytes_f32;
            rest(rest_of(row, col, end - col, group, 8, itemsize(dtype)));
            col = end;
        }
    }
}

} // namespace

const PackedKernels kPackedAvx512{
    nibbles_bf16, nibbles_f32, bytes<DType::bf16>, bytes<DType::f32>};

} // namespace reap_stream

#endif
