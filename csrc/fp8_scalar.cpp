#include "fp8_kernels.hpp"

#include <algorithm>
#include <array>

namespace reap_stream {
namespace {

std::array<float, 256> make_table() {
    std::array<float, 256> table{};
    for (std::size_t code = 0; code < table.size(); ++code) {
        table[code] = e4m3_to_f32(static_cast<std::uint8_t>(code));
    }
    return table;
}

const std::array<float, 256> kE4m3Values = make_table();

template <DType dtype>
void decode(const std::uint8_t *codes, std::size_t n, float scale, std::uint8_t *out) {
    for (std::size_t i = 0; i < n; ++i) {
        const float value = kE4m3Values[codes[i]] * scale;
        if constexpr (dtype == DType::bf16) {
            store(out + 2 * i, f32_to_bf16(value));
        } else {
            store(out + 4 * i, value);
        }
    }
}

void lookup(const std::uint8_t *codes,
            std::size_t n,
            const std::uint16_t (&magnitudes)[128],
            std::uint8_t *out) {
    for (std::size_t i = 0; i < n; ++i) {
        const unsigned sign = (codes[i] & 0x80U) << 8;
        store(out + 2 * i, static_cast<std::uint16_t>(magnitudes[codes[i] & 0x7FU] | sign));
    }
}

template <DType dtype>
void encode(const std::uint8_t *src, std::size_t n, float scale, std::uint8_t *codes) {
    for (std::size_t i = 0; i < n; ++i) {
        codes[i] = f32_to_e4m3(load_f32(src, dtype, i) / scale);
    }
}

template <DType dtype>
std::uint32_t absmax(const std::uint8_t *src, std::size_t n) {
    std::uint32_t largest = 0;
    for (std::size_t i = 0; i < n; ++i) {
        largest = std::max(largest, bits_of(load_f32(src, dtype, i)) & kF32AbsMask);
    }
    return largest;
}

} // namespace

const Fp8Kernels kFp8Scalar{decode<DType::bf16>,
                            decode<DType::f32>,
                            lookup,
                            encode<DType::bf16>,
                            encode<DType::f32>,
                            absmax<DType::bf16>,
                            absmax<DType::f32>};

} // namespace reap_stream
