// A CUDA block on ordinary threads, as far as kernels/csrc/blocks.cuh needs it: what the kernels compute can be tested, and
// looked at by a thread sanitizer, where there is no GPU. Found in place of the real header by the include path.
#pragma once
#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(n)
#define __grid_constant__

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline std::barrier<>* block_barrier = nullptr;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }
inline void __threadfence() {}
inline void __threadfence_system() {}
template <typename T> T atomicAdd(T* p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
template <typename T> T atomicExch(T* p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
inline uint32_t atomicMax(uint32_t* p, uint32_t v) {
  uint32_t old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
  return old;
}
template <typename T> T __ldcs(const T* p) {
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}

// One block after another, so that what is shared in a block may be static.
template <typename Kernel> void run_grid(dim3 grid, unsigned threads, Kernel kernel) {
  gridDim = grid;
  blockDim = dim3{threads, 1, 1};
  for (unsigned y = 0; y < grid.y; y++)
    for (unsigned x = 0; x < grid.x; x++) {
      std::barrier<> barrier(threads);
      block_barrier = &barrier;
      std::vector<std::thread> all;
      for (unsigned t = 0; t < threads; t++)
        all.emplace_back([=] {
          threadIdx = dim3{t, 0, 0};
          blockIdx = dim3{x, y, 0};
          kernel();
        });
      for (std::thread& t : all) t.join();
    }
}
