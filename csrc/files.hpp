// Whole files: made at their final length, hinted, made durable, exchanged. And the heap, trimmed.
// All throw IoError.
#pragma once

#include <cstdint>
#include <string>

namespace reap_stream {

// Creates or keeps the file and gives it exactly `nbytes`, with blocks behind them where the file
// system can promise that. A file that this call made is removed again when it fails.
void preallocate(const std::string &path, std::uint64_t nbytes);

// Hints to the page cache; nothing happens on systems that take none.
void prefetch(const std::string &path, std::uint64_t offset, std::uint64_t nbytes);
void drop_cache(const std::string &path, std::uint64_t offset, std::uint64_t nbytes);

void sync_file(const std::string &path);
void sync_directory(const std::string &path);

// Swaps two names in one step; false where the system or the file system cannot.
bool exchange(const std::string &left, const std::string &right);

// Gives freed memory back to the system, where the C library knows how.
void trim_memory();

} // namespace reap_stream
