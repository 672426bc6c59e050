// The chunk digest, defined once for every device.
//
// Data is read as little-endian 64-bit words w[0..n), the last one padded with zeros. Each word is mixed together with its
// position and the results are added modulo 2^64, so that any number of threads may share the work in any order:
//
//   digest = finish( sum over i of mix(w[i] + (i + 1) * STEP),  length in bytes )
//
// mix is a bijection on 64-bit words, hence a change inside one word is always detected; changes in several words, moved
// or swapped words collide with probability about 2^-64. It guards against damage, not against an attacker.
#pragma once
#if defined(__CUDACC_RTC__)  // it has no standard library
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef signed char int8_t;
typedef long int64_t;
typedef unsigned long uint64_t;
#else
#include <cstdint>
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define PD_INLINE __host__ __device__ __forceinline__
#else
#define PD_INLINE inline __attribute__((always_inline))
#endif

namespace pd {

constexpr uint64_t STEP = 0x9E3779B97F4A7C15ull;   // 2^64 / golden ratio, odd: positions spread over all bits
constexpr uint64_t MUL_A = 0xD6E8FEB86659FD93ull;  // the odd multipliers make mix a bijection
constexpr uint64_t MUL_B = 0xA0761D6478BD642Full;

PD_INLINE uint64_t mix(uint64_t x) {
  x ^= x >> 32;
  x *= MUL_A;
  x ^= x >> 29;
  x *= MUL_B;
  x ^= x >> 32;
  return x;
}

PD_INLINE uint64_t finish(uint64_t sum, uint64_t bytes) { return mix(sum ^ (bytes * STEP)); }

}  // namespace pd
