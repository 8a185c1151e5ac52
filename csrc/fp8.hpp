// FP8 (E4M3FN) matrices with one float32 scale a block, to and from bf16 and f32.
//
//     cols                 The scale of element (r, c) is
//   +------+------+--+         scale[r / block_rows][c / block_cols],
//   | s00  | s01  |s |     blocks at the right and bottom edges being smaller.
//   +------+------+--+     One scale a channel: block (1, cols).
//   | s10  | s11  |s |     One scale a tensor:  block (rows, cols).
//   +------+------+--+
#pragma once

#include "cpu.hpp"
#include "numbers.hpp"

#include <cstddef>
#include <cstdint>

namespace reap_stream {

struct BlockShape {
    std::size_t rows = 0;
    std::size_t cols = 0;
    std::size_t block_rows = 1;
    std::size_t block_cols = 1;

    std::size_t grid_rows() const { return rows / block_rows + (rows % block_rows != 0 ? 1 : 0); }
    std::size_t grid_cols() const { return cols / block_cols + (cols % block_cols != 0 ? 1 : 0); }
};

struct Execution {
    unsigned threads = 0; // 0: as many as the hardware has
    Isa isa = Isa::scalar;
};

// out[r][c] = dtype(float32(codes[r][c]) * scale), rounded to nearest even; `scale` may be null.
void fp8_decode(const std::uint8_t *codes,
                const float *scale,
                std::uint8_t *out,
                DType out_dtype,
                const BlockShape &shape,
                const Execution &execution);

// codes[r][c] = E4M3(float32(src[r][c]) / scale), rounded to nearest even, saturating at +-448.
// Throws std::invalid_argument when a scale is not finite or not above zero.
void fp8_encode(const std::uint8_t *src,
                DType src_dtype,
                const float *scale,
                std::uint8_t *codes,
                const BlockShape &shape,
                const Execution &execution);

// out[i][j] = the largest absolute value in block (i, j); NaN when the block holds one.
void block_absmax(const std::uint8_t *src,
                  DType src_dtype,
                  float *out,
                  const BlockShape &shape,
                  const Execution &execution);

} // namespace reap_stream
