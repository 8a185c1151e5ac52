// Sixteen 4-bit or 8-bit codes at a time. What is left at the end of a group goes through the scalar
// twin.
#include "packed_kernels.hpp"

#ifdef REAP_STREAM_X86

#    include "bf16_simd.hpp"
#    include "numbers.hpp"

#    include <immintrin.h>

namespace reap_stream {
namespace {

// The values of the 16 codes of one group: codes 0 to 7, and 8 to 15.
struct Values {
    __m256 low;
    __m256 high;
};

REAP_STREAM_AVX2 inline __m256 scaled(__m256 numbers, float zero, float scale) {
    return _mm256_mul_ps(_mm256_sub_ps(numbers, _mm256_set1_ps(zero)), _mm256_set1_ps(scale));
}

REAP_STREAM_AVX2 inline Values values_of(const PackedRow &row, std::size_t group) {
    const float zero = row.zero[group];
    const float scale = row.scale[group];
    return {scaled(_mm256_loadu_ps(row.numbers), zero, scale),
            scaled(_mm256_loadu_ps(row.numbers + 8), zero, scale)};
}

// Sixteen bf16 in the order of the values.
REAP_STREAM_AVX2 inline __m256i to_bf16(const Values &values) {
    const __m256i packed = _mm256_packus_epi32(avx2::rounded_to_bf16(values.low),
                                               avx2::rounded_to_bf16(values.high));
    return _mm256_permute4x64_epi64(packed, 0xD8);
}

// The codes of eight bytes, one a byte.
inline __m128i unpack16(const std::uint8_t *codes) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes));
    const __m128i nibble = _mm_set1_epi8(0xF);
    const __m128i even = _mm_and_si128(pairs, nibble);
    const __m128i odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), nibble);
    return _mm_unpacklo_epi8(even, odd);
}

inline void store16(std::uint8_t *out, __m128i value) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), value);
}

PackedRow rest_of(const PackedRow &row, std::size_t col, std::size_t n, std::size_t group,
                  std::size_t bits, std::size_t out_itemsize) {
    return {row.codes + col * bits / 8, n, n, row.scale + group, row.zero + group, row.numbers,
            row.out + col * out_itemsize};
}

// A byte shuffle looks up the low and the high half of each bf16.
REAP_STREAM_AVX2 void nibbles_bf16(const PackedRow &row) {
    std::size_t group = 0;
    for (std::size_t col = 0; col < row.cols; ++group) {
        const std::size_t end = row.cols - col > row.group ? col + row.group : row.cols;
        const __m256i words = to_bf16(values_of(row, group));
        const __m128i first = _mm256_castsi256_si128(words);
        const __m128i second = _mm256_extracti128_si256(words, 1);
        const __m128i byte = _mm_set1_epi16(0xFF);
        const __m128i low
            = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
        const __m128i high
            = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
        for (; col + 16 <= end; col += 16) {
            const __m128i codes = unpack16(row.codes + col / 2);
            const __m128i lows = _mm_shuffle_epi8(low, codes);
            const __m128i highs = _mm_shuffle_epi8(high, codes);
            store16(row.out + 2 * col, _mm_unpacklo_epi8(lows, highs));
            store16(row.out + 2 * col + 16, _mm_unpackhi_epi8(lows, highs));
        }
        if (col < end) {
            kPackedScalar.nibbles_bf16(rest_of(row, col, end - col, group, 4, 2));
            col = end;
        }
    }
}

REAP_STREAM_AVX2 inline __m256 look_up(const Values &values, __m128i codes) {
    const __m256i index = _mm256_cvtepu8_epi32(codes);
    const __m256 low = _mm256_permutevar8x32_ps(values.low, index);
    const __m256 high = _mm256_permutevar8x32_ps(values.high, index);
    // The fourth bit of the code, moved to where the blend looks.
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

REAP_STREAM_AVX2 void nibbles_f32(const PackedRow &row) {
    std::size_t group = 0;
    for (std::size_t col = 0; col < row.cols; ++group) {
        const std::size_t end = row.cols - col > row.group ? col + row.group : row.cols;
        const Values values = values_of(row, group);
        for (; col + 16 <= end; col += 16) {
            const __m128i codes = unpack16(row.codes + col / 2);
            auto *out = reinterpret_cast<float *>(row.out + 4 * col);
            _mm256_storeu_ps(out, look_up(values, codes));
            _mm256_storeu_ps(out + 8, look_up(values, _mm_srli_si128(codes, 8)));
        }
        if (col < end) {
            kPackedScalar.nibbles_f32(rest_of(row, col, end - col, group, 4, 4));
            col = end;
        }
    }
}

REAP_STREAM_AVX2 inline Values values_of_bytes(const std::uint8_t *codes, float zero, float scale) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes));
    const __m256i low = _mm256_cvtepu8_epi32(sixteen);
    const __m256i high = _mm256_cvtepu8_epi32(_mm_srli_si128(sixteen, 8));
    return {scaled(_mm256_cvtepi32_ps(low), zero, scale),
            scaled(_mm256_cvtepi32_ps(high), zero, scale)};
}

template <DType dtype>
REAP_STREAM_AVX2 void bytes(const PackedRow &row) {
    std::size_t group = 0;
    for (std::size_t col = 0; col < row.cols; ++group) {
        const std::size_t end = row.cols - col > row.group ? col + row.group : row.cols;
        for (; col + 16 <= end; col += 16) {
            const Values values
                = values_of_bytes(row.codes + col, row.zero[group], row.scale[group]);
            std::uint8_t *out = row.out + col * itemsize(dtype);
            if constexpr (dtype == DType::bf16) {
                _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), to_bf16(values));
            } else {
                _mm256_storeu_ps(reinterpret_cast<float *>(out), values.low);
                _mm256_storeu_ps(reinterpret_cast<float *>(out + 32), values.high);
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

const PackedKernels kPackedAvx2{
    nibbles_bf16, nibbles_f32, bytes<DType::bf16>, bytes<DType::f32>};

} // namespace reap_stream

#endif
