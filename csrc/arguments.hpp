// What Python hands in, checked: everything here runs with the GIL held and throws what Python
// knows (ValueError as std::invalid_argument, TypeError as py::type_error). Nothing below this layer
// meets a Python object.
#pragma once

#include "fp8.hpp"
#include "numbers.hpp"

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace reap_stream {

namespace py = pybind11;

static_assert(sizeof(std::size_t) == 8, "reap_stream addresses more bytes than 32 bits can count");

enum class Access { read, write };

// A C-contiguous view of an object that has the buffer protocol; the object cannot move or shrink
// its memory while the view lives. Made and destroyed with the GIL held.
class Buffer {
public:
    Buffer(py::handle object, std::string name, Access access);
    ~Buffer();
    Buffer(Buffer &&other) noexcept;
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    Buffer &operator=(Buffer &&) = delete;

    std::size_t nbytes() const { return static_cast<std::size_t>(view_.len); }
    const std::uint8_t *data() const { return static_cast<const std::uint8_t *>(view_.buf); }
    std::uint8_t *writable() const { return static_cast<std::uint8_t *>(view_.buf); }
    const std::string &name() const { return name_; }

    // Any item type, so long as the bytes are as many as wanted.
    void require_nbytes(std::size_t wanted) const;
    void require_disjoint_from(const Buffer &other) const;

    // The buffer as an array of T: its item type, alignment and length are checked.
    template <typename T>
    T *array(std::size_t length) const;
    // The same, taking the length as it is.
    template <typename T>
    std::size_t length() const;

private:
    void require_items(char kind, std::size_t itemsize) const;

    Py_buffer view_{};
    std::string name_;
};

// An integer in [0, 2^63), as offsets in files are.
std::size_t to_count(py::handle number, const std::string &name);
std::size_t to_positive(py::handle number, const std::string &name);
unsigned to_threads(py::handle number);
Execution to_execution(py::handle threads, const std::string &isa);

// Throws when the product does not fit in [0, 2^63).
std::size_t product(std::size_t left, std::size_t right, const std::string &name);

DType to_dtype(const std::string &text,
               const std::string &name,
               std::initializer_list<DType> allowed);

// str, bytes or os.PathLike, in the encoding of the file system.
std::string to_path(py::handle path);
std::vector<std::string> to_paths(const py::iterable &paths);

} // namespace reap_stream
