#include "files.hpp"

#include "fd.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#ifdef __GLIBC__
#    include <malloc.h>
#endif

namespace reap_stream {
namespace {

constexpr mode_t kFileMode = 0644;

// Removes a file that was made by a call that then failed.
class RemoveOnFailure {
public:
    explicit RemoveOnFailure(const std::string &path) : path_(path) {}
    ~RemoveOnFailure() {
        if (!done_) {
            ::unlink(path_.c_str());
        }
    }
    RemoveOnFailure(const RemoveOnFailure &) = delete;
    RemoveOnFailure &operator=(const RemoveOnFailure &) = delete;
    RemoveOnFailure(RemoveOnFailure &&) = delete;
    RemoveOnFailure &operator=(RemoveOnFailure &&) = delete;
    void cancel() noexcept { done_ = true; }

private:
    const std::string &path_;
    bool done_ = false;
};

void resize(const Fd &file, std::uint64_t nbytes) {
    int failed = 0;
    do {
        failed = ::ftruncate(file.get(), static_cast<off_t>(nbytes));
    } while (failed != 0 && errno == EINTR);
    if (failed != 0) {
        throw IoError(errno, file.path());
    }
}

// fallocate itself: glibc's posix_fallocate writes into every block where the file system cannot
// allocate, which takes as long as the job.
void reserve(const Fd &file, std::uint64_t nbytes) {
#ifdef __linux__
    int failed = 0;
    do {
        failed = ::fallocate(file.get(), 0, 0, static_cast<off_t>(nbytes));
    } while (failed != 0 && errno == EINTR);
    if (failed != 0 && errno != EOPNOTSUPP && errno != EINVAL && errno != ENOSYS) {
        throw IoError(errno, file.path());
    }
#else
    static_cast<void>(file);
    static_cast<void>(nbytes);
#endif
}

void allocate(const Fd &file, std::uint64_t nbytes) {
    if (nbytes > 0) {
        reserve(file, nbytes);
    }
    resize(file, nbytes);
}

#ifdef __linux__
void advise(const Fd &file, std::uint64_t offset, std::uint64_t nbytes, int advice) {
    const int code = ::posix_fadvise(
        file.get(), static_cast<off_t>(offset), static_cast<off_t>(nbytes), advice);
    if (code != 0) {
        throw IoError(code, file.path());
    }
}
#endif

} // namespace

void preallocate(const std::string &path, std::uint64_t nbytes) {
    try {
        const Fd file(path, O_RDWR | O_CREAT | O_EXCL, kFileMode);
        RemoveOnFailure guard(path);
        allocate(file, nbytes);
        guard.cancel();
    } catch (const IoError &error) {
        if (error.code() != EEXIST) {
            throw;
        }
        allocate(Fd(path, O_RDWR), nbytes);
    }
}

void prefetch(const std::string &path, std::uint64_t offset, std::uint64_t nbytes) {
    const Fd file(path, O_RDONLY);
#ifdef __linux__
    // The kernel reads no more for one hint than a device's largest request, and drops the rest.
    constexpr std::uint64_t kHintNbytes = std::uint64_t{128} << 10;
    for (std::uint64_t done = 0; done < nbytes; done += kHintNbytes) {
        const std::uint64_t step = std::min(kHintNbytes, nbytes - done);
        advise(file, offset + done, step, POSIX_FADV_WILLNEED);
    }
#else
    static_cast<void>(offset);
    static_cast<void>(nbytes);
#endif
}

void drop_cache(const std::string &path, std::uint64_t offset, std::uint64_t nbytes) {
    const Fd file(path, O_RDONLY);
#ifdef __linux__
    if (nbytes > 0) { // to the kernel, zero means "to the end"
        advise(file, offset, nbytes, POSIX_FADV_DONTNEED);
    }
#else
    static_cast<void>(offset);
    static_cast<void>(nbytes);
#endif
}

void sync_file(const std::string &path) {
    const Fd file(path, O_RDONLY);
#ifdef __linux__
    const int failed = ::fdatasync(file.get());
#else
    const int failed = ::fsync(file.get());
#endif
    if (failed != 0) {
        throw IoError(errno, path);
    }
}

void sync_directory(const std::string &path) {
    const Fd directory(path, O_RDONLY | O_DIRECTORY);
    // EINVAL: a file system that keeps no directory to be synced, as some network ones.
    if (::fsync(directory.get()) != 0 && errno != EINVAL) {
        throw IoError(errno, path);
    }
}

bool exchange(const std::string &left, const std::string &right) {
#if defined(__linux__) && defined(RENAME_EXCHANGE)
    if (::renameat2(AT_FDCWD, left.c_str(), AT_FDCWD, right.c_str(), RENAME_EXCHANGE) == 0) {
        return true;
    }
    if (errno != ENOSYS && errno != EINVAL && errno != EOPNOTSUPP) {
        throw IoError(errno, left, right);
    }
#else
    static_cast<void>(left);
    static_cast<void>(right);
#endif
    return false;
}

void trim_memory() {
#ifdef __GLIBC__
    ::malloc_trim(0);
#endif
}

} // namespace reap_stream
