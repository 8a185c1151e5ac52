// Arguments of the kernels that run on the experts' outputs: saliency and combine.
#include "arguments.hpp"
#include "bind.hpp"
#include "combine.hpp"
#include "saliency.hpp"

namespace reap_stream {
namespace {

// The rows and gate weights that both kernels take, with the buffers that hold them.
struct GatedArguments {
    Buffer rows;
    Buffer gates;
    GatedRows gated;
};

GatedArguments to_gated(const py::object &rows,
                        const std::string &dtype,
                        const py::object &gates,
                        const py::object &dim) {
    GatedArguments arguments{
        Buffer(rows, "rows", Access::read), Buffer(gates, "gates", Access::read), {}};
    GatedRows &gated = arguments.gated;
    gated.dtype = to_dtype(dtype, "dtype", {DType::bf16, DType::f16, DType::f32});
    gated.dim = to_positive(dim, "dim");
    gated.n = arguments.gates.length<float>();
    gated.gates = arguments.gates.array<float>(gated.n);
    gated.rows = arguments.rows.data();
    const std::size_t row_nbytes = product(gated.dim, itemsize(gated.dtype), "bytes of a row");
    arguments.rows.require_nbytes(product(gated.n, row_nbytes, "bytes of all rows"));
    return arguments;
}

struct SumArguments {
    py::object tokens;
    py::object gate_sum;
    py::object norm_sum;
    py::object gate_norm_sum;
    py::object norm_max;
    py::object output_max;
};

std::size_t saliency(const GatedArguments &arguments,
                     const py::object &sources_object,
                     const SumArguments &sum_arguments,
                     const Execution &execution) {
    const Buffer sources(sources_object, "sources", Access::read);
    const Buffer buffers[] = {Buffer(sum_arguments.tokens, "tokens", Access::write),
                              Buffer(sum_arguments.gate_sum, "gate_sum", Access::write),
                              Buffer(sum_arguments.norm_sum, "norm_sum", Access::write),
                              Buffer(sum_arguments.gate_norm_sum, "gate_norm_sum", Access::write),
                              Buffer(sum_arguments.norm_max, "norm_max", Access::write),
                              Buffer(sum_arguments.output_max, "output_max", Access::write)};
    for (const Buffer &buffer : buffers) {
        for (const Buffer *input : {&arguments.rows, &arguments.gates, &sources}) {
            buffer.require_disjoint_from(*input);
        }
        for (const Buffer *other = buffers; other != &buffer; ++other) {
            buffer.require_disjoint_from(*other);
        }
    }
    const std::size_t num_sources = buffers[0].length<std::int64_t>();
    const SaliencySums sums{buffers[0].array<std::int64_t>(num_sources),
                            buffers[1].array<double>(num_sources),
                            buffers[2].array<double>(num_sources),
                            buffers[3].array<double>(num_sources),
                            buffers[4].array<double>(num_sources),
                            buffers[5].array<double>(num_sources),
                            num_sources};
    const std::int32_t *source_of_row = sources.array<std::int32_t>(arguments.gated.n);
    const py::gil_scoped_release released;
    return accumulate_saliency(arguments.gated, source_of_row, sums, execution);
}

void combine_rows(const GatedArguments &arguments,
                  const py::object &tokens_object,
                  const py::object &out_object,
                  const Execution &execution) {
    const GatedRows &gated = arguments.gated;
    const Buffer tokens(tokens_object, "tokens", Access::read);
    const Buffer out(out_object, "out", Access::write);
    const std::int64_t *token_of_row = tokens.array<std::int64_t>(gated.n);
    const std::size_t out_length = out.length<float>();
    if (out_length % gated.dim != 0) {
        throw std::invalid_argument("out has " + std::to_string(out_length)
                                    + " items, not a multiple of dim = "
                                    + std::to_string(gated.dim));
    }
    float *sums = out.array<float>(out_length);
    for (const Buffer *input : {&arguments.rows, &arguments.gates, &tokens}) {
        out.require_disjoint_from(*input);
    }
    const py::gil_scoped_release released;
    combine(gated, token_of_row, sums, out_length / gated.dim, execution);
}

} // namespace

void bind_experts(py::module_ &module) {
    using py::arg;
    using Object = const py::object &;
    using Text = const std::string &;

    module.def(
        "saliency",
        [](Object rows, Text dtype, Object gates, Object sources, Object tokens, Object gate_sum,
           Object norm_sum, Object gate_norm_sum, Object norm_max, Object output_max, Object dim,
           Object threads, Text isa) {
            const Execution execution = to_execution(threads, isa);
            return saliency(to_gated(rows, dtype, gates, dim), sources,
                            {tokens, gate_sum, norm_sum, gate_norm_sum, norm_max, output_max},
                            execution);
        },
        arg("rows"), arg("dtype"), arg("gates"), arg("sources"), arg("tokens"), arg("gate_sum"),
        arg("norm_sum"), arg("gate_norm_sum"), arg("norm_max"), arg("output_max"), arg("dim"),
        arg("threads") = 0, arg("isa") = "auto");

    module.def(
        "combine",
        [](Object rows, Text dtype, Object gates, Object tokens, Object out, Object dim,
           Object threads, Text isa) {
            const Execution execution = to_execution(threads, isa);
            combine_rows(to_gated(rows, dtype, gates, dim), tokens, out, execution);
        },
        arg("rows"), arg("dtype"), arg("gates"), arg("tokens"), arg("out"), arg("dim"),
        arg("threads") = 0, arg("isa") = "auto");
}

} // namespace reap_stream
