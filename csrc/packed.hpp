// Matrices of 4-bit and 8-bit codes packed along their rows, one scale and zero point a group.
//
//     row r   | group 0 | group 1 | group 2 | .. padding |      of `group` neighbours each, the
//                                                               last one perhaps fewer
//     value[r][c] = dtype((number(code[r][c]) - zero[r][c / group]) * scale[r][c / group])
//
// Of two codes in a byte the low half comes first; read in little-endian order, eight codes in a
// 32-bit word lie the same way.
#pragma once

#include "cpu.hpp"
#include "fp8.hpp"
#include "numbers.hpp"

#include <cstddef>
#include <cstdint>

namespace reap_stream {

// e2m1: the 4-bit floats of MXFP4 and NVFP4. u4, u8: integers as they are, zero points apart.
enum class CodeType { e2m1, u4, u8 };

constexpr std::size_t code_bits(CodeType type) { return type == CodeType::u8 ? 8 : 4; }

struct PackedShape {
    std::size_t rows = 0;
    std::size_t cols = 0;
    std::size_t group = 1;
    std::size_t row_nbytes = 0; // from one row of codes to the next

    std::size_t groups() const { return cols / group + (cols % group != 0 ? 1 : 0); }
};

// Scales [rows, groups]: numbers of `dtype`, or bytes that `table` gives a meaning.
struct PackedScales {
    const std::uint8_t *data = nullptr;
    DType dtype = DType::f32;
    const float *table = nullptr;

    std::size_t itemsize() const { return table != nullptr ? 1 : reap_stream::itemsize(dtype); }
};

struct PackedCodes {
    const std::uint8_t *codes = nullptr;
    CodeType type = CodeType::u4;
    PackedScales scales;
    const std::uint8_t *zero = nullptr; // [rows, groups]; null: the middle of the integers
};

// The difference is exact and the product is taken in float32, rounded to nearest even.
void packed_decode(const PackedCodes &packed,
                   std::uint8_t *out,
                   DType out_dtype,
                   const PackedShape &shape,
                   const Execution &execution);

} // namespace reap_stream
