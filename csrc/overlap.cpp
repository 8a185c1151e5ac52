#include "overlap.hpp"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>

namespace reap_stream {
namespace {

template <typename T>
void drop_empty(std::vector<T> &intervals) {
    const auto is_empty = [](const T &interval) { return interval.nbytes == 0; };
    intervals.erase(std::remove_if(intervals.begin(), intervals.end(), is_empty), intervals.end());
}

[[noreturn]] void refuse(const Interval &interval, std::uint64_t reaches) {
    throw std::invalid_argument(
        std::string("the range of ") + std::to_string(interval.nbytes) + " bytes to be "
        + (interval.written ? "written" : "read") + " at offset "
        + std::to_string(interval.offset) + " overlaps a range of the same file that reaches to "
        + std::to_string(reaches));
}

} // namespace

void require_no_conflict(std::vector<Interval> intervals) {
    drop_empty(intervals);
    std::sort(intervals.begin(), intervals.end(), [](const Interval &left, const Interval &right) {
        return std::tie(left.file.device, left.file.inode, left.offset)
               < std::tie(right.file.device, right.file.inode, right.offset);
    });
    std::uint64_t written_to = 0; // where the ranges so far of this file end
    std::uint64_t read_to = 0;
    for (std::size_t i = 0; i < intervals.size(); ++i) {
        const Interval &interval = intervals[i];
        if (i == 0 || !interval.file.same_file(intervals[i - 1].file)) {
            written_to = 0;
            read_to = 0;
        }
        const std::uint64_t forbidden
            = interval.written ? std::max(written_to, read_to) : written_to;
        if (interval.offset < forbidden) {
            refuse(interval, forbidden);
        }
        std::uint64_t &reach = interval.written ? written_to : read_to;
        reach = std::max(reach, interval.offset + interval.nbytes);
    }
}

void require_disjoint_memory(std::vector<MemoryInterval> intervals) {
    drop_empty(intervals);
    std::sort(intervals.begin(),
              intervals.end(),
              [](const MemoryInterval &left, const MemoryInterval &right) {
                  return std::less<>()(left.begin, right.begin);
              });
    for (std::size_t i = 1; i < intervals.size(); ++i) {
        const MemoryInterval &before = intervals[i - 1];
        if (std::less<>()(intervals[i].begin, before.begin + before.nbytes)) {
            throw std::invalid_argument("two buffers to be written overlap in memory: one of "
                                        + std::to_string(before.nbytes) + " bytes, one of "
                                        + std::to_string(intervals[i].nbytes) + " bytes");
        }
    }
}

} // namespace reap_stream
