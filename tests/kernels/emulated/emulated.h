// All kernels by name, to be run on ordinary threads; see cuda_runtime.h beside this file.
#pragma once
#include <cuda_runtime.h>

#include "job.h"

using namespace pd;

using Kernel = void (*)(const Pages, const Job, Sums, uint64_t*);
struct Named {
  const char* names[2];
  Kernel kernels[2];
};
extern const Named KERNELS[KINDS];  // main.cpp has them: compiling them takes seconds
