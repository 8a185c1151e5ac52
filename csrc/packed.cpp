#include "packed.hpp"

#include "packed_kernels.hpp"
#include "parallel.hpp"

#include <algorithm>
#include <vector>

namespace reap_stream {
namespace {

// A thread costs tens of microseconds to start, about what a core needs for this many elements.
constexpr std::size_t kElementsPerPiece = std::size_t{1} << 18;

constexpr float kE2m1[kNibbles]
    = {0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F,
       -0.0F, -0.5F, -1.0F, -1.5F, -2.0F, -3.0F, -4.0F, -6.0F};
constexpr float kIntegers[kNibbles]
    = {0.0F, 1.0F, 2.0F, 3.0F, 4.0F, 5.0F, 6.0F, 7.0F,
       8.0F, 9.0F, 10.0F, 11.0F, 12.0F, 13.0F, 14.0F, 15.0F};

float middle(CodeType type) {
    switch (type) {
        case CodeType::u4:
            return 8.0F;
        case CodeType::u8:
            return 128.0F;
        case CodeType::e2m1:
            break;
    }
    return 0.0F;
}

PackedKernels::Decode choose(const PackedKernels &kernels, CodeType type, DType out_dtype) {
    if (type == CodeType::u8) {
        return out_dtype == DType::bf16 ? kernels.bytes_bf16 : kernels.bytes_f32;
    }
    return out_dtype == DType::bf16 ? kernels.nibbles_bf16 : kernels.nibbles_f32;
}

// The scales and zero points of one row, as float32.
class RowFactors {
public:
    RowFactors(const PackedCodes &packed, std::size_t groups)
        : packed_(packed), scale_(groups), zero_(groups, middle(packed.type)) {}

    void load(std::size_t row) {
        const std::size_t first = row * scale_.size();
        const PackedScales &scales = packed_.scales;
        const std::uint8_t *from = scales.data + first * scales.itemsize();
        for (std::size_t i = 0; i < scale_.size(); ++i) {
            scale_[i] = scales.table != nullptr ? scales.table[from[i]]
                                                : load_f32(from, scales.dtype, i);
        }
        if (packed_.zero != nullptr) {
            const std::uint8_t *zero = packed_.zero + first;
            std::transform(zero, zero + zero_.size(), zero_.begin(), [](std::uint8_t value) {
                return static_cast<float>(value);
            });
        }
    }
    const float *scale() const { return scale_.data(); }
    const float *zero() const { return zero_.data(); }

private:
    const PackedCodes &packed_;
    std::vector<float> scale_;
    std::vector<float> zero_;
};

} // namespace

void packed_decode(const PackedCodes &packed,
                   std::uint8_t *out,
                   DType out_dtype,
                   const PackedShape &shape,
                   const Execution &execution) {
    const PackedKernels::Decode decode
        = choose(packed_kernels(execution.isa), packed.type, out_dtype);
    const float *numbers = packed.type == CodeType::e2m1 ? kE2m1 : kIntegers;
    const std::size_t out_row_nbytes = shape.cols * itemsize(out_dtype);
    const auto rows = [&](std::size_t begin, std::size_t end) {
        RowFactors factors(packed, shape.groups());
        for (std::size_t row = begin; row < end; ++row) {
            factors.load(row);
            decode({packed.codes + row * shape.row_nbytes,
                    shape.cols,
                    shape.group,
                    factors.scale(),
                    factors.zero(),
                    numbers,
                    out + row * out_row_nbytes});
        }
    };
    const std::size_t grain = kElementsPerPiece / std::max<std::size_t>(shape.cols, 1);
    parallel_chunks(shape.rows, grain, execution.threads, rows);
}

} // namespace reap_stream
