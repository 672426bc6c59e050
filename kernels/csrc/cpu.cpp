// The CPU path: copy and digest in one pass over the bytes. Built by kernels/build.py, called through ctypes (which
// releases the GIL). Every value is loaded once, stored and digested from the register, so the digest always describes
// the bytes that were stored, even if the source is being written at the same time.
#include <cstddef>
#include <cstring>

#include "digest.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

enum Mode { DIGEST_ONLY, COPY };

// Sum of mixed words of src[0..bytes), whose first word has position `first`. bytes may end in a partial word.
template <Mode mode>
uint64_t pass(const unsigned char* src, unsigned char* dst, size_t bytes, uint64_t first) {
  size_t words = bytes / 8, i = 0;
  uint64_t sum = 0;
#if defined(__AVX512DQ__)
  const __m512i a = _mm512_set1_epi64((long long)pd::MUL_A), b = _mm512_set1_epi64((long long)pd::MUL_B);
  const __m512i stride = _mm512_set1_epi64((long long)(8 * pd::STEP));
  uint64_t lane[8];
  for (int k = 0; k < 8; k++) lane[k] = (first + 1 + k) * pd::STEP;
  __m512i pos = _mm512_loadu_si512(lane), acc = _mm512_setzero_si512();
  const bool stream = mode == COPY && bytes >= (64 << 10) && (reinterpret_cast<uintptr_t>(dst) & 63) == 0;
  for (; i + 8 <= words; i += 8) {
    __m512i w = _mm512_loadu_si512(src + 8 * i);
    if (mode == COPY) {
      // Large copies go around the cache: the arena's lines are not read back soon, and no line has to be fetched to be overwritten.
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
  sum = (uint64_t)_mm512_reduce_add_epi64(acc);
#endif
  for (; i < words; i++) {
    uint64_t w;
    std::memcpy(&w, src + 8 * i, 8);
    if (mode == COPY) std::memcpy(dst + 8 * i, &w, 8);
    sum += pd::mix(w + (first + i + 1) * pd::STEP);
  }
  if (size_t rest = bytes - 8 * words) {
    uint64_t w = 0;
    std::memcpy(&w, src + 8 * words, rest);
    if (mode == COPY) std::memcpy(dst + 8 * words, &w, rest);
    sum += pd::mix(w + (first + words + 1) * pd::STEP);
  }
  return sum;
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

uint64_t pd_digest(const unsigned char* from, size_t bytes) { return pd::finish(pass<DIGEST_ONLY>(from, nullptr, bytes, 0), bytes); }

}
