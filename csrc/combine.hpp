// The weighted sum of the experts' outputs, back in the order of the tokens.
#pragma once

#include "saliency.hpp"

#include <cstddef>
#include <cstdint>

namespace reap_stream {

// out[tokens[i]] += gates[i] * float32(rows[i]), row after row. A multiplication, then an addition:
// never fused, so that the result does not depend on the instruction set or the number of threads.
// Throws std::invalid_argument, before `out` changes, when a token is not in [0, num_tokens).
void combine(const GatedRows &gated,
             const std::int64_t *tokens,
             float *out,
             std::size_t num_tokens,
             const Execution &execution);

} // namespace reap_stream
