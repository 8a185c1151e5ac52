// Eight or sixteen elements at a time. What is left at the end of a run goes through the scalar twin.
#include "fp8_kernels.hpp"

#ifdef REAP_STREAM_X86

#    include "bf16_simd.hpp"

#    include <algorithm>
#    include <immintrin.h>

namespace reap_stream {
namespace {

inline __m128i load8(const std::uint8_t *bytes) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i *>(bytes));
}
inline __m128i load16(const std::uint8_t *bytes) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes));
}
REAP_STREAM_AVX2 inline __m256i load32(const std::uint8_t *bytes) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(bytes));
}
REAP_STREAM_AVX2 inline void store32(std::uint8_t *bytes, __m256i value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(bytes), value);
}

// float32(code) * scale. Read as f16 the code is 2^-8 of itself; multiplying by 256 is exact and
// comes first, so that the product is rounded once, as float32(code) * scale is.
REAP_STREAM_AVX2 inline __m256 scaled_values(__m128i codes, __m256 scale) {
    const __m128i words = _mm_cvtepu8_epi16(codes);
    const __m128i magnitude = _mm_and_si128(words, _mm_set1_epi16(0x7F));
    const __m128i sign = _mm_slli_epi16(_mm_andnot_si128(_mm_set1_epi16(0x7F), words), 8);
    const __m128i is_nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7F));
    const __m128i f16_nan = _mm_and_si128(is_nan, _mm_set1_epi16(0x7F80));
    const __m128i f16 = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(magnitude, 7), sign), f16_nan);
    return _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtph_ps(f16), _mm256_set1_ps(256.0F)), scale);
}

REAP_STREAM_AVX2 void
decode_bf16(const std::uint8_t *codes, std::size_t n, float scale, std::uint8_t *out) {
    const __m256 scales = _mm256_set1_ps(scale);
    std::size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m128i sixteen = load16(codes + i);
        const __m256 low = scaled_values(sixteen, scales);
        const __m256 high = scaled_values(_mm_srli_si128(sixteen, 8), scales);
        const __m256i packed
            = _mm256_packus_epi32(avx2::rounded_to_bf16(low), avx2::rounded_to_bf16(high));
        store32(out + 2 * i, _mm256_permute4x64_epi64(packed, 0xD8));
    }
    kFp8Scalar.decode_bf16(codes + i, n - i, scale, out + 2 * i);
}

REAP_STREAM_AVX2 void
decode_f32(const std::uint8_t *codes, std::size_t n, float scale, std::uint8_t *out) {
    const __m256 scales = _mm256_set1_ps(scale);
    std::size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        store32(out + 4 * i, _mm256_castps_si256(scaled_values(load8(codes + i), scales)));
    }
    kFp8Scalar.decode_f32(codes + i, n - i, scale, out + 4 * i);
}

template <DType dtype>
REAP_STREAM_AVX2 inline __m256 load_values(const std::uint8_t *src, std::size_t i) {
    if constexpr (dtype == DType::bf16) {
        return _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(src + 2 * i)), 16));
    } else {
        return _mm256_castsi256_ps(load32(src + 4 * i));
    }
}

// f32_to_e4m3 of numbers.hpp, the code in the low byte of each 32-bit lane.
REAP_STREAM_AVX2 inline __m256i rounded_to_e4m3(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i unclamped = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
    const __m256i is_nan = _mm256_cmpgt_epi32(unclamped, _mm256_set1_epi32(0x7F800000));
    const __m256i max_bits = _mm256_castps_si256(_mm256_set1_ps(kE4m3Max));
    const __m256i magnitude = _mm256_min_epu32(unclamped, max_bits);

    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, 20), _mm256_set1_epi32(1));
    const __m256i shift = _mm256_set1_epi32(0x7FFFF - ((127 - 7) << 23));
    const __m256i normal
        = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(magnitude, shift), odd), 20);

    const __m256 rounder = _mm256_set1_ps(0x1p14F);
    const __m256 sum = _mm256_add_ps(_mm256_castsi256_ps(magnitude), rounder);
    const __m256i subnormal
        = _mm256_sub_epi32(_mm256_castps_si256(sum), _mm256_castps_si256(rounder));
    const __m256i is_subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(121 << 23), magnitude);

    __m256i code = _mm256_blendv_epi8(normal, subnormal, is_subnormal);
    code = _mm256_blendv_epi8(code, _mm256_set1_epi32(0x7F), is_nan);
    const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(bits, 31), 7);
    return _mm256_or_si256(code, sign);
}

template <DType dtype>
REAP_STREAM_AVX2 void
encode(const std::uint8_t *src, std::size_t n, float scale, std::uint8_t *codes) {
    const __m256 scales = _mm256_set1_ps(scale);
    std::size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256i wide = rounded_to_e4m3(_mm256_div_ps(load_values<dtype>(src, i), scales));
        const __m128i words
            = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i *>(codes + i), _mm_packus_epi16(words, words));
    }
    if constexpr (dtype == DType::bf16) {
        kFp8Scalar.encode_bf16(src + 2 * i, n - i, scale, codes + i);
    } else {
        kFp8Scalar.encode_f32(src + 4 * i, n - i, scale, codes + i);
    }
}

REAP_STREAM_AVX2 std::uint32_t absmax_bf16(const std::uint8_t *src, std::size_t n) {
    const __m256i mask = _mm256_set1_epi16(0x7FFF);
    __m256i largest = _mm256_setzero_si256();
    std::size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        largest = _mm256_max_epu16(largest, _mm256_and_si256(load32(src + 2 * i), mask));
    }
    std::uint16_t lanes[16];
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(lanes), largest);
    const std::uint32_t bits = std::uint32_t{*std::max_element(lanes, lanes + 16)} << 16;
    return std::max(bits, kFp8Scalar.absmax_bf16(src + 2 * i, n - i));
}

REAP_STREAM_AVX2 std::uint32_t absmax_f32(const std::uint8_t *src, std::size_t n) {
    const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i largest = _mm256_setzero_si256();
    std::size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        largest = _mm256_max_epu32(largest, _mm256_and_si256(load32(src + 4 * i), mask));
    }
    std::uint32_t lanes[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(lanes), largest);
    const std::uint32_t bits = *std::max_element(lanes, lanes + 8);
    return std::max(bits, kFp8Scalar.absmax_f32(src + 4 * i, n - i));
}

} // namespace

const Fp8Kernels kFp8Avx2{
    decode_bf16, decode_f32, nullptr, encode<DType::bf16>, encode<DType::f32>, absmax_bf16, absmax_f32};

} // namespace reap_stream

#endif
