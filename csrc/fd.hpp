// An open file, and transfers that either move every byte or say exactly why not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <sys/types.h>

namespace reap_stream {

// A failed system call: becomes OSError(code, text, path[, None, other_path]).
class IoError : public std::runtime_error {
public:
    IoError(int code, std::string path, std::string other_path = {});
    int code() const noexcept { return code_; }
    const std::string &path() const noexcept { return path_; }
    const std::string &other_path() const noexcept { return other_path_; }

private:
    int code_;
    std::string path_;
    std::string other_path_;
};

// The file ends before the bytes that were asked for: becomes EOFError.
class EndOfFileError : public std::runtime_error {
public:
    EndOfFileError(const std::string &path,
                   std::uint64_t offset,
                   std::uint64_t wanted_nbytes,
                   std::uint64_t got_nbytes);
};

// What makes two paths the same file, and how far it reaches.
struct FileIdentity {
    dev_t device = 0;
    ino_t inode = 0;
    bool is_regular = false;
    std::uint64_t nbytes = 0;

    bool same_file(const FileIdentity &other) const {
        return device == other.device && inode == other.inode;
    }
};

class Fd {
public:
    // Closed on exec. Throws IoError.
    Fd(std::string path, int flags, mode_t mode = 0);
    ~Fd();
    Fd(Fd &&other) noexcept;
    Fd &operator=(Fd &&other) noexcept;
    Fd(const Fd &) = delete;
    Fd &operator=(const Fd &) = delete;

    int get() const noexcept { return fd_; }
    const std::string &path() const noexcept { return path_; }
    FileIdentity identity() const;

    // All nbytes at `offset`, or IoError, or EndOfFileError.
    void read_exactly(std::uint64_t offset, std::uint8_t *out, std::size_t nbytes) const;
    void write_exactly(std::uint64_t offset, const std::uint8_t *src, std::size_t nbytes) const;

private:
    int fd_ = -1;
    std::string path_;
};

} // namespace reap_stream
