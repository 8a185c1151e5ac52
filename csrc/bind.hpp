// The parts of the module, one file each.
#pragma once

#include <pybind11/pybind11.h>

namespace reap_stream {

void bind_fp8(pybind11::module_ &module);
void bind_packed(pybind11::module_ &module);
void bind_rearranged(pybind11::module_ &module);
void bind_experts(pybind11::module_ &module);
void bind_storage(pybind11::module_ &module);

} // namespace reap_stream
