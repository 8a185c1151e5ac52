// Work over a range, shared among threads that are joined before the call returns.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace reap_stream {

// torch.set_flush_denormal and the like change the processor's mode for the calling thread and those
// it starts. The kernels promise the same bits whatever the mode of their caller.
class DefaultFloatMode {
public:
    DefaultFloatMode() noexcept {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatMode() { std::fesetenv(&saved_); }
    DefaultFloatMode(const DefaultFloatMode &) = delete;
    DefaultFloatMode &operator=(const DefaultFloatMode &) = delete;
    DefaultFloatMode(DefaultFloatMode &&) = delete;
    DefaultFloatMode &operator=(DefaultFloatMode &&) = delete;

private:
    std::fenv_t saved_{};
};

// The first error of several threads, kept whole; it also tells the others to stop.
class FirstError {
public:
    void keep(std::exception_ptr error) noexcept {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) {
            error_ = std::move(error);
            raised_.store(true, std::memory_order_relaxed);
        }
    }
    bool raised() const noexcept { return raised_.load(std::memory_order_relaxed); }
    void rethrow() const {
        if (error_) {
            std::rethrow_exception(error_);
        }
    }

private:
    std::mutex mutex_;
    std::exception_ptr error_;
    std::atomic<bool> raised_{false};
};

inline std::size_t thread_count(unsigned requested, std::size_t num_chunks) {
    const std::size_t wanted = requested != 0 ? requested : std::thread::hardware_concurrency();
    return std::clamp<std::size_t>(wanted, 1, std::max<std::size_t>(num_chunks, 1));
}

// Calls body(begin, end) for consecutive pieces of [0, count) of `grain` elements each. Threads take
// the next piece when they are free, the caller being one of them; one piece or fewer needs no other.
// The first exception of any piece is rethrown here, after all threads have ended.
template <typename Body>
void parallel_chunks(std::size_t count, std::size_t grain, unsigned threads, const Body &body) {
    grain = std::max<std::size_t>(grain, 1);
    const std::size_t num_chunks = count / grain + (count % grain != 0 ? 1 : 0);
    std::atomic<std::size_t> next{0};
    FirstError error;

    const auto work = [&]() noexcept {
        const DefaultFloatMode mode;
        for (std::size_t i = next++; i < num_chunks && !error.raised(); i = next++) {
            try {
                const std::size_t begin = i * grain;
                body(begin, begin + std::min(grain, count - begin));
            } catch (...) {
                error.keep(std::current_exception());
            }
        }
    };

    std::vector<std::thread> others;
    try {
        const std::size_t num_others = thread_count(threads, num_chunks) - 1;
        others.reserve(num_others);
        for (std::size_t i = 0; i < num_others; ++i) {
            others.emplace_back(work);
        }
    } catch (const std::system_error &) {
        // No more threads to be had: those that did start, and the caller, do all the work.
    }
    work();
    for (std::thread &thread : others) {
        thread.join();
    }
    error.rethrow();
}

} // namespace reap_stream
