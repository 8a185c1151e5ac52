#include "rearranged.hpp"

#include "packed_kernels.hpp"
#include "parallel.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#ifdef REAP_STREAM_X86
#    include <xmmintrin.h> // in every x86-64
#endif

namespace reap_stream {
namespace {

// Rows rearranged at a time: a cache line of words, of both layouts, and a few hundred kilobytes.
constexpr std::size_t kBlockRows = 128;
constexpr std::size_t kDepth = 4;
constexpr std::size_t kLine = 64;
constexpr std::size_t kWord = 4;
constexpr std::size_t kNibblesOfWord = 8;

// The row of the n-th code of an AWQ word: its kernels unpack even and odd halves together.
constexpr std::size_t kAwqRow[kNibblesOfWord] = {0, 2, 4, 6, 1, 3, 5, 7};

constexpr float kIntegers[kNibbles]
    = {0.0F, 1.0F, 2.0F, 3.0F, 4.0F, 5.0F, 6.0F, 7.0F,
       8.0F, 9.0F, 10.0F, 11.0F, 12.0F, 13.0F, 14.0F, 15.0F};

std::uint32_t word_at(const std::uint8_t *words, std::size_t i) {
    return load<std::uint32_t>(words + kWord * i);
}

// Where rows of words are made.
struct Rows {
    std::uint8_t *data;
    std::size_t stride;

    std::uint8_t *at(std::size_t row, std::size_t word) const {
        return data + row * stride + kWord * word;
    }
};

// Word i of `lines[t]` becomes word `first + t` of row i: four of a row are written at once.
void store_transposed(const std::uint8_t *const (&lines)[kDepth],
                      std::size_t lanes,
                      std::size_t first,
                      const Rows &rows) {
    std::size_t i = 0;
#ifdef REAP_STREAM_X86
    for (; i + 4 <= lanes; i += 4) {
        __m128 quad[kDepth];
        for (std::size_t t = 0; t < kDepth; ++t) {
            quad[t] = _mm_loadu_ps(reinterpret_cast<const float *>(lines[t] + kWord * i));
        }
        _MM_TRANSPOSE4_PS(quad[0], quad[1], quad[2], quad[3]);
        for (std::size_t t = 0; t < 4; ++t) {
            _mm_storeu_ps(reinterpret_cast<float *>(rows.at(i + t, first)), quad[t]);
        }
    }
#endif
    for (; i < lanes; ++i) {
        for (std::size_t t = 0; t < kDepth; ++t) {
            store(rows.at(i, first + t), word_at(lines[t], i));
        }
    }
}

// Word r of row n lies at [r][n].
void transpose_words(const RearrangedCodes &stored,
                     const PackedShape &shape,
                     std::size_t first,
                     std::size_t count,
                     const Rows &rows) {
    const std::size_t depth = shape.row_nbytes / kWord;
    std::size_t r = 0;
    for (; r + kDepth <= depth; r += kDepth) {
        const std::uint8_t *lines[kDepth];
        for (std::size_t t = 0; t < kDepth; ++t) {
            lines[t] = stored.codes + kWord * ((r + t) * shape.rows + first);
        }
        store_transposed(lines, count, r, rows);
    }
    for (; r < depth; ++r) {
        for (std::size_t n = 0; n < count; ++n) {
            store(rows.at(n, r), word_at(stored.codes, r * shape.rows + first + n));
        }
    }
}

// Four words, one a lane: what GCC and Clang know on every processor.
using Words [[gnu::vector_size(16)]] = std::uint32_t;

// Nibble j of words[p] and nibble p of words[j] change places, in every lane.
void transpose_nibbles(Words (&words)[kNibblesOfWord]) {
    constexpr std::uint32_t kMasks[] = {0x0000FFFF, 0x00FF00FF, 0x0F0F0F0F};
    std::size_t distance = kNibblesOfWord / 2;
    for (const std::uint32_t mask : kMasks) {
        const auto shift = static_cast<std::uint32_t>(4 * distance);
        for (std::size_t i = 0; i < kNibblesOfWord; ++i) {
            if ((i & distance) == 0) {
                const Words swap = ((words[i] >> shift) ^ words[i + distance]) & mask;
                words[i + distance] ^= swap;
                words[i] ^= swap << shift;
            }
        }
        distance /= 2;
    }
}

// Eight lines of up to sixteen AWQ words, made eight lines of words that are each of one row.
class AwqTile {
public:
    void load(const std::uint8_t *codes, std::size_t line_nbytes, std::size_t lanes) {
        for (std::size_t lane = 0; lane < lanes; lane += 4) {
            const std::size_t nbytes = kWord * std::min<std::size_t>(4, lanes - lane);
            Words words[kNibblesOfWord] = {};
            for (std::size_t j = 0; j < kNibblesOfWord; ++j) {
                const std::uint8_t *from = codes + j * line_nbytes + kWord * lane;
                if (nbytes == sizeof(Words)) {
                    std::memcpy(&words[j], from, sizeof(Words));
                } else {
                    std::memcpy(&words[j], from, nbytes);
                }
            }
            transpose_nibbles(words);
            for (std::size_t j = 0; j < kNibblesOfWord; ++j) {
                std::memcpy(lines_[j] + kWord * lane, &words[j], sizeof(Words));
            }
        }
    }
    const std::uint8_t *line(std::size_t j) const { return lines_[j]; }

private:
    alignas(kLine) std::uint8_t lines_[kNibblesOfWord][kLine] = {};
};

void rearrange_awq(const RearrangedCodes &stored,
                   const PackedShape &shape,
                   std::size_t first,
                   std::size_t count,
                   const Rows &rows) {
    const std::size_t line_nbytes = kWord * (shape.rows / kNibblesOfWord);
    const std::size_t lanes = count / kNibblesOfWord;
    const std::size_t depth = shape.cols / kNibblesOfWord;
    const std::uint8_t *codes = stored.codes + kWord * (first / kNibblesOfWord);
    AwqTile tiles[kDepth];
    for (std::size_t r = 0; r < depth; r += kDepth) {
        const std::size_t now = std::min(kDepth, depth - r);
        // Far apart as the lines lie, the processor does not foresee them.
        const std::uint8_t *later = codes + (r + kDepth) * kNibblesOfWord * line_nbytes;
        for (std::size_t k = 0; k < kDepth * kNibblesOfWord && r + 2 * kDepth <= depth; ++k) {
            __builtin_prefetch(later + k * line_nbytes);
        }
        for (std::size_t t = 0; t < now; ++t) {
            tiles[t].load(codes + (r + t) * kNibblesOfWord * line_nbytes, line_nbytes, lanes);
        }
        for (std::size_t j = 0; j < kNibblesOfWord; ++j) {
            const Rows own{rows.at(kAwqRow[j], 0), kNibblesOfWord * rows.stride};
            if (now == kDepth) {
                const std::uint8_t *lines[kDepth]
                    = {tiles[0].line(j), tiles[1].line(j), tiles[2].line(j), tiles[3].line(j)};
                store_transposed(lines, lanes, r, own);
                continue;
            }
            for (std::size_t t = 0; t < now; ++t) {
                for (std::size_t lane = 0; lane < lanes; ++lane) {
                    store(own.at(lane, r + t), word_at(tiles[t].line(j), lane));
                }
            }
        }
    }
}

// Two's complement less its smallest value, as unsigned bytes.
void shift_bytes(const std::uint8_t *bytes, std::size_t n, std::uint8_t *out) {
    std::transform(bytes, bytes + n, out, [](std::uint8_t byte) {
        return static_cast<std::uint8_t>(byte ^ 0x80U);
    });
}

// A block of rows, rearranged, with the scales and zero points of each.
class Block {
public:
    Block(const RearrangedCodes &stored, const PackedShape &shape)
        : stored_(stored), shape_(shape), stride_(padded(shape.row_nbytes)),
          codes_(kBlockRows * stride_ + kLine),
          scale_(kBlockRows * shape.groups()), zero_(kBlockRows * shape.groups()) {}

    void load(std::size_t first, std::size_t count) {
        switch (stored_.layout) {
            case CodeLayout::gptq:
                transpose_words(stored_, shape_, first, count, rows());
                break;
            case CodeLayout::awq:
                rearrange_awq(stored_, shape_, first, count, rows());
                break;
            case CodeLayout::int8:
                for (std::size_t i = 0; i < count; ++i) {
                    const std::uint8_t *from = stored_.codes + (first + i) * shape_.cols;
                    shift_bytes(from, shape_.cols, rows().at(i, 0));
                }
                break;
        }
        load_factors(first, count);
    }

    PackedRow row(std::size_t i, std::uint8_t *out) {
        const std::size_t groups = shape_.groups();
        return {rows().at(i, 0),           shape_.cols, shape_.group, scale_.data() + i * groups,
                zero_.data() + i * groups, kIntegers,   out};
    }

private:
    // An odd number of cache lines: rows whose distance is a power of two would share few places in
    // the cache, and a line is written in parts.
    static std::size_t padded(std::size_t nbytes) {
        const std::size_t lines = (nbytes + kLine - 1) / kLine;
        return kLine * (lines | 1U);
    }

    Rows rows() {
        const auto address = reinterpret_cast<std::uintptr_t>(codes_.data());
        return {codes_.data() + (kLine - address % kLine) % kLine, stride_};
    }

    void load_factors(std::size_t first, std::size_t count) {
        const std::size_t groups = shape_.groups();
        const bool by_row = stored_.layout == CodeLayout::int8;
        for (std::size_t group = 0; group < groups; ++group) {
            for (std::size_t i = 0; i < count; ++i) {
                const std::size_t row = first + i;
                const std::size_t at = by_row ? row * groups + group : group * shape_.rows + row;
                scale_[i * groups + group] = load_f32(stored_.scale, stored_.scale_dtype, at);
            }
        }
        if (stored_.zero == nullptr) {
            const auto middle = static_cast<float>(std::uint32_t{1} << (stored_.bits - 1));
            std::fill(zero_.begin(), zero_.end(), middle);
        } else if (by_row) {
            for (std::size_t i = 0; i < count * groups; ++i) {
                zero_[i] = static_cast<float>(stored_.zero[first * groups + i] ^ 0x80U);
            }
        } else {
            load_packed_zeros(first, count);
        }
    }

    void load_packed_zeros(std::size_t first, std::size_t count) {
        const std::size_t groups = shape_.groups();
        const std::size_t per_word = 8 * kWord / stored_.bits;
        const std::uint32_t mask = (std::uint32_t{1} << stored_.bits) - 1;
        const bool in_order = stored_.layout == CodeLayout::gptq;
        // One in every code, carried from code to code as it was borrowed when it was taken off.
        const std::uint32_t ones = ~std::uint32_t{0} / mask * stored_.zero_offset;
        for (std::size_t group = 0; group < groups; ++group) {
            const std::size_t line = group * (shape_.rows / per_word) + first / per_word;
            for (std::size_t i = 0; i < count; i += per_word) {
                std::uint32_t word = word_at(stored_.zero, line + i / per_word) + ones;
                for (std::size_t j = 0; j < per_word; ++j, word >>= stored_.bits) {
                    const std::size_t row = i + (in_order ? j : kAwqRow[j]);
                    zero_[row * groups + group] = static_cast<float>(word & mask);
                }
            }
        }
    }

    const RearrangedCodes &stored_;
    const PackedShape &shape_;
    std::size_t stride_;
    std::vector<std::uint8_t> codes_;
    std::vector<float> scale_;
    std::vector<float> zero_;
};

template <DType dtype>
auto rounded(float value) {
    if constexpr (dtype == DType::bf16) {
        return f32_to_bf16(value);
    } else {
        return value;
    }
}

template <DType dtype>
using Value = decltype(rounded<dtype>(0.0F));

// Neighbours are of different groups: every group's sixteen values first, then one look-up a code.
template <DType dtype>
void scattered_nibbles(const PackedRow &row,
                       const std::int32_t *group_of,
                       std::vector<Value<dtype>> &values) {
    const std::size_t groups = values.size() / kNibbles;
    for (std::size_t group = 0; group < groups; ++group) {
        for (std::size_t code = 0; code < kNibbles; ++code) {
            values[group * kNibbles + code]
                = rounded<dtype>((row.numbers[code] - row.zero[group]) * row.scale[group]);
        }
    }
    constexpr std::size_t kNbytes = sizeof(Value<dtype>);
    for (std::size_t k = 0; k + 1 < row.cols; k += 2) {
        const unsigned byte = row.codes[k / 2];
        const auto low = static_cast<std::size_t>(group_of[k]) * kNibbles + (byte & 0xFU);
        const auto high = static_cast<std::size_t>(group_of[k + 1]) * kNibbles + (byte >> 4);
        store(row.out + kNbytes * k, values[low]);
        store(row.out + kNbytes * (k + 1), values[high]);
    }
}

template <DType dtype>
void scattered_bytes(const PackedRow &row, const std::int32_t *group_of) {
    for (std::size_t k = 0; k < row.cols; ++k) {
        const auto group = static_cast<std::size_t>(group_of[k]);
        const float number = static_cast<float>(row.codes[k]) - row.zero[group];
        store(row.out + sizeof(Value<dtype>) * k, rounded<dtype>(number * row.scale[group]));
    }
}

template <DType dtype>
PackedKernels::Decode choose(const PackedKernels &kernels, std::size_t bits) {
    if constexpr (dtype == DType::bf16) {
        return bits == 8 ? kernels.bytes_bf16 : kernels.nibbles_bf16;
    } else {
        return bits == 8 ? kernels.bytes_f32 : kernels.nibbles_f32;
    }
}

template <DType dtype>
void decode_blocks(const RearrangedCodes &stored,
                   std::uint8_t *out,
                   const PackedShape &shape,
                   const Execution &execution) {
    const auto decode = choose<dtype>(packed_kernels(execution.isa), stored.bits);
    const std::size_t out_row_nbytes = shape.cols * itemsize(dtype);
    const auto rows = [&](std::size_t begin, std::size_t end) {
        Block block(stored, shape);
        block.load(begin, end - begin);
        const bool is_scattered = stored.group_of != nullptr;
        std::vector<Value<dtype>> values(is_scattered ? shape.groups() * kNibbles : 0);
        for (std::size_t row = begin; row < end; ++row) {
            const PackedRow packed = block.row(row - begin, out + row * out_row_nbytes);
            if (!is_scattered) {
                decode(packed);
            } else if (stored.bits == 8) {
                scattered_bytes<dtype>(packed, stored.group_of);
            } else {
                scattered_nibbles<dtype>(packed, stored.group_of, values);
            }
        }
    };
    parallel_chunks(shape.rows, kBlockRows, execution.threads, rows);
}

} // namespace

void rearranged_decode(const RearrangedCodes &stored,
                       std::uint8_t *out,
                       DType out_dtype,
                       const PackedShape &shape,
                       const Execution &execution) {
    if (out_dtype == DType::bf16) {
        decode_blocks<DType::bf16>(stored, out, shape, execution);
    } else {
        decode_blocks<DType::f32>(stored, out, shape, execution);
    }
}

} // namespace reap_stream
