// Arguments of the decoder of packed codes.
#include "arguments.hpp"
#include "bind.hpp"
#include "packed.hpp"

#include <optional>
#include <stdexcept>

namespace reap_stream {
namespace {

struct PackedArguments {
    py::object codes;
    std::string code_type;
    py::object scale;
    std::string scale_dtype;
    py::object scale_table;
    py::object zero;
    py::object out;
    std::string out_dtype;
};

struct PackedShapeArguments {
    py::object rows;
    py::object cols;
    py::object group;
    py::object row_nbytes;
};

constexpr std::size_t kByteValues = 256;

CodeType to_code_type(const std::string &text) {
    if (text == "e2m1") {
        return CodeType::e2m1;
    }
    if (text == "u4") {
        return CodeType::u4;
    }
    if (text == "u8") {
        return CodeType::u8;
    }
    throw std::invalid_argument("code_type is '" + text + "'; it can be one of e2m1, u4, u8");
}

PackedShape to_shape(const PackedShapeArguments &arguments, CodeType type) {
    PackedShape shape;
    shape.rows = to_count(arguments.rows, "rows");
    shape.cols = to_count(arguments.cols, "cols");
    shape.group = to_positive(arguments.group, "group");
    shape.row_nbytes = to_count(arguments.row_nbytes, "row_nbytes");
    // Four bytes are the widest element, of a matrix and of its scales alike.
    product(product(shape.rows, shape.cols, "rows * cols"), 4, "rows * cols * 4");
    product(shape.rows, shape.row_nbytes, "rows * row_nbytes");
    const std::size_t needed
        = code_bits(type) == 8 ? shape.cols : shape.cols / 2 + shape.cols % 2;
    if (shape.row_nbytes < needed) {
        throw std::invalid_argument("row_nbytes is " + std::to_string(shape.row_nbytes)
                                    + " where a row of " + std::to_string(shape.cols)
                                    + " codes needs " + std::to_string(needed));
    }
    if (code_bits(type) == 4 && shape.group % 2 != 0 && shape.groups() > 1) {
        throw std::invalid_argument("group is " + std::to_string(shape.group)
                                    + "; groups of 4-bit codes must begin at whole bytes");
    }
    return shape;
}

std::optional<Buffer> to_optional(const py::object &object, const std::string &name) {
    if (object.is_none()) {
        return std::nullopt;
    }
    return Buffer(object, name, Access::read);
}

PackedScales to_scales(const Buffer &scale,
                       const std::string &dtype,
                       const std::optional<Buffer> &table,
                       std::size_t length) {
    PackedScales scales;
    scales.data = scale.data();
    if ((dtype == "u8") != table.has_value()) {
        throw std::invalid_argument("scale_table goes with scale_dtype 'u8', not with '" + dtype
                                    + "', and 'u8' not without it");
    }
    if (table) {
        scales.table = table->array<float>(kByteValues);
    } else {
        scales.dtype = to_dtype(dtype, "scale_dtype", {DType::bf16, DType::f16, DType::f32});
    }
    scale.require_nbytes(length * scales.itemsize());
    return scales;
}

void decode(const PackedArguments &arguments,
            const PackedShapeArguments &shape_arguments,
            const Execution &execution) {
    PackedCodes packed;
    packed.type = to_code_type(arguments.code_type);
    const PackedShape shape = to_shape(shape_arguments, packed.type);
    const DType dtype = to_dtype(arguments.out_dtype, "out_dtype", {DType::bf16, DType::f32});
    const std::size_t num_scales = shape.rows * shape.groups();

    const Buffer codes(arguments.codes, "codes", Access::read);
    const Buffer scale(arguments.scale, "scale", Access::read);
    const std::optional<Buffer> table = to_optional(arguments.scale_table, "scale_table");
    const std::optional<Buffer> zero = to_optional(arguments.zero, "zero");
    const Buffer values(arguments.out, "out", Access::write);
    codes.require_nbytes(shape.rows * shape.row_nbytes);
    values.require_nbytes(shape.rows * shape.cols * itemsize(dtype));
    values.require_disjoint_from(codes);
    values.require_disjoint_from(scale);
    if (table) {
        values.require_disjoint_from(*table);
    }
    if (zero) {
        if (packed.type == CodeType::e2m1) {
            throw std::invalid_argument("zero goes with the integers u4 and u8, not with e2m1");
        }
        zero->require_nbytes(num_scales);
        values.require_disjoint_from(*zero);
        packed.zero = zero->data();
    }
    packed.codes = codes.data();
    packed.scales = to_scales(scale, arguments.scale_dtype, table, num_scales);
    const py::gil_scoped_release released;
    packed_decode(packed, values.writable(), dtype, shape, execution);
}

} // namespace

void bind_packed(py::module_ &module) {
    using py::arg;
    using Object = const py::object &;
    using Text = const std::string &;

    module.def(
        "packed_decode",
        [](Object codes, Text code_type, Object scale, Text scale_dtype, Object scale_table,
           Object zero, Object out, Object rows, Object cols, Object group, Object row_nbytes,
           Text out_dtype, Object threads, Text isa) {
            decode({codes, code_type, scale, scale_dtype, scale_table, zero, out, out_dtype},
                   {rows, cols, group, row_nbytes}, to_execution(threads, isa));
        },
        arg("codes"), arg("code_type"), arg("scale"), arg("scale_dtype"), arg("scale_table"),
        arg("zero"), arg("out"), arg("rows"), arg("cols"), arg("group"), arg("row_nbytes"),
        arg("out_dtype"), arg("threads") = 0, arg("isa") = "auto");
}

} // namespace reap_stream
