// The CPU path: copy and digest in one pass over the bytes. Built by kernels/build.py, called through ctypes (which
// releases the GIL). Every value is loaded once, stored and digested from the register, so the digest always describes
// the bytes that were stored, even if the source is being written at the same time.
#include <cstddef>
#include <cstring>
#include <type_traits>

#include "digest.h"
#include "rounded.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

enum Mode { DIGEST_ONLY, COPY };

#if defined(__AVX512DQ__)
// How far ahead the source is asked for: further than the processor looks by itself, since multiplying leaves it few loads
// under way. 512 bytes were slower than none, 1 to 4 KiB faster.
constexpr size_t AHEAD = 2048;
#endif

// Word i of a pass, of which `bytes` are there.
template <Mode mode>
PD_INLINE uint64_t word(const unsigned char* src, unsigned char* dst, uint64_t first, size_t i, size_t bytes = 8) {
  uint64_t w = 0;
  std::memcpy(&w, src + 8 * i, bytes);
  if (mode == COPY) std::memcpy(dst + 8 * i, &w, bytes);
  return pd::mix(w + (first + i + 1) * pd::STEP);
}

// Sum of mixed words of src[0..bytes), whose first word has position `first`. bytes may end in a partial word.
template <Mode mode>
uint64_t pass(const unsigned char* src, unsigned char* dst, size_t bytes, uint64_t first) {
  size_t words = bytes / 8, i = 0;
  uint64_t sum = 0;
#if defined(__AVX512DQ__)
  // Large copies go around the cache: the arena's lines are not read back soon, and no line has to be fetched to be
  // overwritten. That wants whole lines, so the words before the first one are done by themselves.
  const bool stream = mode == COPY && bytes >= (64 << 10) && (reinterpret_cast<uintptr_t>(dst) & 7) == 0;
  if (stream)
    for (; reinterpret_cast<uintptr_t>(dst + 8 * i) & 63; i++) sum += word<mode>(src, dst, first, i);
  const __m512i a = _mm512_set1_epi64((long long)pd::MUL_A), b = _mm512_set1_epi64((long long)pd::MUL_B);
  const __m512i stride = _mm512_set1_epi64((long long)(8 * pd::STEP));
  uint64_t lane[8];
  for (int k = 0; k < 8; k++) lane[k] = (first + i + 1 + k) * pd::STEP;
  __m512i pos = _mm512_loadu_si512(lane), acc = _mm512_setzero_si512();
  for (; i + 8 <= words; i += 8) {
    if (mode == COPY) _mm_prefetch(reinterpret_cast<const char*>(src + 8 * i + AHEAD), _MM_HINT_T0);
    __m512i w = _mm512_loadu_si512(src + 8 * i);
    if (mode == COPY) {
      if (stream) _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + 8 * i), w);
      else _mm512_storeu_si512(dst + 8 * i, w);
    }
    __m512i x = _mm512_add_epi64(w, pos);
    pos = _mm512_add_epi64(pos, stride);
    x = _mm512_xor_si512(x, _mm512_srli_epi64(x, 32));
    x = _mm512_mullo_epi64(x, a);
    x = _mm512_xor_si512(x, _mm512_srli_epi64(x, 29));
    x = _mm512_mullo_epi64(x, b);
    x = _mm512_xor_si512(x, _mm512_srli_epi64(x, 32));
    acc = _mm512_add_epi64(acc, x);
  }
  if (stream) _mm_sfence();
  sum += (uint64_t)_mm512_reduce_add_epi64(acc);
#endif
  for (; i < words; i++) sum += word<mode>(src, dst, first, i);
  if (size_t rest = bytes - 8 * words) sum += word<mode>(src, dst, first, words, rest);
  return sum;
}

constexpr size_t SOME_ROWS = 16, MOST_VALUES = 4096;  // rows at a time; values of a row, at most

template <int P> using Stored = typename pd::Value<P & pd::FORMAT>::type;

// Rows of values in the cache's format -> stored rows, one after another.
template <int P>
void shrink(const unsigned char* from, size_t rows, uint32_t values, unsigned char* to) {
  using T = Stored<P>;
  const uint32_t groups = pd::groups_of(values), width = values / groups;
  for (size_t r = 0; r < rows; r++, from += values * sizeof(T), to += 8 + values) {
    std::memset(to, 0, 8);
    for (uint32_t g = 0; g < groups; g++) {
      float x[MOST_VALUES];
      T raw[MOST_VALUES];
      std::memcpy(raw, from + (size_t)g * width * sizeof(T), width * sizeof(T));
      uint32_t largest = 0;
      for (uint32_t i = 0; i < width; i++) {
        x[i] = pd::Value<P & pd::FORMAT>::get(raw[i]);
        const uint32_t m = pd::magnitude(x[i]);
        largest = m > largest ? m : largest;
      }
      const uint32_t scale = pd::scale_of<P>(largest);
      const float down = pd::scale_down(scale);
      to[g] = (unsigned char)scale;
      unsigned char* const out = to + 8 + g * width;
      for (uint32_t i = 0; i < width; i++) out[i] = pd::encode<P>(x[i] * down);
    }
  }
}

template <int P>
void grow(const unsigned char* from, size_t rows, uint32_t values, unsigned char* to) {
  using T = Stored<P>;
  const uint32_t groups = pd::groups_of(values), width = values / groups;
  for (size_t r = 0; r < rows; r++, from += 8 + values, to += values * sizeof(T))
    for (uint32_t g = 0; g < groups; g++) {
      T out[MOST_VALUES];
      const float up = pd::scale_up(from[g]);
      for (uint32_t i = 0; i < width; i++) out[i] = pd::decode<P>(from[8 + g * width + i], up);
      std::memcpy(to + (size_t)g * width * sizeof(T), out, width * sizeof(T));
    }
}

template <int P>
uint64_t gather_rounded(const uint64_t* from, size_t count, size_t rows, uint32_t values, unsigned char* to) {
  const size_t row = 8 + values, in = values * sizeof(Stored<P>);
  alignas(64) unsigned char some[SOME_ROWS * (8 + MOST_VALUES)];
  uint64_t sum = 0;
  for (size_t k = 0; k < count; k++)
    for (size_t r = 0; r < rows; r += SOME_ROWS) {
      const size_t n = rows - r < SOME_ROWS ? rows - r : SOME_ROWS, at = (k * rows + r) * row;
      shrink<P>(reinterpret_cast<const unsigned char*>(from[k]) + r * in, n, values, some);
      sum += pass<COPY>(some, to + at, n * row, at / 8);
    }
  return pd::finish(sum, count * rows * row);
}

// Each stored row is read once, so that what is digested is what is used.
template <int P>
uint64_t scatter_rounded(const unsigned char* from, const uint64_t* to, size_t count, size_t rows, uint32_t values) {
  const size_t row = 8 + values, out = values * sizeof(Stored<P>);
  alignas(64) unsigned char some[SOME_ROWS * (8 + MOST_VALUES)];
  uint64_t sum = 0;
  for (size_t k = 0; k < count; k++)
    for (size_t r = 0; r < rows; r += SOME_ROWS) {
      const size_t n = rows - r < SOME_ROWS ? rows - r : SOME_ROWS, at = (k * rows + r) * row;
      sum += pass<COPY>(from + at, some, n * row, at / 8);
      if (to[k]) grow<P>(some, n, values, reinterpret_cast<unsigned char*>(to[k]) + r * out);
    }
  return pd::finish(sum, count * rows * row);
}

// work(code), with the payload's code as a type.
template <typename Work> uint64_t with(int payload, Work work) {
  switch (payload) {
    case pd::BF16: return work(std::integral_constant<int, pd::BF16>());
    case pd::FP16: return work(std::integral_constant<int, pd::FP16>());
    case pd::FP32: return work(std::integral_constant<int, pd::FP32>());
    case pd::BF16 | pd::INT8: return work(std::integral_constant<int, pd::BF16 | pd::INT8>());
    case pd::FP16 | pd::INT8: return work(std::integral_constant<int, pd::FP16 | pd::INT8>());
    default: return work(std::integral_constant<int, pd::FP32 | pd::INT8>());
  }
}

}  // namespace

extern "C" {

// Copies `count` pieces of `bytes` each (a multiple of 8) from the addresses in `from` to one contiguous area; returns its digest.
uint64_t pd_gather(const uint64_t* from, size_t count, size_t bytes, unsigned char* to) {
  uint64_t sum = 0;
  for (size_t k = 0; k < count; k++)
    sum += pass<COPY>(reinterpret_cast<const unsigned char*>(from[k]), to + k * bytes, bytes, k * (bytes / 8));
  return pd::finish(sum, count * bytes);
}

// The way back. An address of 0 skips that piece's copy but not its digest: the digest is always that of the whole area.
uint64_t pd_scatter(const unsigned char* from, const uint64_t* to, size_t count, size_t bytes) {
  uint64_t sum = 0;
  for (size_t k = 0; k < count; k++) {
    unsigned char* dst = reinterpret_cast<unsigned char*>(to[k]);
    sum += dst ? pass<COPY>(from + k * bytes, dst, bytes, k * (bytes / 8)) : pass<DIGEST_ONLY>(from + k * bytes, nullptr, bytes, k * (bytes / 8));
  }
  return pd::finish(sum, count * bytes);
}

// The same with a rounded payload: pieces of `rows` rows of `values` values (at most 4096, a multiple of 8); `payload`: its code.
uint64_t pd_gather_rounded(const uint64_t* from, size_t count, size_t rows, uint32_t values, int payload, unsigned char* to) {
  return with(payload, [=](auto code) { return gather_rounded<code.value>(from, count, rows, values, to); });
}

uint64_t pd_scatter_rounded(const unsigned char* from, const uint64_t* to, size_t count, size_t rows, uint32_t values, int payload) {
  return with(payload, [=](auto code) { return scatter_rounded<code.value>(from, to, count, rows, values); });
}

uint64_t pd_digest(const unsigned char* from, size_t bytes) { return pd::finish(pass<DIGEST_ONLY>(from, nullptr, bytes, 0), bytes); }

}
