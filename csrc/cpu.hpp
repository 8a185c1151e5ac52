// Which instruction set the kernels run with: found once, lowered by the environment, never raised.
#pragma once

#include <string>
#include <vector>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#    define REAP_STREAM_X86 1
#    define REAP_STREAM_AVX2 __attribute__((target("avx2,fma,f16c")))
#    define REAP_STREAM_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#endif

namespace reap_stream {

// Ordered: each one implies those before it.
enum class Isa { scalar, avx2, avx512 };

const char *isa_name(Isa isa);

// The best instruction set of this processor, or a lower one named by REAP_STREAM_MAX_ISA.
// Throws std::invalid_argument when the environment names one that does not exist.
Isa active_isa();

std::vector<Isa> available_isas();

// "auto" is active_isa(). Throws std::invalid_argument for one that is unknown or not available.
Isa resolve_isa(const std::string &name);

} // namespace reap_stream
