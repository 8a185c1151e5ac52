// The inner loops of fp8.cpp: one run of neighbouring elements under one scale, for each Isa.
#pragma once

#include "cpu.hpp"
#include "numbers.hpp"

#include <cstddef>
#include <cstdint>

namespace reap_stream {

struct Fp8Kernels {
    using Decode = void (*)(const std::uint8_t *codes, std::size_t n, float scale, std::uint8_t *out);
    // bf16 from a table of the 128 magnitudes under one scale, whose sign bit is clear; faster than
    // arithmetic where the table is used often. Null where it is not.
    using Lookup = void (*)(const std::uint8_t *codes,
                            std::size_t n,
                            const std::uint16_t (&magnitudes)[128],
                            std::uint8_t *out);
    using Encode = void (*)(const std::uint8_t *src, std::size_t n, float scale, std::uint8_t *codes);
    // The bits of the largest absolute value as float32. Bits of non-negative floats order as
    // integers do, with NaN above infinity, so a NaN is never lost.
    using AbsMax = std::uint32_t (*)(const std::uint8_t *src, std::size_t n);

    Decode decode_bf16;
    Decode decode_f32;
    Lookup lookup_bf16;
    Encode encode_bf16;
    Encode encode_f32;
    AbsMax absmax_bf16;
    AbsMax absmax_f32;
};

extern const Fp8Kernels kFp8Scalar;
#ifdef REAP_STREAM_X86
extern const Fp8Kernels kFp8Avx2;
extern const Fp8Kernels kFp8Avx512;
#endif

inline const Fp8Kernels &fp8_kernels(Isa isa) {
#ifdef REAP_STREAM_X86
    if (isa == Isa::avx512) {
        return kFp8Avx512;
    }
    if (isa == Isa::avx2) {
        return kFp8Avx2;
    }
#endif
    static_cast<void>(isa);
    return kFp8Scalar;
}

} // namespace reap_stream
