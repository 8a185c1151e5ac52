// Ranges that several threads write must not meet, or the result would be a matter of luck.
#pragma once

#include "fd.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace reap_stream {

struct Interval {
    FileIdentity file;
    std::uint64_t offset = 0;
    std::uint64_t nbytes = 0;
    bool written = false; // else read
};

struct MemoryInterval {
    const std::uint8_t *begin = nullptr;
    std::size_t nbytes = 0;
};

// Both throw std::invalid_argument. Files are told apart by device and inode, not by path. Ranges
// that are only read may overlap one another.
void require_no_conflict(std::vector<Interval> intervals);
void require_disjoint_memory(std::vector<MemoryInterval> intervals);

} // namespace reap_stream
