#include "packed_kernels.hpp"

#include "numbers.hpp"

namespace reap_stream {
namespace {

template <DType dtype>
inline void store_value(std::uint8_t *out, std::size_t i, float value) {
    if constexpr (dtype == DType::bf16) {
        store(out + 2 * i, f32_to_bf16(value));
    } else {
        store(out + 4 * i, value);
    }
}

// Sixteen codes share a scale with all their group, so each of them is multiplied once.
template <DType dtype>
void nibbles(const PackedRow &row) {
    for_each_group(row, [&](std::size_t col, std::size_t n, std::size_t group) {
        float values[kNibbles];
        for (std::size_t code = 0; code < kNibbles; ++code) {
            values[code] = (row.numbers[code] - row.zero[group]) * row.scale[group];
        }
        for (std::size_t i = col; i < col + n; ++i) {
            const unsigned byte = row.codes[i / 2];
            store_value<dtype>(row.out, i, values[i % 2 == 0 ? byte & 0xFU : byte >> 4]);
        }
    });
}

template <DType dtype>
void bytes(const PackedRow &row) {
    for_each_group(row, [&](std::size_t col, std::size_t n, std::size_t group) {
        for (std::size_t i = col; i < col + n; ++i) {
            const float number = static_cast<float>(row.codes[i]) - row.zero[group];
            store_value<dtype>(row.out, i, number * row.scale[group]);
        }
    });
}

} // namespace

const PackedKernels kPackedScalar{
    nibbles<DType::bf16>, nibbles<DType::f32>, bytes<DType::bf16>, bytes<DType::f32>};

} // namespace reap_stream
