#include "shards.hpp"

#include "fd.hpp"
#include "overlap.hpp"
#include "parallel.hpp"

#include <algorithm>
#include <cerrno>
#include <fcntl.h>
#include <memory>
#include <optional>
#include <tuple>
#include <unistd.h>

namespace reap_stream {
namespace {

constexpr std::uint64_t kPieceNbytes = std::uint64_t{8} << 20;
constexpr std::uint64_t kBounceNbytes = std::uint64_t{1} << 20;
// Below this, starting a thread takes longer than moving the bytes.
constexpr std::uint64_t kThreadedNbytes = std::uint64_t{1} << 20;

// The files that a list of ranges names, opened once each.
class OpenFiles {
public:
    OpenFiles(const std::vector<std::string> &paths, int flags)
        : paths_(paths), flags_(flags), files_(paths.size()), identities_(paths.size()) {}

    void open(const FileRange &range) {
        if (!files_[range.file]) {
            files_[range.file].emplace(paths_[range.file], flags_);
            identities_[range.file] = files_[range.file]->identity();
        }
    }
    const Fd &operator[](std::size_t file) const { return *files_[file]; }

    Interval interval(const FileRange &range, bool written) const {
        return {identities_[range.file], range.offset, range.nbytes, written};
    }

    // Found before anything is moved, and with the figures of the whole range.
    void require_inside(const FileRange &range) const {
        const FileIdentity &identity = identities_[range.file];
        if (identity.is_regular && range.offset + range.nbytes > identity.nbytes) {
            const std::uint64_t there
                = identity.nbytes > range.offset ? identity.nbytes - range.offset : 0;
            throw EndOfFileError(paths_[range.file], range.offset, range.nbytes, there);
        }
    }

private:
    const std::vector<std::string> &paths_;
    int flags_;
    std::vector<std::optional<Fd>> files_;
    std::vector<FileIdentity> identities_;
};

struct Piece {
    std::size_t range = 0;   // index into the ranges
    std::uint64_t begin = 0; // within that range
    std::size_t nbytes = 0;
};

bool lies_before(const FileRange &left, const FileRange &right) {
    return std::tie(left.file, left.offset) < std::tie(right.file, right.offset);
}

// Moves every piece of every range with move(range, begin, nbytes) and returns the sum of bytes.
// `side` is the member of Range whose place on disk gives the order.
template <typename Range, typename Move>
std::uint64_t move_pieces(const std::vector<Range> &ranges,
                          FileRange Range::*side,
                          unsigned threads,
                          const Move &move) {
    std::uint64_t total = 0;
    std::vector<Piece> pieces;
    for (std::size_t i = 0; i < ranges.size(); ++i) {
        const std::uint64_t nbytes = (ranges[i].*side).nbytes;
        for (std::uint64_t begin = 0; begin < nbytes; begin += kPieceNbytes) {
            const std::uint64_t length = std::min(kPieceNbytes, nbytes - begin);
            pieces.push_back({i, begin, static_cast<std::size_t>(length)});
        }
        total += nbytes;
    }
    const auto each = [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
            move(ranges[pieces[i].range], pieces[i].begin, pieces[i].nbytes);
        }
    };
    parallel_chunks(pieces.size(), 1, total < kThreadedNbytes ? 1 : threads, each);
    return total;
}

// Returns how many bytes the kernel moved itself: all of them, or fewer where it cannot.
std::size_t copy_inside_kernel(const Fd &src,
                               std::uint64_t src_offset,
                               const Fd &dst,
                               std::uint64_t dst_offset,
                               std::size_t nbytes) {
    std::size_t done = 0;
#ifdef __linux__
    while (done < nbytes) {
        auto from = static_cast<off64_t>(src_offset + done);
        auto to = static_cast<off64_t>(dst_offset + done);
        const ssize_t moved
            = ::copy_file_range(src.get(), &from, dst.get(), &to, nbytes - done, 0);
        if (moved > 0) {
            done += static_cast<std::size_t>(moved);
            continue;
        }
        if (moved < 0 && errno == EINTR) {
            continue;
        }
        const bool unable = moved == 0 || errno == EXDEV || errno == ENOSYS || errno == EINVAL
                            || errno == EOPNOTSUPP || errno == EPERM;
        if (!unable) {
            throw IoError(errno, src.path(), dst.path());
        }
        break;
    }
#else
    static_cast<void>(src_offset);
    static_cast<void>(dst_offset);
    static_cast<void>(src);
    static_cast<void>(dst);
    static_cast<void>(nbytes);
#endif
    return done;
}

void copy_exactly(const Fd &src,
                  std::uint64_t src_offset,
                  const Fd &dst,
                  std::uint64_t dst_offset,
                  std::size_t nbytes) {
    std::size_t done = copy_inside_kernel(src, src_offset, dst, dst_offset, nbytes);
    if (done == nbytes) {
        return;
    }
    const std::unique_ptr<std::uint8_t[]> bounce(new std::uint8_t[kBounceNbytes]);
    while (done < nbytes) {
        const std::size_t step = std::min<std::size_t>(kBounceNbytes, nbytes - done);
        src.read_exactly(src_offset + done, bounce.get(), step);
        dst.write_exactly(dst_offset + done, bounce.get(), step);
        done += step;
    }
}

} // namespace

std::uint64_t read_ranges(const std::vector<std::string> &files,
                          std::vector<ReadRange> ranges,
                          unsigned threads) {
    std::sort(ranges.begin(), ranges.end(), [](const ReadRange &left, const ReadRange &right) {
        return lies_before(left.src, right.src);
    });
    OpenFiles open(files, O_RDONLY);
    std::vector<MemoryInterval> outs;
    for (const ReadRange &range : ranges) {
        open.open(range.src);
        open.require_inside(range.src);
        outs.push_back({range.out, static_cast<std::size_t>(range.src.nbytes)});
    }
    require_disjoint_memory(std::move(outs));
    return move_pieces(ranges,
                       &ReadRange::src,
                       threads,
                       [&](const ReadRange &range, std::uint64_t begin, std::size_t nbytes) {
                           const Fd &file = open[range.src.file];
                           file.read_exactly(range.src.offset + begin, range.out + begin, nbytes);
                       });
}

std::uint64_t write_ranges(const std::vector<std::string> &files,
                           std::vector<WriteRange> ranges,
                           unsigned threads) {
    std::sort(ranges.begin(), ranges.end(), [](const WriteRange &left, const WriteRange &right) {
        return lies_before(left.dst, right.dst);
    });
    OpenFiles open(files, O_WRONLY);
    std::vector<Interval> written;
    for (const WriteRange &range : ranges) {
        open.open(range.dst);
        written.push_back(open.interval(range.dst, true));
    }
    require_no_conflict(std::move(written));
    return move_pieces(ranges,
                       &WriteRange::dst,
                       threads,
                       [&](const WriteRange &range, std::uint64_t begin, std::size_t nbytes) {
                           const Fd &file = open[range.dst.file];
                           file.write_exactly(range.dst.offset + begin, range.src + begin, nbytes);
                       });
}

std::uint64_t copy_ranges(const std::vector<std::string> &src_files,
                          const std::vector<std::string> &dst_files,
                          std::vector<CopyRange> ranges,
                          unsigned threads) {
    std::sort(ranges.begin(), ranges.end(), [](const CopyRange &left, const CopyRange &right) {
        return lies_before(left.src, right.src);
    });
    OpenFiles sources(src_files, O_RDONLY);
    OpenFiles targets(dst_files, O_WRONLY);
    std::vector<Interval> touched;
    for (const CopyRange &range : ranges) {
        sources.open(range.src);
        targets.open(range.dst);
        sources.require_inside(range.src);
        touched.push_back(sources.interval(range.src, false));
        touched.push_back(targets.interval(range.dst, true));
    }
    require_no_conflict(std::move(touched));
    return move_pieces(ranges,
                       &CopyRange::src,
                       threads,
                       [&](const CopyRange &range, std::uint64_t begin, std::size_t nbytes) {
                           copy_exactly(sources[range.src.file],
                                        range.src.offset + begin,
                                        targets[range.dst.file],
                                        range.dst.offset + begin,
                                        nbytes);
                       });
}

} // namespace reap_stream
