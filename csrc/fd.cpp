#include "fd.hpp"

#include <cerrno>
#include <fcntl.h>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>
#include <utility>

namespace reap_stream {

IoError::IoError(int code, std::string path, std::string other_path)
    : std::runtime_error(std::generic_category().message(code)),
      code_(code),
      path_(std::move(path)),
      other_path_(std::move(other_path)) {}

EndOfFileError::EndOfFileError(const std::string &path,
                               std::uint64_t offset,
                               std::uint64_t wanted_nbytes,
                               std::uint64_t got_nbytes)
    : std::runtime_error(path + ": wanted " + std::to_string(wanted_nbytes) + " bytes at offset "
                         + std::to_string(offset) + ", got " + std::to_string(got_nbytes)
                         + " before the end of the file") {}

Fd::Fd(std::string path, int flags, mode_t mode) : path_(std::move(path)) {
    do {
        fd_ = ::open(path_.c_str(), flags | O_CLOEXEC, mode);
    } while (fd_ < 0 && errno == EINTR);
    if (fd_ < 0) {
        throw IoError(errno, path_);
    }
}

Fd::~Fd() {
    if (fd_ >= 0) {
        ::close(fd_);
    }
}

Fd::Fd(Fd &&other) noexcept : fd_(std::exchange(other.fd_, -1)), path_(std::move(other.path_)) {}

Fd &Fd::operator=(Fd &&other) noexcept {
    std::swap(fd_, other.fd_);
    std::swap(path_, other.path_);
    return *this;
}

FileIdentity Fd::identity() const {
    struct stat status {};
    if (::fstat(fd_, &status) != 0) {
        throw IoError(errno, path_);
    }
    return {status.st_dev,
            status.st_ino,
            S_ISREG(status.st_mode),
            static_cast<std::uint64_t>(status.st_size)};
}

void Fd::read_exactly(std::uint64_t offset, std::uint8_t *out, std::size_t nbytes) const {
    std::size_t done = 0;
    while (done < nbytes) {
        const auto at = static_cast<off_t>(offset + done);
        const ssize_t got = ::pread(fd_, out + done, nbytes - done, at);
        if (got > 0) {
            done += static_cast<std::size_t>(got);
        } else if (got == 0) {
            throw EndOfFileError(path_, offset, nbytes, done);
        } else if (errno != EINTR) {
            throw IoError(errno, path_);
        }
    }
}

void Fd::write_exactly(std::uint64_t offset, const std::uint8_t *src, std::size_t nbytes) const {
    std::size_t done = 0;
    while (done < nbytes) {
        const auto at = static_cast<off_t>(offset + done);
        const ssize_t put = ::pwrite(fd_, src + done, nbytes - done, at);
        if (put > 0) {
            done += static_cast<std::size_t>(put);
        } else if (put == 0) {
            throw IoError(EIO, path_); // POSIX gives it no meaning; going on could go on for ever.
        } else if (errno != EINTR) {
            throw IoError(errno, path_);
        }
    }
}

} // namespace reap_stream
