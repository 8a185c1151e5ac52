// Sixteen or thirty-two elements at a time; the end of a run goes under a mask or through the scalar
// twin. Whole registers are stored without a mask: a masked store, be it full, makes the processor
// read the line that it overwrites (measured: a third of the speed on a matrix larger than the cache).
#include "fp8_kernels.hpp"

#ifdef REAP_STREAM_X86

#    include "bf16_simd.hpp"

#    include <algorithm>
#    include <immintrin.h>

namespace reap_stream {
namespace {

// The lanes of the step at `i` that lie inside the run.
inline __mmask32 mask32(std::size_t i, std::size_t n) {
    return n - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (n - i)) - 1;
}
REAP_STREAM_AVX512 inline __m256i load32(const std::uint8_t *bytes) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(bytes));
}

// 2^-8 of each code, exactly: E4M3 read as f16, with NaN made one.
REAP_STREAM_AVX512 inline __m512i as_f16(__m256i codes) {
    const __m512i words = _mm512_cvtepu8_epi16(codes);
    const __m512i low7 = _mm512_set1_epi16(0x7F);
    const __m512i magnitude = _mm512_and_si512(words, low7);
    const __m512i sign = _mm512_slli_epi16(_mm512_andnot_si512(low7, words), 8);
    const __m512i f16 = _mm512_or_si512(_mm512_slli_epi16(magnitude, 7), sign);
    const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(magnitude, low7);
    return _mm512_mask_blend_epi16(is_nan, f16, _mm512_or_si512(f16, _mm512_set1_epi16(0x7F80)));
}

// float32(code) * scale. Multiplying by 256 is exact and comes first, so that the product is
// rounded once, as float32(code) * scale is.
REAP_STREAM_AVX512 inline __m512 scaled_values(__m256i f16, __m512 scale) {
    return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtph_ps(f16), _mm512_set1_ps(256.0F)), scale);
}

REAP_STREAM_AVX512 inline __m512i high_halves_order() {
    alignas(64) std::uint16_t order[32];
    for (unsigned i = 0; i < 32; ++i) {
        order[i] = static_cast<std::uint16_t>(2 * i + 1);
    }
    return _mm512_load_si512(order);
}

REAP_STREAM_AVX512 inline __m512i to_bf16(__m256i codes, __m512 scales, __m512i high_halves) {
    const __m512i f16 = as_f16(codes);
    const __m512 low = scaled_values(_mm512_castsi512_si256(f16), scales);
    const __m512 high = scaled_values(_mm512_extracti64x4_epi64(f16, 1), scales);
    return _mm512_permutex2var_epi16(
        avx512::rounded_to_bf16(low), high_halves, avx512::rounded_to_bf16(high));
}

REAP_STREAM_AVX512 void
decode_bf16(const std::uint8_t *codes, std::size_t n, float scale, std::uint8_t *out) {
    const __m512 scales = _mm512_set1_ps(scale);
    const __m512i high_halves = high_halves_order();
    std::size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        _mm512_storeu_si512(out + 2 * i, to_bf16(load32(codes + i), scales, high_halves));
    }
    if (i < n) {
        const __mmask32 inside = mask32(i, n);
        const __m256i rest = _mm256_maskz_loadu_epi8(inside, codes + i);
        _mm512_mask_storeu_epi16(out + 2 * i, inside, to_bf16(rest, scales, high_halves));
    }
}

REAP_STREAM_AVX512 void
decode_f32(const std::uint8_t *codes, std::size_t n, float scale, std::uint8_t *out) {
    const __m512 scales = _mm512_set1_ps(scale);
    std::size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m512i f16 = as_f16(load32(codes + i));
        const __m512 low = scaled_values(_mm512_castsi512_si256(f16), scales);
        const __m512 high = scaled_values(_mm512_extracti64x4_epi64(f16, 1), scales);
        _mm512_storeu_ps(out + 4 * i, low);
        _mm512_storeu_ps(out + 4 * i + 64, high);
    }
    kFp8Scalar.decode_f32(codes + i, n - i, scale, out + 4 * i);
}

struct MagnitudeTable {
    __m512i quarters[4];
};

// A lookup takes six bits of each code, so the seventh chooses between two of them.
REAP_STREAM_AVX512 inline __m512i look_up(__m256i codes, const MagnitudeTable &table) {
    const __m512i words = _mm512_cvtepu8_epi16(codes);
    const __m512i lower
        = _mm512_permutex2var_epi16(table.quarters[0], words, table.quarters[1]);
    const __m512i upper
        = _mm512_permutex2var_epi16(table.quarters[2], words, table.quarters[3]);
    const __mmask32 is_upper = _mm512_test_epi16_mask(words, _mm512_set1_epi16(0x40));
    const __m512i magnitude = _mm512_mask_blend_epi16(is_upper, lower, upper);
    const __m512i sign_bit = _mm512_set1_epi16(static_cast<short>(0x8000));
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(words, 8), sign_bit);
    return _mm512_or_si512(magnitude, sign);
}

REAP_STREAM_AVX512 void lookup_bf16(const std::uint8_t *codes,
                                    std::size_t n,
                                    const std::uint16_t (&magnitudes)[128],
                                    std::uint8_t *out) {
    MagnitudeTable table;
    for (std::size_t i = 0; i < 4; ++i) {
        table.quarters[i] = _mm512_loadu_si512(magnitudes + 32 * i);
    }
    std::size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        _mm512_storeu_si512(out + 2 * i, look_up(load32(codes + i), table));
    }
    if (i < n) {
        const __mmask32 inside = mask32(i, n);
        const __m256i rest = _mm256_maskz_loadu_epi8(inside, codes + i);
        _mm512_mask_storeu_epi16(out + 2 * i, inside, look_up(rest, table));
    }
}

template <DType dtype>
REAP_STREAM_AVX512 inline __m512 load_values(const std::uint8_t *src, std::size_t i) {
    if constexpr (dtype == DType::bf16) {
        return _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(load32(src + 2 * i)), 16));
    } else {
        return _mm512_loadu_ps(src + 4 * i);
    }
}

// f32_to_e4m3 of numbers.hpp, the code in the low byte of each 32-bit lane.
REAP_STREAM_AVX512 inline __m512i rounded_to_e4m3(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i unclamped = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 is_nan = _mm512_cmpgt_epi32_mask(unclamped, _mm512_set1_epi32(0x7F800000));
    const __m512i max_bits = _mm512_castps_si512(_mm512_set1_ps(kE4m3Max));
    const __m512i magnitude = _mm512_min_epu32(unclamped, max_bits);

    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
    const __m512i shift = _mm512_set1_epi32(0x7FFFF - ((127 - 7) << 23));
    const __m512i normal
        = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(magnitude, shift), odd), 20);

    const __m512 rounder = _mm512_set1_ps(0x1p14F);
    const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(magnitude), rounder);
    const __mmask16 is_subnormal
        = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(121 << 23));

    __m512i code = _mm512_mask_sub_epi32(
        normal, is_subnormal, _mm512_castps_si512(sum), _mm512_castps_si512(rounder));
    code = _mm512_mask_blend_epi32(is_nan, code, _mm512_set1_epi32(0x7F));
    const __m512i sign = _mm512_slli_epi32(_mm512_srli_epi32(bits, 31), 7);
    return _mm512_or_si512(code, sign);
}

template <DType dtype>
REAP_STREAM_AVX512 void
encode(const std::uint8_t *src, std::size_t n, float scale, std::uint8_t *codes) {
    const __m512 scales = _mm512_set1_ps(scale);
    std::size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m512 quotients = _mm512_div_ps(load_values<dtype>(src, i), scales);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + i),
                         _mm512_cvtepi32_epi8(rounded_to_e4m3(quotients)));
    }
    if constexpr (dtype == DType::bf16) {
        kFp8Scalar.encode_bf16(src + 2 * i, n - i, scale, codes + i);
    } else {
        kFp8Scalar.encode_f32(src + 4 * i, n - i, scale, codes + i);
    }
}

REAP_STREAM_AVX512 std::uint32_t absmax_bf16(const std::uint8_t *src, std::size_t n) {
    const __m512i mask = _mm512_set1_epi16(0x7FFF);
    __m512i largest = _mm512_setzero_si512();
    std::size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(src + 2 * i), mask);
        largest = _mm512_max_epu16(largest, magnitude);
    }
    const __m512i odd = _mm512_and_si512(largest, _mm512_set1_epi32(0x7FFF0000));
    const __m512i even = _mm512_slli_epi32(largest, 16);
    return std::max(_mm512_reduce_max_epu32(_mm512_max_epu32(odd, even)),
                    kFp8Scalar.absmax_bf16(src + 2 * i, n - i));
}

REAP_STREAM_AVX512 std::uint32_t absmax_f32(const std::uint8_t *src, std::size_t n) {
    const __m512i mask = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i largest = _mm512_setzero_si512();
    std::size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(src + 4 * i), mask);
        largest = _mm512_max_epu32(largest, magnitude);
    }
    return std::max(_mm512_reduce_max_epu32(largest),
                    kFp8Scalar.absmax_f32(src + 4 * i, n - i));
}

} // namespace

const Fp8Kernels kFp8Avx512{
    decode_bf16, decode_f32, lookup_bf16, encode<DType::bf16>, encode<DType::f32>, absmax_bf16, absmax_f32};

} // namespace reap_stream

#endif
