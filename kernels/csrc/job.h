// What the host part (lanes.cpp) and the kernels (blocks.cuh) both know: the arguments of a kernel, and which kernels there are.
#pragma once
#include "rounded.h"

namespace pd {

constexpr int THREADS = 256;
constexpr int MAX_BLOCKS = 512;

// Strides are in bytes and the same in all layers. A token of one head has `parts` runs of `part_bytes`.
struct Pages {
  const uint64_t* bases;  // address of block 0, head 0 of each layer; device memory
  int64_t block, head, token, part;
  uint32_t layers, heads, parts, part_bytes, block_tokens;
  uint32_t payload;  // its code (rounded.h)
};

struct Job {
  unsigned char* chunk;  // first shard
  uint64_t stride;       // from one shard to the next
  uint32_t tokens;
  int32_t blocks[MAX_BLOCKS];  // by position in the chunk; negative: scatter leaves that block alone (the digest does not)
};

// Per-direction scratch: kernels of one direction run one after another on one stream.
struct Sums {
  unsigned long long* by_head;  // zero between launches
  unsigned* arrived;            // zero between launches
};

// One kernel each for gather and scatter (pd_gather_plain, ...): its name, what a thread moves at once, the payload. Its place in
// this list is the payload's code; WIDE is one that no payload has.
#define PD_KERNELS(KERNEL)               \
  KERNEL(plain, uint2, 0)                \
  KERNEL(bf16_fp8, uint2, BF16)          \
  KERNEL(fp16_fp8, uint2, FP16)          \
  KERNEL(fp32_fp8, uint2, FP32)          \
  KERNEL(wide, uint4, 0)                 \
  KERNEL(bf16_int8, uint2, BF16 | INT8)  \
  KERNEL(fp16_int8, uint2, FP16 | INT8)  \
  KERNEL(fp32_int8, uint2, FP32 | INT8)
constexpr uint32_t WIDE = INT8, KINDS = 8;

}  // namespace pd
