// All kernels by name, to be run on ordinary threads; see cuda_runtime.h beside this file.
#pragma once
#include "blocks.cuh"

using namespace pd;

using Kernel = void (*)(const Pages, const Job, Sums, uint64_t*);
struct Named {
  const char* names[2];
  Kernel kernels[2];
};
#define PD_NAMED(name, V, P) {{"pd_gather_" #name, "pd_scatter_" #name}, {pd_gather_##name, pd_scatter_##name}},
constexpr Named KERNELS[KINDS] = {PD_KERNELS(PD_NAMED)};
