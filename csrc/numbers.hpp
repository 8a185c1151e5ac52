// The number formats the kernels meet, one value at a time: the meaning that every SIMD path copies.
//
//     E4M3FN   s eeee mmm            bias 7, no infinities, s1111111 is NaN, largest 448
//     f16      s eeeee mmmmmmmmmm    bias 15
//     bf16     the upper half of f32
//
// Bytes are loaded and stored with memcpy, so that a tensor may start anywhere in a layer's buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace reap_stream {

enum class DType { bf16, f16, f32 };

constexpr std::size_t itemsize(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The one bf16 that every NaN becomes in torch on processors with AVX2.
constexpr std::uint16_t kBf16NaN = 0xFFFF;
constexpr std::uint32_t kF32AbsMask = 0x7FFFFFFF;
constexpr std::uint32_t kF32Infinity = 0x7F800000;
constexpr float kE4m3Max = 448.0F;

template <typename T>
inline T load(const std::uint8_t *bytes) {
    T value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
}

template <typename T>
inline void store(std::uint8_t *bytes, T value) {
    std::memcpy(bytes, &value, sizeof value);
}

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float value = 0.0F;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float bf16_to_f32(std::uint16_t bf16) { return float_of(std::uint32_t{bf16} << 16); }

// Round to nearest even, by adding just under half a unit, and half when the kept part is odd.
inline std::uint16_t f32_to_bf16(float value) {
    const std::uint32_t bits = bits_of(value);
    if ((bits & kF32AbsMask) > kF32Infinity) {
        return kBf16NaN;
    }
    return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

// Exponent and mantissa move to their place in f32 and a multiplication mends the bias, which also
// turns f16's subnormal numbers into normal ones.
inline float f16_to_f32(std::uint16_t f16) {
    const std::uint32_t sign = (f16 & 0x8000U) << 16;
    const std::uint32_t magnitude = f16 & 0x7FFFU;
    if (magnitude >= 0x7C00U) {
        return float_of(sign | kF32Infinity | ((magnitude & 0x3FFU) << 13));
    }
    constexpr float kBiasDifference = 0x1p112F;
    return float_of(sign | bits_of(float_of(magnitude << 13) * kBiasDifference));
}

// An E4M3 number read as f16 is 2^-8 of itself, subnormal numbers included; only NaN differs.
inline float e4m3_to_f32(std::uint8_t code) {
    const std::uint32_t sign = (code & 0x80U) << 24;
    const std::uint32_t magnitude = code & 0x7FU;
    if (magnitude == 0x7FU) {
        return float_of(sign | 0x7FF00000U);
    }
    const auto f16 = static_cast<std::uint16_t>(magnitude << 7);
    return float_of(sign | bits_of(f16_to_f32(f16) * 256.0F));
}

// Saturates at +-448, rounds to nearest even, and keeps NaN a NaN of the same sign.
inline std::uint8_t f32_to_e4m3(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t sign = (bits >> 24) & 0x80U;
    const std::uint32_t magnitude = bits & kF32AbsMask;
    if (magnitude > kF32Infinity) {
        return static_cast<std::uint8_t>(sign | 0x7FU);
    }
    if (magnitude >= bits_of(kE4m3Max)) {
        return static_cast<std::uint8_t>(sign | 0x7EU);
    }
    constexpr std::uint32_t kSmallestNormal = 121U << 23; // 2^-6
    if (magnitude < kSmallestNormal) {
        // The unit in the last place of 2^14 is 2^-9, E4M3's subnormal step: the addition rounds.
        constexpr float kRounder = 0x1p14F;
        const float rounded = float_of(magnitude) + kRounder;
        return static_cast<std::uint8_t>(sign | (bits_of(rounded) - bits_of(kRounder)));
    }
    constexpr std::uint32_t kRebias = (127U - 7U) << 23;
    const std::uint32_t odd = (magnitude >> 20) & 1U;
    return static_cast<std::uint8_t>(sign | ((magnitude - kRebias + 0x7FFFFU + odd) >> 20));
}

// Element `i` of a row of `dtype`, exactly.
inline float load_f32(const std::uint8_t *row, DType dtype, std::size_t i) {
    switch (dtype) {
        case DType::bf16:
            return bf16_to_f32(load<std::uint16_t>(row + 2 * i));
        case DType::f16:
            return f16_to_f32(load<std::uint16_t>(row + 2 * i));
        case DType::f32:
            break;
    }
    return load<float>(row + 4 * i);
}

} // namespace reap_stream
