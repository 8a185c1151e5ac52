// The module reap_stream._native: arguments are checked with the GIL held, the work runs without it,
// and errors become Python's own classes. What each function does is said in _native.pyi.
#include "bind.hpp"
#include "cpu.hpp"
#include "fd.hpp"

#include <pybind11/pybind11.h>

#include <cerrno>
#include <exception>
#include <string>

namespace py = pybind11;

namespace reap_stream {
namespace {

py::object file_name(const std::string &path) {
    return py::reinterpret_steal<py::object>(
        PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

// Built as Python builds it, so that ENOENT becomes FileNotFoundError and so on.
void set_os_error(const IoError &error) {
    py::tuple arguments = py::make_tuple(error.code(), error.what(), file_name(error.path()));
    if (!error.other_path().empty()) {
        arguments = py::make_tuple(error.code(),
                                   error.what(),
                                   file_name(error.path()),
                                   py::none(),
                                   file_name(error.other_path()));
    }
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
}

void translate(std::exception_ptr pointer) {
    try {
        if (pointer) {
            std::rethrow_exception(pointer);
        }
    } catch (const IoError &error) {
        set_os_error(error);
    } catch (const EndOfFileError &error) {
        PyErr_SetObject(PyExc_EOFError, py::make_tuple(file_name(error.what())).ptr());
    }
}

py::list isa_names() {
    py::list names;
    for (const Isa isa : available_isas()) {
        names.append(isa_name(isa));
    }
    return names;
}

} // namespace
} // namespace reap_stream

PYBIND11_MODULE(_native, module) {
    module.doc() = "Kernels and file transfers of reap_stream, on plain buffers.";
    py::register_local_exception_translator(reap_stream::translate);
    module.def("version", [] { return REAP_STREAM_VERSION; });
    module.def("available_isas", reap_stream::isa_names);
    module.def("active_isa", [] { return reap_stream::isa_name(reap_stream::active_isa()); });
    reap_stream::bind_fp8(module);
    reap_stream::bind_packed(module);
    reap_stream::bind_rearranged(module);
    reap_stream::bind_experts(module);
    reap_stream::bind_storage(module);
}
