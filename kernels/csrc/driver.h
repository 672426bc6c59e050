// What gpu.h promises, over the functions of CUDA's driver library, looked up by name in the library that a path names.
// Their binary interface is fixed: a changed function gets a new name (_v2). Device addresses are 64 bits, as pointers are.
#pragma once
#include <dlfcn.h>

#include <cstddef>
#include <map>
#include <mutex>
#include <string>

typedef int gpuError_t;
typedef struct GpuStream* gpuStream_t;
typedef struct GpuEvent* gpuEvent_t;
typedef struct GpuModule* gpuModule_t;
typedef struct GpuKernel* gpuKernel_t;

enum { gpuSuccess = 0, gpuErrorNotReady = 600 };
enum : unsigned { gpuHostMallocDefault = 0, gpuHostRegisterFlags = 1 | 2 /* portable, mapped */, gpuStreamNonBlocking = 1 };
enum : unsigned { gpuEventBlockingSync = 1, gpuEventDisableTiming = 2 };
enum gpuCopy { gpuMemcpyHostToDevice, gpuMemcpyDeviceToHost };

#define GPU_DRIVER_FUNCTIONS(F)                                                                                        \
  F(cuInit, (unsigned flags))                                                                                          \
  F(cuGetErrorString, (gpuError_t, const char**))                                                                      \
  F(cuDeviceGet, (int* device, int ordinal))                                                                           \
  F(cuDevicePrimaryCtxRetain, (void** context, int device))                                                            \
  F(cuCtxSetCurrent, (void* context))                                                                                  \
  F(cuCtxGetStreamPriorityRange, (int* least, int* greatest))                                                          \
  F(cuMemAlloc_v2, (void**, size_t))                                                                                   \
  F(cuMemFree_v2, (void*))                                                                                             \
  F(cuMemsetD8_v2, (void*, unsigned char, size_t))                                                                     \
  F(cuMemcpyHtoD_v2, (void* to, const void* from, size_t))                                                             \
  F(cuMemcpyHtoDAsync_v2, (void* to, const void* from, size_t, gpuStream_t))                                           \
  F(cuMemcpyDtoHAsync_v2, (void* to, const void* from, size_t, gpuStream_t))                                           \
  F(cuMemHostAlloc, (void**, size_t, unsigned flags))                                                                  \
  F(cuMemFreeHost, (void*))                                                                                            \
  F(cuMemHostRegister_v2, (void*, size_t, unsigned flags))                                                             \
  F(cuMemHostUnregister, (void*))                                                                                      \
  F(cuStreamCreateWithPriority, (gpuStream_t*, unsigned flags, int priority))                                          \
  F(cuStreamDestroy_v2, (gpuStream_t))                                                                                 \
  F(cuStreamSynchronize, (gpuStream_t))                                                                                \
  F(cuStreamWaitEvent, (gpuStream_t, gpuEvent_t, unsigned flags))                                                      \
  F(cuEventCreate, (gpuEvent_t*, unsigned flags))                                                                      \
  F(cuEventRecord, (gpuEvent_t, gpuStream_t))                                                                          \
  F(cuEventQuery, (gpuEvent_t))                                                                                        \
  F(cuEventSynchronize, (gpuEvent_t))                                                                                  \
  F(cuEventDestroy_v2, (gpuEvent_t))                                                                                   \
  F(cuModuleLoadData, (gpuModule_t*, const void* image))                                                               \
  F(cuModuleUnload, (gpuModule_t))                                                                                     \
  F(cuModuleGetFunction, (gpuKernel_t*, gpuModule_t, const char* name))                                              \
  F(cuLaunchKernel, (gpuKernel_t, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y, unsigned z, \
                     unsigned shared_bytes, gpuStream_t, void** arguments, void** extra))

namespace pd::driver {

#define GPU_DRIVER_POINTER(name, arguments) inline gpuError_t(*name) arguments = nullptr;
GPU_DRIVER_FUNCTIONS(GPU_DRIVER_POINTER)

// Looks everything up, once for the process. Returns what is missing, empty when nothing is.
inline std::string open(const char* path) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return dlerror();
#define GPU_DRIVER_FIND(name, arguments)                                    \
  name = reinterpret_cast<gpuError_t(*) arguments>(dlsym(library, #name)); \
  if (!name) return std::string(path) + " has no " #name ": the driver is too old";
  GPU_DRIVER_FUNCTIONS(GPU_DRIVER_FIND)
  const gpuError_t code = cuInit(0);
  return code ? "cuInit: error " + std::to_string(code) : "";
}

// The context that the runtime of everybody else in this process uses; held until the process ends.
inline gpuError_t use(int ordinal) {
  static std::mutex guard;
  static std::map<int, void*> contexts;
  const std::lock_guard<std::mutex> hold(guard);
  void*& context = contexts[ordinal];
  if (!context) {
    int device = 0;
    if (const gpuError_t code = cuDeviceGet(&device, ordinal)) return code;
    if (const gpuError_t code = cuDevicePrimaryCtxRetain(&context, device)) return code;
  }
  return cuCtxSetCurrent(context);
}

inline const char* text(gpuError_t code) {
  const char* found = nullptr;
  return cuGetErrorString(code, &found) == gpuSuccess && found ? found : "unknown error";
}

inline gpuError_t copy(void* to, const void* from, size_t bytes, gpuCopy way, gpuStream_t stream) {
  return way == gpuMemcpyHostToDevice ? cuMemcpyHtoDAsync_v2(to, from, bytes, stream) : cuMemcpyDtoHAsync_v2(to, from, bytes, stream);
}

}  // namespace pd::driver

#define gpuGetErrorString pd::driver::text
#define gpuSetDevice pd::driver::use
#define gpuMalloc pd::driver::cuMemAlloc_v2
#define gpuFree pd::driver::cuMemFree_v2
#define gpuMemset pd::driver::cuMemsetD8_v2
#define gpuMemcpy(to, from, bytes, way) pd::driver::cuMemcpyHtoD_v2(to, from, bytes)
#define gpuMemcpyAsync pd::driver::copy
#define gpuHostMalloc pd::driver::cuMemHostAlloc
#define gpuHostFree pd::driver::cuMemFreeHost
#define gpuHostRegister pd::driver::cuMemHostRegister_v2
#define gpuHostUnregister pd::driver::cuMemHostUnregister
#define gpuStreamCreateWithPriority pd::driver::cuStreamCreateWithPriority
#define gpuStreamDestroy pd::driver::cuStreamDestroy_v2
#define gpuStreamSynchronize pd::driver::cuStreamSynchronize
#define gpuStreamWaitEvent pd::driver::cuStreamWaitEvent
#define gpuDeviceGetStreamPriorityRange pd::driver::cuCtxGetStreamPriorityRange
#define gpuEventCreateWithFlags pd::driver::cuEventCreate
#define gpuEventRecord pd::driver::cuEventRecord
#define gpuEventQuery pd::driver::cuEventQuery
#define gpuEventSynchronize pd::driver::cuEventSynchronize
#define gpuEventDestroy pd::driver::cuEventDestroy_v2
#define gpuModuleLoadData pd::driver::cuModuleLoadData
#define gpuModuleUnload pd::driver::cuModuleUnload
#define gpuModuleGetFunction pd::driver::cuModuleGetFunction
#define gpuLaunch(kernel, x, y, threads, arguments, stream) \
  pd::driver::cuLaunchKernel(kernel, x, y, 1, threads, 1, 1, 0, stream, arguments, nullptr)
