// Matrices of integer codes that do not lie row after row: GPTQ's, AWQ's, and signed bytes.
//
//     rows x cols is the weight [N, K].      GPTQ:  word [K/p, N], p = 32/bits codes of one row
//                                            AWQ:   word [K, N/8], 8 codes of one column, in the
//     n ->                                          order 0 2 4 6 1 3 5 7 of the rows
//   k +--+--+--+--+                          int8:  byte [N, K], two's complement
//   | |w |w |w |w |   GPTQ: a word goes p down,
//   v +--+--+--+--+   AWQ: eight across      scale [K/g, N] of words, [N, K/g] of bytes
//
// A block of rows at a time is rearranged in cache and decoded as rows of packed.hpp.
#pragma once

#include "cpu.hpp"
#include "numbers.hpp"
#include "packed.hpp"

#include <cstddef>
#include <cstdint>

namespace reap_stream {

enum class CodeLayout { gptq, awq, int8 };

struct RearrangedCodes {
    CodeLayout layout = CodeLayout::gptq;
    std::size_t bits = 4; // 8 too, of gptq; always 8 of int8
    const std::uint8_t *codes = nullptr;
    const std::uint8_t *scale = nullptr;
    DType scale_dtype = DType::f32;
    // Packed as the codes are, but along the other dimension: words [K/g, N/p]; bytes [N, K/g].
    // Null: the middle of the codes.
    const std::uint8_t *zero = nullptr;
    // Added to every zero point, the word being one number. Not of int8.
    std::uint32_t zero_offset = 0;
    const std::int32_t *group_of = nullptr; // [K]; null: k / group
};

// out[n][k] = dtype((code - zero) * scale): the difference is exact, the product is taken in float32
// and rounded to nearest even. Words need rows that are a multiple of 32 / bits, and columns too.
void rearranged_decode(const RearrangedCodes &stored,
                       std::uint8_t *out,
                       DType out_dtype,
                       const PackedShape &shape,
                       const Execution &execution);

} // namespace reap_stream
