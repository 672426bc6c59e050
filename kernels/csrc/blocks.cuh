// Gather and scatter between an engine's paged KV cache and the canonical chunk, with the digest made in the same pass.
//
// A chunk is cut into shards, one per KV head; a shard is [layer][token][K then V]. The paged side is described by strides,
// so one kernel serves every layout whose K and V of one token and head are one or two contiguous runs of bytes.
#pragma once
#include "gpu.h"

#include "digest.h"

namespace pd {

constexpr int THREADS = 1024;  // at most; a kernel that is to be short uses blocks of 256
constexpr int UNROLL = 4;
constexpr int MAX_BLOCKS = 512;

// Strides are in bytes and the same in all layers. A token of one head has `parts` runs of `part_bytes`.
struct Pages {
  const uint64_t* bases;  // address of block 0, head 0 of each layer; device memory
  int64_t block, head, token, part;
  uint32_t layers, heads, parts, part_bytes, block_tokens;
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

template <typename V> struct Words;
template <> struct Words<uint4> {
  static constexpr int count = 2;
  static PD_INLINE uint64_t get(const uint4& v, int i) {
    return i ? (uint64_t)v.z | (uint64_t)v.w << 32 : (uint64_t)v.x | (uint64_t)v.y << 32;
  }
};
template <> struct Words<uint2> {
  static constexpr int count = 1;
  static PD_INLINE uint64_t get(const uint2& v, int) { return (uint64_t)v.x | (uint64_t)v.y << 32; }
};

// Bytes of one head's shard, and the sum of their mixed words, by all threads of one row of blocks.
template <typename V, bool GATHER>
__device__ __forceinline__ uint64_t move_head(const Pages& pages, const Job& job, uint32_t head) {
  const uint32_t per_part = pages.part_bytes / sizeof(V), per_token = pages.parts * per_part;
  const uint32_t per_layer = job.tokens * per_token, total = pages.layers * per_layer, threads = blockDim.x;
  unsigned char* const shard = job.chunk + head * job.stride;
  uint64_t sum = 0;
  for (uint32_t start = blockIdx.x * (threads * UNROLL); start < total; start += gridDim.x * (threads * UNROLL)) {
    V value[UNROLL];
    unsigned char* paged[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const uint32_t v = start + u * threads + threadIdx.x;
      paged[u] = nullptr;
      if (v >= total) continue;
      const uint32_t layer = v / per_layer, in_layer = v - layer * per_layer;
      const uint32_t token = in_layer / per_token, in_token = in_layer - token * per_token;
      const uint32_t part = in_token / per_part, column = in_token - part * per_part;
      const uint32_t slot = token / pages.block_tokens;
      const int32_t block = job.blocks[slot];
      if (block >= 0)
        paged[u] = reinterpret_cast<unsigned char*>(pages.bases[layer]) + block * pages.block + head * pages.head +
                   (token - slot * pages.block_tokens) * pages.token + part * pages.part + column * sizeof(V);
      value[u] = GPU_LOAD_ONCE(reinterpret_cast<const V*>(GATHER ? paged[u] : shard + (uint64_t)v * sizeof(V)));
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const uint32_t v = start + u * threads + threadIdx.x;
      if (v >= total) continue;
      if (GATHER) *reinterpret_cast<V*>(shard + (uint64_t)v * sizeof(V)) = value[u];
      else if (paged[u]) *reinterpret_cast<V*>(paged[u]) = value[u];
#pragma unroll
      for (int i = 0; i < Words<V>::count; i++)
        sum += mix(Words<V>::get(value[u], i) + ((uint64_t)v * Words<V>::count + i + 1) * STEP);
    }
  }
  return sum;
}

// grid: (any, 1 to heads), block: a power of two up to THREADS. `result` gets the sum of each head's shard, written by the
// last block to finish.
template <typename V, bool GATHER>
__global__ void __launch_bounds__(THREADS) move(const Pages pages, const GPU_GRID_CONSTANT Job job, Sums sums, uint64_t* result) {
  __shared__ uint64_t partial[THREADS];
  for (uint32_t head = blockIdx.y; head < pages.heads; head += gridDim.y) {
    partial[threadIdx.x] = move_head<V, GATHER>(pages, job, head);
    __syncthreads();
    for (uint32_t width = blockDim.x / 2; width; width /= 2) {
      if (threadIdx.x < width) partial[threadIdx.x] += partial[threadIdx.x + width];
      __syncthreads();
    }
    if (threadIdx.x == 0) atomicAdd(&sums.by_head[head], (unsigned long long)partial[0]);
  }
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(sums.arrived, 1u) == gridDim.x * gridDim.y - 1) {
      for (uint32_t h = 0; h < pages.heads; h++) result[h] = atomicExch(&sums.by_head[h], 0ull);
      atomicExch(sums.arrived, 0u);
      __threadfence_system();
    }
  }
}

}  // namespace pd
