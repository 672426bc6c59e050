// Gather and scatter between an engine's paged KV cache and the canonical chunk, with the digest made in the same pass.
//
// A chunk is cut into shards, one per KV head; a shard is [layer][token][K then V]. The paged side is described by strides,
// so one kernel serves every layout whose K and V of one token and head are one or two contiguous runs of bytes.
#pragma once
#include "gpu.h"
#include "job.h"

namespace pd {

constexpr int UNROLL = 4;

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

// The rounded payloads. TEAM threads work on one row of the chunk, which is one token of one layer.
constexpr uint32_t TEAM = 32;

// Eight values of one token and head.
template <int P> struct Eight {
  using T = typename Value<P & FORMAT>::type;
  static constexpr int words = sizeof(T);  // of 8 bytes
  uint2 raw[words];
  __device__ __forceinline__ void read(const unsigned char* p) {
    for (int i = 0; i < words; i++) raw[i] = reinterpret_cast<const uint2*>(p)[i];
  }
  __device__ __forceinline__ void write(unsigned char* p) const {
    for (int i = 0; i < words; i++) reinterpret_cast<uint2*>(p)[i] = raw[i];
  }
  __device__ __forceinline__ T* values() { return reinterpret_cast<T*>(raw); }
};

struct Row {
  uint32_t values, words, groups, width, words_a_part;  // words: of 8 values; width: words of a group
  __device__ __forceinline__ Row(const Pages& p, uint32_t value_bytes) {
    words_a_part = p.part_bytes / (8 * value_bytes);
    words = p.parts * words_a_part;
    values = words * 8;
    groups = groups_of(values);
    width = words / groups;
  }
};

// Where the paged side of a row begins (null where scatter leaves the block alone); its words of one part follow each other.
__device__ __forceinline__ unsigned char* paged_row(const Pages& pages, const Job& job, uint32_t head, uint32_t row) {
  const uint32_t layer = row / job.tokens, token = row - layer * job.tokens, slot = token / pages.block_tokens;
  const int32_t block = job.blocks[slot];
  if (block < 0) return nullptr;
  return reinterpret_cast<unsigned char*>(pages.bases[layer]) + block * pages.block + head * pages.head +
         (token - slot * pages.block_tokens) * pages.token;
}

// All threads of the block come here the same number of times: they meet at barriers.
template <int P>
__device__ __forceinline__ uint64_t shrink_head(const Pages& pages, const Job& job, uint32_t head, uint32_t (*largest)[8]) {
  constexpr uint32_t value_bytes = sizeof(typename Value<P & FORMAT>::type);
  const Row shape(pages, value_bytes);
  const uint32_t team = threadIdx.x / TEAM, lane = threadIdx.x % TEAM, teams = blockDim.x / TEAM, rows = pages.layers * job.tokens;
  uint64_t* const shard = reinterpret_cast<uint64_t*>(job.chunk + head * job.stride);
  uint64_t sum = 0;
  for (uint32_t start = blockIdx.x * teams; start < rows; start += gridDim.x * teams) {
    const uint32_t row = start + team;
    const bool mine = row < rows;
    const unsigned char* const paged = mine ? paged_row(pages, job, head, row) : nullptr;
    if (lane < 8) largest[team][lane] = 0;
    __syncthreads();
    for (uint32_t w = lane; mine && w < shape.words; w += TEAM) {
      Eight<P> eight;
      const uint32_t part = w / shape.words_a_part;
      eight.read(paged + part * pages.part + (w - part * shape.words_a_part) * 8 * value_bytes);
      uint32_t m = 0;
      for (int i = 0; i < 8; i++) {
        const uint32_t one = magnitude(Value<P & FORMAT>::get(eight.values()[i]));
        m = one > m ? one : m;
      }
      atomicMax(&largest[team][w / shape.width], m);
    }
    __syncthreads();
    uint64_t* const out = shard + (uint64_t)row * (shape.words + 1);
    const uint64_t position = (uint64_t)row * (shape.words + 1) + 1;
    for (uint32_t w = lane; mine && w < shape.words; w += TEAM) {
      Eight<P> eight;
      const uint32_t part = w / shape.words_a_part;
      eight.read(paged + part * pages.part + (w - part * shape.words_a_part) * 8 * value_bytes);
      const float down = scale_down(scale_of<P>(largest[team][w / shape.width]));
      uint64_t word = 0;
      for (int i = 0; i < 8; i++) word |= (uint64_t)encode<P>(Value<P & FORMAT>::get(eight.values()[i]) * down) << (8 * i);
      out[1 + w] = word;
      sum += mix(word + (position + 1 + w) * STEP);
    }
    if (mine && lane == 0) {
      uint64_t scales = 0;
      for (uint32_t g = 0; g < shape.groups; g++) scales |= (uint64_t)scale_of<P>(largest[team][g]) << (8 * g);
      out[0] = scales;
      sum += mix(scales + position * STEP);
    }
    __syncthreads();
  }
  return sum;
}

template <int P>
__device__ __forceinline__ uint64_t grow_head(const Pages& pages, const Job& job, uint32_t head) {
  constexpr uint32_t value_bytes = sizeof(typename Value<P & FORMAT>::type);
  const Row shape(pages, value_bytes);
  const uint32_t team = threadIdx.x / TEAM, lane = threadIdx.x % TEAM, teams = blockDim.x / TEAM, rows = pages.layers * job.tokens;
  const uint64_t* const shard = reinterpret_cast<const uint64_t*>(job.chunk + head * job.stride);
  uint64_t sum = 0;
  for (uint32_t row = blockIdx.x * teams + team; row < rows; row += gridDim.x * teams) {
    const uint64_t first = (uint64_t)row * (shape.words + 1);
    const uint64_t scales = shard[first];
    if (lane == 0) sum += mix(scales + (first + 1) * STEP);
    unsigned char* const paged = paged_row(pages, job, head, row);
    for (uint32_t w = lane; w < shape.words; w += TEAM) {
      const uint64_t word = shard[first + 1 + w];
      sum += mix(word + (first + 2 + w) * STEP);
      if (!paged) continue;
      const float up = scale_up((uint32_t)(scales >> (8 * (w / shape.width))) & 0xff);
      Eight<P> eight;
      for (int i = 0; i < 8; i++) eight.values()[i] = decode<P>((uint8_t)(word >> (8 * i)), up);
      const uint32_t part = w / shape.words_a_part;
      eight.write(paged + part * pages.part + (w - part * shape.words_a_part) * 8 * value_bytes);
    }
  }
  return sum;
}

// grid: (any, 1 to heads), block: THREADS. `result` gets the sum of each head's shard, written by the last block to finish.
// P 0: the bytes as they are, sizeof(V) at a time.
template <typename V, bool GATHER, int P>
__device__ __forceinline__ void move(const Pages& pages, const Job& job, const Sums& sums, uint64_t* result) {
  __shared__ uint64_t partial[THREADS];
  __shared__ uint32_t largest[P && GATHER ? THREADS / TEAM : 1][8];
  for (uint32_t head = blockIdx.y; head < pages.heads; head += gridDim.y) {
    if constexpr (P == 0) partial[threadIdx.x] = move_head<V, GATHER>(pages, job, head);
    else if constexpr (GATHER) partial[threadIdx.x] = shrink_head<P>(pages, job, head, largest);
    else partial[threadIdx.x] = grow_head<P>(pages, job, head);
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
    }
  }
}

#define PD_KERNEL(way, GATHER, name, V, P)                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS) pd_##way##_##name(const Pages pages, const GPU_GRID_CONSTANT Job job, \
                                                                          Sums sums, uint64_t* result) {                  \
    move<V, GATHER, P>(pages, job, sums, result);                                                                        \
  }
#define PD_BOTH(name, V, P) PD_KERNEL(gather, true, name, V, P) PD_KERNEL(scatter, false, name, V, P)
PD_KERNELS(PD_BOTH)

}  // namespace pd
