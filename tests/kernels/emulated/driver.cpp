// The functions of CUDA's driver that the host part (kernels/csrc/driver.h) uses, without a device.
//
// Streams are as lazy as they may be: nothing runs before somebody waits for it, and then only what that needs. What the host
// part forgot to order is therefore seen. One lock around everything, as a driver is called from any thread.
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <mutex>

#include "emulated.h"

namespace {

struct Stream {
  std::deque<std::function<void()>> waiting;
  size_t given = 0, ended = 0;
};
struct Event {
  Stream* stream = nullptr;
  size_t at = 0;  // that many operations of the stream come before it
};

enum { OK = 0, INVALID_VALUE = 1, NOT_FOUND = 500, NOT_READY = 600 };

std::recursive_mutex guard;
std::map<char*, size_t> registered;  // pinned host memory
Stream engine;  // stream 0
int kept = 0;   // allocations, streams, events, modules that nobody has given back

#define LOCKED const std::lock_guard<std::recursive_mutex> hold(guard)

void run(Stream& stream, size_t until) {
  while (stream.ended < until) {
    const auto operation = std::move(stream.waiting.front());
    stream.waiting.pop_front();
    stream.ended++;
    operation();
  }
}

int submit(Stream* stream, std::function<void()> operation) {
  LOCKED;
  Stream& to = stream ? *stream : engine;
  to.waiting.push_back(std::move(operation));
  to.given++;
  return OK;
}

int allocate(void** out, size_t bytes) {
  LOCKED;
  *out = std::malloc(bytes);
  std::memset(*out, 0xA5, bytes);
  kept++;
  return OK;
}

int release(void* memory) {
  LOCKED;
  std::free(memory);
  kept--;
  return OK;
}

template <typename T> int make(T** out) {
  LOCKED;
  *out = new T();
  kept++;
  return OK;
}

template <typename T> int destroy(T* made) {
  LOCKED;
  delete made;
  kept--;
  return OK;
}

}  // namespace

extern "C" {

int emulated_kept() { return kept + (int)registered.size(); }

// Work of the engine, on stream 0.
int emulated_copy(void* to, const void* from, size_t bytes) {
  return submit(nullptr, [=] { std::memcpy(to, from, bytes); });
}

int cuInit(unsigned) { return OK; }
int cuGetErrorString(int code, const char** text) {
  *text = code == NOT_FOUND ? "named symbol not found" : "invalid argument";
  return OK;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? OK : INVALID_VALUE;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &engine;
  return OK;
}
int cuCtxSetCurrent(void* context) { return context == &engine ? OK : INVALID_VALUE; }
int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return OK;
}

int cuMemAlloc_v2(void** out, size_t bytes) { return allocate(out, bytes); }
int cuMemFree_v2(void* memory) { return release(memory); }
int cuMemHostAlloc(void** out, size_t bytes, unsigned) { return allocate(out, bytes); }
int cuMemFreeHost(void* memory) { return release(memory); }
int cuMemsetD8_v2(void* memory, unsigned char value, size_t bytes) {
  std::memset(memory, value, bytes);
  return OK;
}
int cuMemcpyHtoD_v2(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  return OK;
}
int cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t bytes, Stream* stream) {
  return submit(stream, [=] { std::memcpy(to, from, bytes); });
}
int cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t bytes, Stream* stream) {
  return submit(stream, [=] { std::memcpy(to, from, bytes); });
}

int cuMemHostRegister_v2(void* memory, size_t bytes, unsigned) {
  LOCKED;
  registered[static_cast<char*>(memory)] = bytes;
  return OK;
}
int cuMemHostUnregister(void* memory) {
  LOCKED;
  return registered.erase(static_cast<char*>(memory)) ? OK : INVALID_VALUE;
}

int cuStreamCreateWithPriority(Stream** out, unsigned, int) { return make(out); }
int cuStreamDestroy_v2(Stream* stream) { return destroy(stream); }
int cuStreamSynchronize(Stream* stream) {
  LOCKED;
  Stream& of = stream ? *stream : engine;
  run(of, of.given);
  return OK;
}
int cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
  LOCKED;
  Stream* const other = event->stream;
  const size_t at = event->at;
  return submit(stream, [=] { run(*other, at); });
}

int cuEventCreate(Event** out, unsigned) { return make(out); }
int cuEventDestroy_v2(Event* event) { return destroy(event); }
int cuEventRecord(Event* event, Stream* stream) {
  LOCKED;
  event->stream = stream ? stream : &engine;
  event->at = event->stream->given;
  return OK;
}
int cuEventQuery(Event* event) {
  LOCKED;
  if (!event->stream || event->stream->ended >= event->at) return OK;
  run(*event->stream, event->stream->ended + 1);  // a device goes on by itself
  return NOT_READY;
}
int cuEventSynchronize(Event* event) {
  LOCKED;
  if (event->stream) run(*event->stream, event->at);
  return OK;
}

int cuModuleLoadData(Stream** module, const void* image) {
  if (std::strcmp(static_cast<const char*>(image), "emulated")) return INVALID_VALUE;
  return make(module);
}
int cuModuleUnload(Stream* module) { return destroy(module); }
int cuModuleGetFunction(Kernel* out, Stream*, const char* name) {
  for (const Named& both : KERNELS)
    for (int way = 0; way < 2; way++)
      if (!std::strcmp(both.names[way], name)) {
        *out = both.kernels[way];
        return OK;
      }
  return NOT_FOUND;
}
int cuLaunchKernel(Kernel kernel, unsigned grid_x, unsigned grid_y, unsigned, unsigned x, unsigned, unsigned, unsigned, Stream* stream,
                   void** arguments, void**) {
  // Arguments are copied when a kernel is submitted.
  const Pages pages = *static_cast<Pages*>(arguments[0]);
  const Job job = *static_cast<Job*>(arguments[1]);
  const Sums sums = *static_cast<Sums*>(arguments[2]);
  uint64_t* const result = *static_cast<uint64_t**>(arguments[3]);
  return submit(stream, [=] { run_grid(dim3{grid_x, grid_y, 1}, x, [&] { kernel(pages, job, sums, result); }); });
}
}
