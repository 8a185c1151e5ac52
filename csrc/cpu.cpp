#include "cpu.hpp"

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <stdexcept>

namespace reap_stream {
namespace {

constexpr const char *kMaxIsaVariable = "REAP_STREAM_MAX_ISA";
constexpr Isa kAllIsas[] = {Isa::scalar, Isa::avx2, Isa::avx512};

Isa detect() {
#ifdef REAP_STREAM_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
                      && __builtin_cpu_supports("f16c");
    if (!avx2) {
        return Isa::scalar;
    }
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                        && __builtin_cpu_supports("avx512dq")
                        && __builtin_cpu_supports("avx512vl");
    return avx512 ? Isa::avx512 : Isa::avx2;
#else
    return Isa::scalar;
#endif
}

std::optional<Isa> parse(const std::string &name) {
    for (const Isa isa : kAllIsas) {
        if (name == isa_name(isa)) {
            return isa;
        }
    }
    return std::nullopt;
}

Isa detect_and_cap() {
    const char *cap_text = std::getenv(kMaxIsaVariable);
    if (cap_text == nullptr || *cap_text == '\0') {
        return detect();
    }
    const std::optional<Isa> cap = parse(cap_text);
    if (!cap) {
        throw std::invalid_argument(std::string(kMaxIsaVariable) + " is '" + cap_text
                                    + "'; it can be scalar, avx2 or avx512");
    }
    return std::min(*cap, detect());
}

} // namespace

const char *isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        case Isa::scalar:
            break;
    }
    return "scalar";
}

Isa active_isa() {
    static const Isa isa = detect_and_cap();
    return isa;
}

std::vector<Isa> available_isas() {
    std::vector<Isa> available;
    for (const Isa isa : kAllIsas) {
        if (isa <= active_isa()) {
            available.push_back(isa);
        }
    }
    return available;
}

Isa resolve_isa(const std::string &name) {
    if (name == "auto") {
        return active_isa();
    }
    const std::optional<Isa> isa = parse(name);
    if (!isa) {
        throw std::invalid_argument("isa is '" + name + "'; it can be auto, scalar, avx2 or avx512");
    }
    if (*isa > active_isa()) {
        throw std::invalid_argument("isa '" + name + "' is not available here; the best is '"
                                    + isa_name(active_isa()) + "'");
    }
    return *isa;
}

} // namespace reap_stream
