// Many byte ranges of many files, moved by several threads in the order they lie on disk.
//
//     file 0   [---- range ----][-- range --]          [- range -]
//     file 1          [-------------- range --------------]
//
// Ranges longer than a piece are cut, and the threads take pieces from left to right.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace reap_stream {

struct FileRange {
    std::size_t file = 0; // index into the list of paths
    std::uint64_t offset = 0;
    std::uint64_t nbytes = 0;
};

struct ReadRange {
    FileRange src;
    std::uint8_t *out = nullptr;
};

struct WriteRange {
    FileRange dst;
    const std::uint8_t *src = nullptr;
};

struct CopyRange {
    FileRange src;
    FileRange dst; // nbytes equal to src.nbytes
};

// All three return the bytes moved. They throw IoError and EndOfFileError as Fd does (a range beyond
// the end of a regular file before the first byte is moved), and std::invalid_argument when
// ranges that are written overlap one another or a range that is read.
std::uint64_t
read_ranges(const std::vector<std::string> &files, std::vector<ReadRange> ranges, unsigned threads);

// Into files that exist. They grow where a range lies beyond their end and are never cut.
std::uint64_t write_ranges(const std::vector<std::string> &files,
                           std::vector<WriteRange> ranges,
                           unsigned threads);

// Inside the kernel where the file systems allow it, else through a bounded buffer for each thread.
std::uint64_t copy_ranges(const std::vector<std::string> &src_files,
                          const std::vector<std::string> &dst_files,
                          std::vector<CopyRange> ranges,
                          unsigned threads);

} // namespace reap_stream
