// f32_to_bf16 of numbers.hpp for whole registers.
#pragma once

#include "cpu.hpp"
#include "numbers.hpp"

#ifdef REAP_STREAM_X86

#    include <immintrin.h>

namespace reap_stream {

namespace avx2 {

// bf16 in the low half of each 32-bit lane.
REAP_STREAM_AVX2 inline __m256i rounded_to_bf16(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(kBf16NaN), is_nan);
}

} // namespace avx2

namespace avx512 {

// bf16 in the high half of each 32-bit lane. (vcvtneps2bf16 would flush subnormal numbers to zero.)
REAP_STREAM_AVX512 inline __m512i rounded_to_bf16(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_mask_blend_epi32(is_nan, _mm512_add_epi32(bits, half), _mm512_set1_epi32(-1));
}

} // namespace avx512

} // namespace reap_stream

#endif
