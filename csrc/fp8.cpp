#include "fp8.hpp"

#include "fp8_kernels.hpp"
#include "parallel.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

namespace reap_stream {
namespace {

// A thread costs tens of microseconds to start, about what a core needs for this many elements.
constexpr std::size_t kElementsPerPiece = std::size_t{1} << 18;

// To make a table takes as long as to decode 128 elements, which must be few among those it serves.
constexpr std::size_t kUsesOfTable = 1024;

std::size_t rows_per_piece(const BlockShape &shape) {
    return std::max<std::size_t>(kElementsPerPiece / std::max<std::size_t>(shape.cols, 1), 1);
}

// Calls run(row, first column, number of columns, index of the scale) for the runs of `row` that
// share a scale, from left to right.
template <typename Run>
void for_each_run(const BlockShape &shape, std::size_t row, const Run &run) {
    std::size_t scale_index = row / shape.block_rows * shape.grid_cols();
    for (std::size_t col = 0; col < shape.cols; ++scale_index) {
        const std::size_t n = std::min(shape.block_cols, shape.cols - col);
        run(row * shape.cols + col, n, scale_index);
        col += n;
    }
}

template <typename Run>
void parallel_runs(const BlockShape &shape, const Execution &execution, const Run &run) {
    const auto rows = [&](std::size_t begin, std::size_t end) {
        for (std::size_t row = begin; row < end; ++row) {
            for_each_run(shape, row, run);
        }
    };
    parallel_chunks(shape.rows, rows_per_piece(shape), execution.threads, rows);
}

void require_usable_scales(const float *scale, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        if (!std::isfinite(scale[i]) || scale[i] <= 0.0F) {
            throw std::invalid_argument("scale[" + std::to_string(i) + "] is "
                                        + std::to_string(scale[i])
                                        + "; to encode, it must be finite and above zero");
        }
    }
}

} // namespace

namespace {

struct Decoding {
    const std::uint8_t *codes;
    const float *scale; // may be null
    std::uint8_t *out;
    std::size_t out_itemsize;
    Fp8Kernels::Decode decode;
    Fp8Kernels::Lookup lookup; // null where `decode` is to do it all

    float factor(std::size_t index) const { return scale != nullptr ? scale[index] : 1.0F; }
};

// The tables of the scales of one row of blocks, for Fp8Kernels::Lookup.
class ScaleTables {
public:
    ScaleTables(const Decoding &decoding, std::size_t grid_cols)
        : decoding_(decoding), tables_(decoding.lookup != nullptr ? grid_cols : 0) {
        for (std::size_t code = 0; code < kMagnitudes; ++code) {
            codes_[code] = static_cast<std::uint8_t>(code);
        }
    }

    void fill(std::size_t first_scale) {
        for (std::size_t i = 0; i < tables_.size(); ++i) {
            const float factor = decoding_.factor(first_scale + i);
            tables_[i].usable = !std::isnan(factor) && !std::signbit(factor);
            decoding_.decode(codes_,
                             kMagnitudes,
                             factor,
                             reinterpret_cast<std::uint8_t *>(tables_[i].magnitudes));
        }
    }

    void decode(const std::uint8_t *codes,
                std::size_t n,
                std::size_t scale_index,
                std::size_t first_scale,
                std::uint8_t *out) const {
        const std::size_t i = scale_index - first_scale;
        if (i < tables_.size() && tables_[i].usable) {
            decoding_.lookup(codes, n, tables_[i].magnitudes, out);
        } else {
            decoding_.decode(codes, n, decoding_.factor(scale_index), out);
        }
    }

private:
    static constexpr std::size_t kMagnitudes = 128;
    struct Table {
        alignas(64) std::uint16_t magnitudes[kMagnitudes];
        bool usable = false;
    };
    const Decoding &decoding_;
    std::vector<Table> tables_;
    std::uint8_t codes_[kMagnitudes];
};

void decode_rows(const Decoding &decoding,
                 const BlockShape &shape,
                 std::size_t begin,
                 std::size_t end) {
    ScaleTables tables(decoding, shape.grid_cols());
    for (std::size_t row = begin; row < end; ++row) {
        const std::size_t first_scale = row / shape.block_rows * shape.grid_cols();
        if (row == begin || row % shape.block_rows == 0) {
            tables.fill(first_scale);
        }
        for_each_run(shape, row, [&](std::size_t at, std::size_t n, std::size_t scale_index) {
            std::uint8_t *to = decoding.out + at * decoding.out_itemsize;
            tables.decode(decoding.codes + at, n, scale_index, first_scale, to);
        });
    }
}

} // namespace

void fp8_decode(const std::uint8_t *codes,
                const float *scale,
                std::uint8_t *out,
                DType out_dtype,
                const BlockShape &shape,
                const Execution &execution) {
    const Fp8Kernels &kernels = fp8_kernels(execution.isa);
    Decoding decoding{codes, scale, out, itemsize(out_dtype), kernels.decode_f32, nullptr};
    if (out_dtype == DType::bf16) {
        decoding.decode = kernels.decode_bf16;
        const std::size_t uses = std::min(shape.block_rows, rows_per_piece(shape))
                                 * std::min(shape.block_cols, shape.cols);
        decoding.lookup = uses >= kUsesOfTable ? kernels.lookup_bf16 : nullptr;
    }
    const auto rows = [&](std::size_t begin, std::size_t end) {
        decode_rows(decoding, shape, begin, end);
    };
    parallel_chunks(shape.rows, rows_per_piece(shape), execution.threads, rows);
}

void fp8_encode(const std::uint8_t *src,
                DType src_dtype,
                const float *scale,
                std::uint8_t *codes,
                const BlockShape &shape,
                const Execution &execution) {
    if (scale != nullptr) {
        require_usable_scales(scale, shape.grid_rows() * shape.grid_cols());
    }
    const Fp8Kernels &kernels = fp8_kernels(execution.isa);
    const auto encode = src_dtype == DType::bf16 ? kernels.encode_bf16 : kernels.encode_f32;
    const std::size_t src_itemsize = itemsize(src_dtype);
    parallel_runs(shape, execution, [&](std::size_t at, std::size_t n, std::size_t scale_index) {
        encode(src + at * src_itemsize, n, scale != nullptr ? scale[scale_index] : 1.0F, codes + at);
    });
}

void block_absmax(const std::uint8_t *src,
                  DType src_dtype,
                  float *out,
                  const BlockShape &shape,
                  const Execution &execution) {
    const Fp8Kernels &kernels = fp8_kernels(execution.isa);
    const auto absmax = src_dtype == DType::bf16 ? kernels.absmax_bf16 : kernels.absmax_f32;
    const std::size_t src_itemsize = itemsize(src_dtype);
    const std::size_t grid_cols = shape.grid_cols();
    std::vector<std::uint32_t> largest(shape.grid_rows() * grid_cols, 0);
    std::mutex mutex;

    // Threads meet inside a block when it is higher than a piece (a whole tensor is one block), so
    // each gathers its own grid and merges it once. A maximum does not care for the order.
    const auto rows = [&](std::size_t begin, std::size_t end) {
        const std::size_t first = begin / shape.block_rows * grid_cols;
        const std::size_t last = ((end - 1) / shape.block_rows + 1) * grid_cols;
        std::vector<std::uint32_t> own(last - first, 0);
        for (std::size_t row = begin; row < end; ++row) {
            for_each_run(shape, row, [&](std::size_t at, std::size_t n, std::size_t block) {
                std::uint32_t &bits = own[block - first];
                bits = std::max(bits, absmax(src + at * src_itemsize, n));
            });
        }
        const std::lock_guard<std::mutex> lock(mutex);
        for (std::size_t i = 0; i < own.size(); ++i) {
            largest[first + i] = std::max(largest[first + i], own[i]);
        }
    };
    parallel_chunks(shape.rows, rows_per_piece(shape), execution.threads, rows);
    std::transform(largest.begin(), largest.end(), out, float_of);
}

} // namespace reap_stream
