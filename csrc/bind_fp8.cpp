// Arguments of the FP8 kernels.
#include "arguments.hpp"
#include "bind.hpp"

#include <optional>

namespace reap_stream {
namespace {

struct BlockArguments {
    py::object rows;
    py::object cols;
    py::object block_rows;
    py::object block_cols;
};

BlockShape to_shape(const BlockArguments &arguments) {
    BlockShape shape;
    shape.rows = to_count(arguments.rows, "rows");
    shape.cols = to_count(arguments.cols, "cols");
    shape.block_rows = to_positive(arguments.block_rows, "block_rows");
    shape.block_cols = to_positive(arguments.block_cols, "block_cols");
    // Four bytes are the widest element, of a matrix and of its grid of scales alike.
    product(product(shape.rows, shape.cols, "rows * cols"), 4, "rows * cols * 4");
    product(product(shape.grid_rows(), shape.grid_cols(), "blocks"), 4, "blocks * 4");
    return shape;
}

std::optional<Buffer> to_scale(const py::object &scale) {
    if (scale.is_none()) {
        return std::nullopt;
    }
    return Buffer(scale, "scale", Access::read);
}

const float *scale_array(const std::optional<Buffer> &scale, const BlockShape &shape) {
    return scale ? scale->array<float>(shape.grid_rows() * shape.grid_cols()) : nullptr;
}

void decode(const py::object &src,
            const py::object &scale,
            const py::object &out,
            const BlockArguments &blocks,
            const std::string &out_dtype,
            const Execution &execution) {
    const BlockShape shape = to_shape(blocks);
    const DType dtype = to_dtype(out_dtype, "out_dtype", {DType::bf16, DType::f32});
    const Buffer codes(src, "src", Access::read);
    const Buffer values(out, "out", Access::write);
    const std::optional<Buffer> scales = to_scale(scale);
    codes.require_nbytes(shape.rows * shape.cols);
    values.require_nbytes(shape.rows * shape.cols * itemsize(dtype));
    values.require_disjoint_from(codes);
    const float *scale_values = scale_array(scales, shape);
    if (scales) {
        values.require_disjoint_from(*scales);
    }
    const py::gil_scoped_release released;
    fp8_decode(codes.data(), scale_values, values.writable(), dtype, shape, execution);
}

void encode(const py::object &src,
            const std::string &src_dtype,
            const py::object &scale,
            const py::object &out,
            const BlockArguments &blocks,
            const Execution &execution) {
    const BlockShape shape = to_shape(blocks);
    const DType dtype = to_dtype(src_dtype, "src_dtype", {DType::bf16, DType::f32});
    const Buffer values(src, "src", Access::read);
    const Buffer codes(out, "out", Access::write);
    const std::optional<Buffer> scales = to_scale(scale);
    values.require_nbytes(shape.rows * shape.cols * itemsize(dtype));
    codes.require_nbytes(shape.rows * shape.cols);
    codes.require_disjoint_from(values);
    const float *scale_values = scale_array(scales, shape);
    if (scales) {
        codes.require_disjoint_from(*scales);
    }
    const py::gil_scoped_release released;
    fp8_encode(values.data(), dtype, scale_values, codes.writable(), shape, execution);
}

void absmax(const py::object &src,
            const std::string &src_dtype,
            const py::object &out,
            const BlockArguments &blocks,
            const Execution &execution) {
    const BlockShape shape = to_shape(blocks);
    const DType dtype = to_dtype(src_dtype, "src_dtype", {DType::bf16, DType::f32});
    const Buffer values(src, "src", Access::read);
    const Buffer largest(out, "out", Access::write);
    values.require_nbytes(shape.rows * shape.cols * itemsize(dtype));
    float *largest_values = largest.array<float>(shape.grid_rows() * shape.grid_cols());
    largest.require_disjoint_from(values);
    const py::gil_scoped_release released;
    block_absmax(values.data(), dtype, largest_values, shape, execution);
}

} // namespace

void bind_fp8(py::module_ &module) {
    using py::arg;
    using Object = const py::object &;
    using Text = const std::string &;

    module.def(
        "fp8_decode",
        [](Object src, Object scale, Object out, Object rows, Object cols, Object block_rows,
           Object block_cols, Text out_dtype, Object threads, Text isa) {
            decode(src, scale, out, {rows, cols, block_rows, block_cols}, out_dtype,
                   to_execution(threads, isa));
        },
        arg("src"), arg("scale"), arg("out"), arg("rows"), arg("cols"), arg("block_rows"),
        arg("block_cols"), arg("out_dtype"), arg("threads") = 0, arg("isa") = "auto");

    module.def(
        "fp8_encode",
        [](Object src, Text src_dtype, Object scale, Object out, Object rows, Object cols,
           Object block_rows, Object block_cols, Object threads, Text isa) {
            encode(src, src_dtype, scale, out, {rows, cols, block_rows, block_cols},
                   to_execution(threads, isa));
        },
        arg("src"), arg("src_dtype"), arg("scale"), arg("out"), arg("rows"), arg("cols"),
        arg("block_rows"), arg("block_cols"), arg("threads") = 0, arg("isa") = "auto");

    module.def(
        "block_absmax",
        [](Object src, Text src_dtype, Object out, Object rows, Object cols, Object block_rows,
           Object block_cols, Object threads, Text isa) {
            absmax(src, src_dtype, out, {rows, cols, block_rows, block_cols},
                   to_execution(threads, isa));
        },
        arg("src"), arg("src_dtype"), arg("out"), arg("rows"), arg("cols"), arg("block_rows"),
        arg("block_cols"), arg("threads") = 0, arg("isa") = "auto");
}

} // namespace reap_stream
