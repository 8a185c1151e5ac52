// Arguments of the transfers of byte ranges and of the calls on whole files.
#include "arguments.hpp"
#include "bind.hpp"
#include "files.hpp"
#include "shards.hpp"

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace reap_stream {
namespace {

std::string range_name(std::size_t index) { return "ranges[" + std::to_string(index) + "]"; }

template <std::size_t N>
std::array<std::size_t, N> to_numbers(const py::handle &range, const std::string &name) {
    const auto items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(range.ptr()));
    if (!items) {
        throw py::error_already_set();
    }
    if (items.size() != N) {
        throw std::invalid_argument(name + " has " + std::to_string(items.size())
                                    + " numbers where " + std::to_string(N) + " are needed");
    }
    std::array<std::size_t, N> numbers{};
    for (std::size_t i = 0; i < N; ++i) {
        numbers[i] = to_count(items[i], name + "[" + std::to_string(i) + "]");
    }
    return numbers;
}

void require_no_overflow(std::size_t offset, std::size_t nbytes, const std::string &name) {
    if (nbytes > static_cast<std::size_t>(INT64_MAX) - offset) {
        throw std::invalid_argument(name + ": offset " + std::to_string(offset) + " plus "
                                    + std::to_string(nbytes) + " bytes is more than 2^63 - 1");
    }
}

FileRange to_file_range(const std::array<std::size_t, 3> &numbers,
                        std::size_t num_files,
                        const std::string &name) {
    const auto [file, offset, nbytes] = numbers;
    if (file >= num_files) {
        throw std::invalid_argument(name + " names file " + std::to_string(file) + "; there are "
                                    + std::to_string(num_files) + " files");
    }
    require_no_overflow(offset, nbytes, name);
    return {file, offset, nbytes};
}

// The ranges, and one buffer for each of them, of exactly its bytes.
std::pair<std::vector<FileRange>, std::vector<Buffer>> to_transfers(const py::iterable &ranges,
                                                                    const py::iterable &buffers,
                                                                    std::size_t num_files,
                                                                    Access access) {
    std::vector<FileRange> file_ranges;
    for (const py::handle range : ranges) {
        const std::string name = range_name(file_ranges.size());
        file_ranges.push_back(to_file_range(to_numbers<3>(range, name), num_files, name));
    }
    const std::string list = access == Access::write ? "outs" : "srcs";
    std::vector<Buffer> views;
    for (const py::handle buffer : buffers) {
        const std::size_t i = views.size();
        views.emplace_back(buffer, list + "[" + std::to_string(i) + "]", access);
        if (i < file_ranges.size() && views[i].nbytes() != file_ranges[i].nbytes) {
            throw std::invalid_argument(range_name(i) + " has "
                                        + std::to_string(file_ranges[i].nbytes) + " bytes, "
                                        + views[i].name() + " has "
                                        + std::to_string(views[i].nbytes()));
        }
    }
    if (views.size() != file_ranges.size()) {
        throw std::invalid_argument("there are " + std::to_string(file_ranges.size())
                                    + " ranges and " + std::to_string(views.size()) + " " + list);
    }
    return {std::move(file_ranges), std::move(views)};
}

std::uint64_t read_into(const py::iterable &files,
                        const py::iterable &ranges,
                        const py::iterable &outs,
                        const py::object &threads) {
    const unsigned num_threads = to_threads(threads);
    const std::vector<std::string> paths = to_paths(files);
    const auto [file_ranges, views] = to_transfers(ranges, outs, paths.size(), Access::write);
    std::vector<ReadRange> reads;
    for (std::size_t i = 0; i < views.size(); ++i) {
        reads.push_back({file_ranges[i], views[i].writable()});
    }
    const py::gil_scoped_release released;
    return read_ranges(paths, std::move(reads), num_threads);
}

std::uint64_t write_from(const py::iterable &files,
                         const py::iterable &ranges,
                         const py::iterable &srcs,
                         const py::object &threads) {
    const unsigned num_threads = to_threads(threads);
    const std::vector<std::string> paths = to_paths(files);
    const auto [file_ranges, views] = to_transfers(ranges, srcs, paths.size(), Access::read);
    std::vector<WriteRange> writes;
    for (std::size_t i = 0; i < views.size(); ++i) {
        writes.push_back({file_ranges[i], views[i].data()});
    }
    const py::gil_scoped_release released;
    return write_ranges(paths, std::move(writes), num_threads);
}

std::uint64_t copy_between(const py::iterable &src_files,
                           const py::iterable &dst_files,
                           const py::iterable &ranges,
                           const py::object &threads) {
    const unsigned num_threads = to_threads(threads);
    const std::vector<std::string> src_paths = to_paths(src_files);
    const std::vector<std::string> dst_paths = to_paths(dst_files);
    std::vector<CopyRange> copies;
    for (const py::handle range : ranges) {
        const std::string name = range_name(copies.size());
        const auto [src, src_offset, dst, dst_offset, nbytes] = to_numbers<5>(range, name);
        copies.push_back(
            {to_file_range({src, src_offset, nbytes}, src_paths.size(), name + " (source)"),
             to_file_range({dst, dst_offset, nbytes}, dst_paths.size(), name + " (target)")});
    }
    const py::gil_scoped_release released;
    return copy_ranges(src_paths, dst_paths, std::move(copies), num_threads);
}

void hint(void (*advise)(const std::string &, std::uint64_t, std::uint64_t),
          const py::object &path,
          const py::object &offset,
          const py::object &nbytes) {
    const std::string file = to_path(path);
    const std::size_t first = to_count(offset, "offset");
    const std::size_t length = to_count(nbytes, "nbytes");
    require_no_overflow(first, length, file);
    const py::gil_scoped_release released;
    advise(file, first, length);
}

void sync(void (*sync_path)(const std::string &), const py::object &path) {
    const std::string name = to_path(path);
    const py::gil_scoped_release released;
    sync_path(name);
}

void bind_files(py::module_ &module) {
    using py::arg;
    using Object = const py::object &;

    module.def(
        "preallocate",
        [](Object path, Object nbytes) {
            const std::string name = to_path(path);
            const std::size_t length = to_count(nbytes, "nbytes");
            const py::gil_scoped_release released;
            preallocate(name, length);
        },
        arg("path"), arg("nbytes"));
    module.def(
        "prefetch",
        [](Object path, Object offset, Object nbytes) { hint(prefetch, path, offset, nbytes); },
        arg("path"), arg("offset"), arg("nbytes"));
    module.def(
        "drop_cache",
        [](Object path, Object offset, Object nbytes) { hint(drop_cache, path, offset, nbytes); },
        arg("path"), arg("offset"), arg("nbytes"));
    module.def("sync_file", [](Object path) { sync(sync_file, path); }, arg("path"));
    module.def("sync_directory", [](Object path) { sync(sync_directory, path); }, arg("path"));
    module.def(
        "exchange",
        [](Object left, Object right) {
            const std::string left_name = to_path(left);
            const std::string right_name = to_path(right);
            const py::gil_scoped_release released;
            return exchange(left_name, right_name);
        },
        arg("a"), arg("b"));
    module.def("trim_memory", [] {
        const py::gil_scoped_release released;
        trim_memory();
    });
}

} // namespace

void bind_storage(py::module_ &module) {
    using py::arg;
    module.def("read_ranges", read_into, arg("files"), arg("ranges"), arg("outs"),
               arg("threads") = 0);
    module.def("write_ranges", write_from, arg("files"), arg("ranges"), arg("srcs"),
               arg("threads") = 0);
    module.def("copy_ranges", copy_between, arg("src_files"), arg("dst_files"), arg("ranges"),
               arg("threads") = 0);
    bind_files(module);
}

} // namespace reap_stream
