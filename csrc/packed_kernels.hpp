// The inner loops of packed.cpp: one row of codes, for each Isa.
#pragma once

#include "cpu.hpp"

#include <cstddef>
#include <cstdint>

namespace reap_stream {

constexpr std::size_t kNibbles = 16;

struct PackedRow {
    const std::uint8_t *codes;
    std::size_t cols;
    std::size_t group; // of 4-bit codes even, unless it is all of the row
    const float *scale; // one a group
    const float *zero;  // one a group
    const float *numbers; // what each of the 16 codes of 4 bits stands for; unused for bytes
    std::uint8_t *out;
};

struct PackedKernels {
    using Decode = void (*)(const PackedRow &row);

    Decode nibbles_bf16;
    Decode nibbles_f32;
    Decode bytes_bf16;
    Decode bytes_f32;
};

extern const PackedKernels kPackedScalar;
#ifdef REAP_STREAM_X86
extern const PackedKernels kPackedAvx2;
extern const PackedKernels kPackedAvx512;
#endif

inline const PackedKernels &packed_kernels(Isa isa) {
#ifdef REAP_STREAM_X86
    if (isa == Isa::avx512) {
        return kPackedAvx512;
    }
    if (isa == Isa::avx2) {
        return kPackedAvx2;
    }
#endif
    static_cast<void>(isa);
    return kPackedScalar;
}

// Calls run(first column, number of columns, index of the group) for the groups of a row.
template <typename Run>
void for_each_group(const PackedRow &row, const Run &run) {
    std::size_t group = 0;
    for (std::size_t col = 0; col < row.cols; ++group) {
        const std::size_t left = row.cols - col;
        const std::size_t n = row.group < left ? row.group : left;
        run(col, n, group);
        col += n;
    }
}

} // namespace reap_stream
