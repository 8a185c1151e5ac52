#include "arguments.hpp"

#include <limits>
#include <stdexcept>
#include <utility>

namespace reap_stream {
namespace {

constexpr unsigned kMaxThreads = 1024;

const char *dtype_name(DType dtype) {
    switch (dtype) {
        case DType::bf16:
            return "bf16";
        case DType::f16:
            return "f16";
        case DType::f32:
            break;
    }
    return "f32";
}

// The kind of one item of a struct-module format: 'f' for floats, 'i' for signed integers.
char item_kind(const char *format) {
    const std::string text = format != nullptr ? format : "B";
    const std::size_t at = text.find_first_not_of("@=<");
    if (at == std::string::npos || at + 1 != text.size()) {
        return '?';
    }
    switch (text[at]) {
        case 'f':
        case 'd':
            return 'f';
        case 'i':
        case 'l':
        case 'q':
            return 'i';
        default:
            return '?';
    }
}

template <typename T>
constexpr char kind_of() {
    return std::numeric_limits<T>::is_integer ? 'i' : 'f';
}

} // namespace

Buffer::Buffer(py::handle object, std::string name, Access access) : name_(std::move(name)) {
    if (PyObject_CheckBuffer(object.ptr()) == 0) {
        throw py::type_error(name_ + " must have the buffer protocol (bytes, bytearray, memoryview,"
                             + " numpy array), not " + Py_TYPE(object.ptr())->tp_name);
    }
    int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT;
    if (access == Access::write) {
        flags |= PyBUF_WRITABLE;
    }
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
        py::error_already_set cause;
        const std::string reason = py::str(cause.value());
        throw std::invalid_argument(name_ + " must be C-contiguous"
                                    + (access == Access::write ? " and writable: " : ": ")
                                    + reason);
    }
}

Buffer::~Buffer() {
    if (view_.obj != nullptr) {
        PyBuffer_Release(&view_);
    }
}

Buffer::Buffer(Buffer &&other) noexcept
    : view_(std::exchange(other.view_, Py_buffer{})), name_(std::move(other.name_)) {}

void Buffer::require_nbytes(std::size_t wanted) const {
    if (nbytes() != wanted) {
        throw std::invalid_argument(name_ + " has " + std::to_string(nbytes())
                                    + " bytes where the shape needs " + std::to_string(wanted));
    }
}

void Buffer::require_disjoint_from(const Buffer &other) const {
    const auto begin = reinterpret_cast<std::uintptr_t>(data());
    const auto other_begin = reinterpret_cast<std::uintptr_t>(other.data());
    if (begin < other_begin + other.nbytes() && other_begin < begin + nbytes()) {
        throw std::invalid_argument(name_ + " (" + std::to_string(nbytes()) + " bytes) and "
                                    + other.name_ + " (" + std::to_string(other.nbytes())
                                    + " bytes) overlap in memory; give them buffers of their own");
    }
}

void Buffer::require_items(char kind, std::size_t itemsize) const {
    const auto own_itemsize = static_cast<std::size_t>(view_.itemsize);
    if (own_itemsize != itemsize || item_kind(view_.format) != kind) {
        const char *format = view_.format != nullptr ? view_.format : "B";
        throw std::invalid_argument(name_ + " has items of " + std::to_string(own_itemsize)
                                    + " bytes and format '" + format + "' where "
                                    + std::to_string(8 * itemsize) + "-bit "
                                    + (kind == 'f' ? "floats" : "integers") + " are needed");
    }
    if (reinterpret_cast<std::uintptr_t>(view_.buf) % itemsize != 0 && view_.len != 0) {
        throw std::invalid_argument(name_ + " does not start at a multiple of its item's "
                                    + std::to_string(itemsize) + " bytes; copy it first");
    }
}

template <typename T>
std::size_t Buffer::length() const {
    require_items(kind_of<T>(), sizeof(T));
    return nbytes() / sizeof(T);
}

template <typename T>
T *Buffer::array(std::size_t wanted) const {
    const std::size_t own = length<T>();
    if (own != wanted) {
        throw std::invalid_argument(name_ + " has " + std::to_string(own) + " items where "
                                    + std::to_string(wanted) + " are needed");
    }
    return static_cast<T *>(view_.buf);
}

template std::size_t Buffer::length<std::int32_t>() const;
template std::size_t Buffer::length<std::int64_t>() const;
template std::size_t Buffer::length<float>() const;
template std::size_t Buffer::length<double>() const;
template std::int32_t *Buffer::array(std::size_t) const;
template std::int64_t *Buffer::array(std::size_t) const;
template float *Buffer::array(std::size_t) const;
template double *Buffer::array(std::size_t) const;

std::size_t to_count(py::handle number, const std::string &name) {
    const auto integer = py::reinterpret_steal<py::object>(PyNumber_Index(number.ptr()));
    if (!integer) {
        PyErr_Clear();
        throw py::type_error(name + " must be an integer, not "
                             + Py_TYPE(number.ptr())->tp_name);
    }
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(integer.ptr(), &overflow);
    if (overflow != 0 || value < 0) {
        throw std::invalid_argument(name + " is " + std::string(py::str(integer))
                                    + "; it must be from 0 to 2^63 - 1");
    }
    return static_cast<std::size_t>(value);
}

std::size_t to_positive(py::handle number, const std::string &name) {
    const std::size_t count = to_count(number, name);
    if (count == 0) {
        throw std::invalid_argument(name + " is 0; it must be at least 1");
    }
    return count;
}

unsigned to_threads(py::handle number) {
    const std::size_t count = to_count(number, "threads");
    if (count > kMaxThreads) {
        throw std::invalid_argument("threads is " + std::to_string(count) + "; at most "
                                    + std::to_string(kMaxThreads));
    }
    return static_cast<unsigned>(count);
}

Execution to_execution(py::handle threads, const std::string &isa) {
    return {to_threads(threads), resolve_isa(isa)};
}

std::size_t product(std::size_t left, std::size_t right, const std::string &name) {
    constexpr auto kLimit = static_cast<std::size_t>(std::numeric_limits<std::int64_t>::max());
    if (right != 0 && left > kLimit / right) {
        throw std::invalid_argument(name + " is " + std::to_string(left) + " times "
                                    + std::to_string(right) + ", more than 2^63 - 1");
    }
    return left * right;
}

DType to_dtype(const std::string &text,
               const std::string &name,
               std::initializer_list<DType> allowed) {
    std::string names;
    for (const DType dtype : allowed) {
        if (text == dtype_name(dtype)) {
            return dtype;
        }
        names += (names.empty() ? "" : ", ") + std::string(dtype_name(dtype));
    }
    throw std::invalid_argument(name + " is '" + text + "'; it can be one of " + names);
}

std::string to_path(py::handle path) {
    PyObject *encoded = nullptr;
    if (PyUnicode_FSConverter(path.ptr(), &encoded) == 0) {
        throw py::error_already_set();
    }
    return py::reinterpret_steal<py::bytes>(encoded);
}

std::vector<std::string> to_paths(const py::iterable &paths) {
    if (py::isinstance<py::str>(paths) || py::isinstance<py::bytes>(paths)) {
        throw py::type_error("files must be a list of paths, not one path");
    }
    std::vector<std::string> result;
    for (const py::handle path : paths) {
        result.push_back(to_path(path));
    }
    return result;
}

} // namespace reap_stream
