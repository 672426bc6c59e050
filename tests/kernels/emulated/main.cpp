// The GPU kernels of kernels/csrc/blocks.cuh on ordinary threads; see cuda_runtime.h beside this file.
#include "blocks.cuh"

using namespace pd;

template <bool GATHER, int P>
void go(bool wide, dim3 grid, unsigned threads, const Pages& pages, const Job& job, const Sums& sums, uint64_t* result) {
  if (wide && P == 0) run_grid(grid, threads, [&] { move<uint4, GATHER, P>(pages, job, sums, result); });
  else run_grid(grid, threads, [&] { move<uint2, GATHER, P>(pages, job, sums, result); });
}

template <bool GATHER>
void pick(bool wide, dim3 grid, unsigned threads, const Pages& pages, const Job& job, const Sums& sums, uint64_t* result) {
  switch (pages.payload) {
    case 0: return go<GATHER, 0>(wide, grid, threads, pages, job, sums, result);
    case BF16: return go<GATHER, BF16>(wide, grid, threads, pages, job, sums, result);
    case FP16: return go<GATHER, FP16>(wide, grid, threads, pages, job, sums, result);
    case FP32: return go<GATHER, FP32>(wide, grid, threads, pages, job, sums, result);
    case BF16 | INT8: return go<GATHER, BF16 | INT8>(wide, grid, threads, pages, job, sums, result);
    case FP16 | INT8: return go<GATHER, FP16 | INT8>(wide, grid, threads, pages, job, sums, result);
    default: return go<GATHER, FP32 | INT8>(wide, grid, threads, pages, job, sums, result);
  }
}

// numbers: strides of block, head, token, part; sizes: layers, heads, parts, part_bytes, block_tokens, payload.
extern "C" void emulate(int gather, int wide, unsigned grid_x, unsigned grid_y, unsigned threads, const uint64_t* bases, const int64_t* numbers,
                        const uint32_t* sizes, const int32_t* blocks, int count, uint32_t tokens, uint64_t stride, unsigned char* chunk,
                        uint64_t shard_bytes, uint64_t* digests) {
  const Pages pages{bases, numbers[0], numbers[1], numbers[2], numbers[3], sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  Job job;
  job.chunk = chunk;
  job.stride = stride;
  job.tokens = tokens;
  for (int i = 0; i < count; i++) job.blocks[i] = blocks[i];
  std::vector<unsigned long long> by_head(pages.heads, 0);
  unsigned arrived = 0;
  const Sums sums{by_head.data(), &arrived};
  const dim3 grid{grid_x, grid_y, 1};
  if (gather) pick<true>(wide, grid, threads, pages, job, sums, digests);
  else pick<false>(wide, grid, threads, pages, job, sums, digests);
  for (uint32_t h = 0; h < pages.heads; h++) digests[h] = finish(digests[h], shard_bytes);
}
