// The GPU kernels of kernels/csrc/blocks.cuh on ordinary threads; see cuda_runtime.h beside this file.
#include "emulated.h"

#include "blocks.cuh"

#define PD_NAMED(name, V, P) {{"pd_gather_" #name, "pd_scatter_" #name}, {pd_gather_##name, pd_scatter_##name}},
const Named KERNELS[KINDS] = {PD_KERNELS(PD_NAMED)};

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
  const Kernel kernel = KERNELS[wide && !pages.payload ? WIDE : pages.payload].kernels[gather ? 0 : 1];
  run_grid(grid, threads, [&] { kernel(pages, job, sums, digests); });
  for (uint32_t h = 0; h < pages.heads; h++) digests[h] = finish(digests[h], shard_bytes);
}
