// CUDA or HIP: the only place that knows which. Everything else says gpu*.
//
// nvcc and hipcc make one library of kernels and host part, over the runtime's functions. Where only the run-time compiler is, it
// makes the kernels alone, and any C++ compiler the host part, over the functions of the driver's own library, which it finds
// when it runs: no header and no library of a toolkit (GPU_DRIVER).
#pragma once
#if defined(__CUDACC_RTC__)
#define GPU_LOAD_ONCE(p) __ldcs(p)
#define GPU_GRID_CONSTANT __grid_constant__
#elif defined(__HIPCC__)
#include <hip/hip_runtime.h>
#define GPU_LOAD_ONCE(p) (*(p))
#define GPU_GRID_CONSTANT
typedef const void* gpuKernel_t;
#define gpuError_t hipError_t
#define gpuSuccess hipSuccess
#define gpuErrorNotReady hipErrorNotReady
#define gpuGetErrorString hipGetErrorString
#define gpuSetDevice hipSetDevice
#define gpuMalloc hipMalloc
#define gpuFree hipFree
#define gpuMemset hipMemset
#define gpuMemcpy hipMemcpy
#define gpuMemcpyAsync hipMemcpyAsync
#define gpuMemcpyHostToDevice hipMemcpyHostToDevice
#define gpuMemcpyDeviceToHost hipMemcpyDeviceToHost
#define gpuHostMalloc hipHostMalloc
#define gpuHostMallocDefault hipHostMallocDefault
#define gpuHostFree hipHostFree
#define gpuHostRegister hipHostRegister
#define gpuHostRegisterFlags (hipHostRegisterPortable | hipHostRegisterMapped)
#define gpuHostUnregister hipHostUnregister
#define gpuStream_t hipStream_t
#define gpuStreamCreateWithPriority hipStreamCreateWithPriority
#define gpuStreamNonBlocking hipStreamNonBlocking
#define gpuStreamDestroy hipStreamDestroy
#define gpuStreamSynchronize hipStreamSynchronize
#define gpuStreamWaitEvent hipStreamWaitEvent
#define gpuDeviceGetStreamPriorityRange hipDeviceGetStreamPriorityRange
#define gpuEvent_t hipEvent_t
#define gpuEventCreateWithFlags hipEventCreateWithFlags
#define gpuEventDisableTiming hipEventDisableTiming
#define gpuEventBlockingSync hipEventBlockingSync
#define gpuEventRecord hipEventRecord
#define gpuEventQuery hipEventQuery
#define gpuEventSynchronize hipEventSynchronize
#define gpuEventDestroy hipEventDestroy
#define gpuLaunch(kernel, x, y, threads, arguments, stream) hipLaunchKernel(kernel, dim3(x, y), dim3(threads), arguments, 0, stream)
#elif defined(__CUDACC__)
#include <cuda_runtime.h>
#define GPU_LOAD_ONCE(p) __ldcs(p)
#define GPU_GRID_CONSTANT __grid_constant__
typedef const void* gpuKernel_t;
#define gpuError_t cudaError_t
#define gpuSuccess cudaSuccess
#define gpuErrorNotReady cudaErrorNotReady
#define gpuGetErrorString cudaGetErrorString
#define gpuSetDevice cudaSetDevice
#define gpuMalloc cudaMalloc
#define gpuFree cudaFree
#define gpuMemset cudaMemset
#define gpuMemcpy cudaMemcpy
#define gpuMemcpyAsync cudaMemcpyAsync
#define gpuMemcpyHostToDevice cudaMemcpyHostToDevice
#define gpuMemcpyDeviceToHost cudaMemcpyDeviceToHost
#define gpuHostMalloc cudaHostAlloc
#define gpuHostMallocDefault cudaHostAllocDefault
#define gpuHostFree cudaFreeHost
#define gpuHostRegister cudaHostRegister
#define gpuHostRegisterFlags (cudaHostRegisterPortable | cudaHostRegisterMapped)
#define gpuHostUnregister cudaHostUnregister
#define gpuStream_t cudaStream_t
#define gpuStreamCreateWithPriority cudaStreamCreateWithPriority
#define gpuStreamNonBlocking cudaStreamNonBlocking
#define gpuStreamDestroy cudaStreamDestroy
#define gpuStreamSynchronize cudaStreamSynchronize
#define gpuStreamWaitEvent cudaStreamWaitEvent
#define gpuDeviceGetStreamPriorityRange cudaDeviceGetStreamPriorityRange
#define gpuEvent_t cudaEvent_t
#define gpuEventCreateWithFlags cudaEventCreateWithFlags
#define gpuEventDisableTiming cudaEventDisableTiming
#define gpuEventBlockingSync cudaEventBlockingSync
#define gpuEventRecord cudaEventRecord
#define gpuEventQuery cudaEventQuery
#define gpuEventSynchronize cudaEventSynchronize
#define gpuEventDestroy cudaEventDestroy
#define gpuLaunch(kernel, x, y, threads, arguments, stream) cudaLaunchKernel(kernel, dim3(x, y), dim3(threads), arguments, 0, stream)
#else
#define GPU_DRIVER
#include "driver.h"
#endif
