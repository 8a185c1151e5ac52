// Arguments of the decoder of codes that do not lie row after row.
#include "arguments.hpp"
#include "bind.hpp"
#include "rearranged.hpp"

#include <optional>
#include <stdexcept>

namespace reap_stream {
namespace {

struct CodeArguments {
    py::object codes;
    std::string layout;
    py::object bits;
    py::object scale;
    std::string scale_dtype;
    py::object zero;
    py::object zero_offset;
    py::object group_of;
};

struct OutArguments {
    py::object out;
    py::object rows;
    py::object cols;
    py::object group;
    std::string out_dtype;
};

constexpr std::size_t kWordBits = 32;

CodeLayout to_layout(const std::string &text) {
    if (text == "gptq") {
        return CodeLayout::gptq;
    }
    if (text == "awq") {
        return CodeLayout::awq;
    }
    if (text == "int8") {
        return CodeLayout::int8;
    }
    throw std::invalid_argument("layout is '" + text + "'; it can be one of gptq, awq, int8");
}

std::size_t to_bits(py::handle number, CodeLayout layout) {
    const std::size_t bits = to_count(number, "bits");
    const bool fits = layout == CodeLayout::awq    ? bits == 4
                      : layout == CodeLayout::int8 ? bits == 8
                                                   : bits == 4 || bits == 8;
    if (!fits) {
        throw std::invalid_argument("bits is " + std::to_string(bits)
                                    + "; it is 4 of awq, 8 of int8, and 4 or 8 of gptq");
    }
    return bits;
}

void require_multiple(std::size_t value, std::size_t of, const char *name) {
    if (value % of != 0) {
        throw std::invalid_argument(std::string(name) + " is " + std::to_string(value)
                                    + ", no multiple of the " + std::to_string(of)
                                    + " codes in a word");
    }
}

PackedShape to_shape(const OutArguments &arguments, const RearrangedCodes &stored) {
    PackedShape shape;
    shape.rows = to_count(arguments.rows, "rows");
    shape.cols = to_count(arguments.cols, "cols");
    shape.group = to_positive(arguments.group, "group");
    // Four bytes are the widest element, of a matrix and of its scales alike.
    product(product(shape.rows, shape.cols, "rows * cols"), 4, "rows * cols * 4");
    product(product(shape.rows, shape.groups(), "scales"), 4, "scales * 4");
    if (stored.layout != CodeLayout::int8) {
        require_multiple(shape.rows, kWordBits / stored.bits, "rows");
        require_multiple(shape.cols, kWordBits / stored.bits, "cols");
    }
    if (stored.bits == 4 && shape.group % 2 != 0 && shape.groups() > 1) {
        throw std::invalid_argument("group is " + std::to_string(shape.group)
                                    + "; groups of 4-bit codes must begin at whole bytes");
    }
    shape.row_nbytes = shape.cols * stored.bits / 8;
    return shape;
}

std::optional<Buffer> to_optional(const py::object &object, const std::string &name) {
    if (object.is_none()) {
        return std::nullopt;
    }
    return Buffer(object, name, Access::read);
}

const std::int32_t *to_groups(const Buffer &buffer, const PackedShape &shape) {
    const auto *group_of = buffer.array<std::int32_t>(shape.cols);
    for (std::size_t k = 0; k < shape.cols; ++k) {
        if (group_of[k] < 0 || static_cast<std::size_t>(group_of[k]) >= shape.groups()) {
            throw std::invalid_argument("group_of[" + std::to_string(k) + "] is "
                                        + std::to_string(group_of[k]) + "; there are "
                                        + std::to_string(shape.groups()) + " groups");
        }
    }
    return group_of;
}

void decode(const CodeArguments &arguments,
            const OutArguments &out_arguments,
            const Execution &execution) {
    RearrangedCodes stored;
    stored.layout = to_layout(arguments.layout);
    stored.bits = to_bits(arguments.bits, stored.layout);
    stored.scale_dtype
        = to_dtype(arguments.scale_dtype, "scale_dtype", {DType::bf16, DType::f16, DType::f32});
    const std::size_t offset = to_count(arguments.zero_offset, "zero_offset");
    if (offset > 1) {
        throw std::invalid_argument("zero_offset is " + std::to_string(offset)
                                    + "; it can be 0 or 1");
    }
    stored.zero_offset = static_cast<std::uint32_t>(offset);
    const PackedShape shape = to_shape(out_arguments, stored);
    const DType dtype = to_dtype(out_arguments.out_dtype, "out_dtype", {DType::bf16, DType::f32});

    const Buffer codes(arguments.codes, "codes", Access::read);
    const Buffer scale(arguments.scale, "scale", Access::read);
    const std::optional<Buffer> zero = to_optional(arguments.zero, "zero");
    const std::optional<Buffer> group_of = to_optional(arguments.group_of, "group_of");
    const Buffer values(out_arguments.out, "out", Access::write);
    codes.require_nbytes(shape.rows * shape.row_nbytes);
    scale.require_nbytes(shape.rows * shape.groups() * itemsize(stored.scale_dtype));
    values.require_nbytes(shape.rows * shape.cols * itemsize(dtype));
    values.require_disjoint_from(codes);
    values.require_disjoint_from(scale);
    if (zero) {
        zero->require_nbytes(shape.rows * shape.groups() * stored.bits / 8);
        values.require_disjoint_from(*zero);
        stored.zero = zero->data();
    }
    if (group_of) {
        values.require_disjoint_from(*group_of);
        stored.group_of = to_groups(*group_of, shape);
    }
    stored.codes = codes.data();
    stored.scale = scale.data();
    const py::gil_scoped_release released;
    rearranged_decode(stored, values.writable(), dtype, shape, execution);
}

} // namespace

void bind_rearranged(py::module_ &module) {
    using py::arg;
    using Object = const py::object &;
    using Text = const std::string &;

    module.def(
        "rearranged_decode",
        [](Object codes, Text layout, Object bits, Object scale, Text scale_dtype, Object zero,
           Object zero_offset, Object group_of, Object out, Object rows, Object cols, Object group,
           Text out_dtype, Object threads, Text isa) {
            decode({codes, layout, bits, scale, scale_dtype, zero, zero_offset, group_of},
                   {out, rows, cols, group, out_dtype}, to_execution(threads, isa));
        },
        arg("codes"), arg("layout"), arg("bits"), arg("scale"), arg("scale_dtype"), arg("zero"),
        arg("zero_offset"), arg("group_of"), arg("out"), arg("rows"), arg("cols"), arg("group"),
        arg("out_dtype"), arg("threads") = 0, arg("isa") = "auto");
}

} // namespace reap_stream
