// The rounded payloads, defined once for every device: half the bytes of a 16-bit KV cache, at the price of rounding.
//
// Values are stored in rows: K and V of one token of one head, or as many values of an opaque block. A stored row is one word of
// scales and then one byte a value. A row is cut into up to eight equal groups of whole words of values; byte g of the first word
// is the scale of group g:
//
//   fp8:   value = e4m3 * 2^(scale - 127)       4 bits of exponent, 3 of fraction, largest 448
//   int8:  value = integer * 2^(scale - 127)    from -127 to 127
//
// The scale is the smallest for which the group's largest value still fits. Powers of two only, so that scaling rounds nothing: what
// comes out is exact in every format a cache has, and is the same again when it is stored once more. What is not finite is left
// out of the scale and stored as NaN, the same one always.
#pragma once
#include "digest.h"
#if !defined(__CUDACC_RTC__)
#include <cmath>
#include <cstring>
#endif

namespace pd {

// A payload's code: the format of the cache's values, plus INT8 where they are stored as integers. 0: the bytes as they are.
enum : int { BF16 = 1, FP16 = 2, FP32 = 3, FORMAT = 3, INT8 = 4 };

constexpr uint32_t SCALE_MIN = 10;  // below it subnormal numbers would occur, which some devices round to zero

PD_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
PD_INLINE float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

PD_INLINE float from_half(uint16_t h) {
#if defined(__CUDA_ARCH__)  // cuda_fp16.h is not where only the run-time compiler is
  float whole;
  asm("cvt.f32.f16 %0, %1;" : "=f"(whole) : "h"(h));
  return whole;
#else
  _Float16 x;
  memcpy(&x, &h, 2);
  return (float)x;
#endif
}
PD_INLINE uint16_t to_half(float x) {
  const float largest = 65504.0f;  // rounding may have gone past it
  x = x > largest ? largest : x < -largest ? -largest : x;
#if defined(__CUDA_ARCH__)
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return half;
#else
  const _Float16 h = (_Float16)x;
  uint16_t u;
  memcpy(&u, &h, 2);
  return u;
#endif
}

// A value in a cache's own format, and back.
template <int F> struct Value;
template <> struct Value<BF16> {
  using type = uint16_t;
  static PD_INLINE float get(uint16_t v) { return float_of((uint32_t)v << 16); }
  static PD_INLINE uint16_t put(float x) { return (uint16_t)(bits_of(x) >> 16); }  // exact: no more than 8 bits are used
  static PD_INLINE uint16_t nan() { return 0x7fc0; }
};
template <> struct Value<FP16> {
  using type = uint16_t;
  static PD_INLINE float get(uint16_t v) { return from_half(v); }
  static PD_INLINE uint16_t put(float x) { return to_half(x); }
  static PD_INLINE uint16_t nan() { return 0x7e00; }
};
template <> struct Value<FP32> {
  using type = float;
  static PD_INLINE float get(float v) { return v; }
  static PD_INLINE float put(float x) { return x; }
  static PD_INLINE float nan() { return float_of(0x7fc00000u); }
};

PD_INLINE uint32_t groups_of(uint32_t values) {
  uint32_t groups = 8;
  while (values % (8 * groups)) groups /= 2;
  return groups;
}

// What a value counts in its group's scale: its bits without the sign, 0 if it is not finite.
PD_INLINE uint32_t magnitude(float x) {
  const uint32_t a = bits_of(x) & 0x7fffffffu;
  return a < 0x7f800000u ? a : 0;
}

// fp8: 448 = 1.75 * 2^8; int8: 127 = 1.984375 * 2^6. A larger fraction carries into the exponent.
template <int P> PD_INLINE uint32_t scale_of(uint32_t largest) {
  const int32_t scale = P & INT8 ? (int32_t)((largest + 0x1ffffu) >> 23) - 6 : (int32_t)((largest + 0x1fffffu) >> 23) - 8;
  return scale < (int32_t)SCALE_MIN ? SCALE_MIN : (uint32_t)scale;
}

PD_INLINE float scale_down(uint32_t scale) { return float_of((254 - scale) << 23); }  // 2^(127 - scale)
PD_INLINE float scale_up(uint32_t scale) { return float_of(scale << 23); }            // 2^(scale - 127)

// `x` is scaled already. Rounds to nearest, ties to even.
template <int P> PD_INLINE uint8_t encode(float x) {
  const uint32_t bits = bits_of(x), a = bits & 0x7fffffffu;
  if (P & INT8) {
    const float whole = (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: the sum has no bits for a fraction
    const float held = whole > 127.0f ? 127.0f : whole < -127.0f ? -127.0f : whole;
    return (uint8_t)(a >= 0x7f800000u ? -128 : (int32_t)held);
  }
  uint32_t normal = ((a + 0x7ffffu + ((a >> 20) & 1)) >> 20) - 960;
  normal = normal > 0x7e ? 0x7e : normal;
  const uint32_t small = bits_of(float_of(a < 0x3c800000u ? a : 0) + 16384.0f) - 0x46800000u;  // steps of 2^-9
  const uint32_t code = (a < 0x3c800000u ? small : normal) | ((bits >> 24) & 0x80);
  return (uint8_t)(a >= 0x7f800000u ? 0x7f : code);
}

// The value in the cache's format; devices differ in what arithmetic makes of NaN.
template <int P> PD_INLINE typename Value<P & FORMAT>::type decode(uint8_t code, float up) {
  using V = Value<P & FORMAT>;
  if (P & INT8) return code == 0x80 ? V::nan() : V::put((float)(int8_t)code * up);
  const uint32_t sign = (uint32_t)(code & 0x80) << 24, magnitude = code & 0x7f;
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  const uint32_t small = bits_of((float)(magnitude & 7) * 0.001953125f);
  const float x = float_of((magnitude < 8 ? small : normal) | sign) * up;
  return magnitude == 0x7f ? V::nan() : V::put(x);
}

}  // namespace pd
