// The GPU path, called through ctypes: raw pointers and stream handles, no tensor library's ABI.
//
// Each direction is a lane: a ring of staging buffers on the device, a stream for kernels and two for DMA, tied together by
// events. Save: gather into a buffer, then DMA into the arena. Load: the other way. A call that submits returns at once unless all
// buffers are in use. A lane belongs to one host thread; `settle` may come from any.
//
// A copy engine serves one queue until that is empty: with one stream of saves the small copies of an engine's step would wait
// for all of them. So saves go by turns on two streams, each turn after the one before it: between two, whoever waits is served.
// A turn is a chunk, or `piece` bytes of one. No kernel writes to the host's memory: digests, too, are fetched by DMA.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "gpu.h"
#include "job.h"
#if !defined(GPU_DRIVER)
#include "blocks.cuh"
#endif

namespace {

using namespace pd;

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds LONGEST_TURN{20};  // from one load with a share of the bus to the next, whatever held it up
constexpr int64_t RESULTS = 1024;  // digests of a ticket must be read before this many more are submitted
thread_local std::string last_error;

bool failed(gpuError_t code, const char* what) {
  if (code == gpuSuccess) return false;
  last_error = std::string(what) + ": " + gpuGetErrorString(code);
  return true;
}
#define TRY(call) do { if (failed(call, #call)) return -1; } while (0)

int refuse(const char* why) {
  last_error = why;
  return -1;
}

struct Slot {
  unsigned char* buffer = nullptr;
  gpuEvent_t copied = nullptr, computed = nullptr, end = nullptr;
};

struct Lane {
  gpuStream_t kernels = nullptr, copies[2] = {nullptr, nullptr};
  gpuEvent_t turn[2] = {nullptr, nullptr};  // the end of each stream's last turn
  uint64_t turns = 0;
  std::vector<Slot> slots;
  Sums sums{nullptr, nullptr};
  uint64_t *results = nullptr, *results_device = nullptr;  // host and device, [RESULTS][heads]
  int64_t submitted = 0, completed = 0;
  double fastest = 0;      // of a load with a share of the bus: ns a byte
  Clock::time_point next;  // until then the next such load waits
};

// The kernels: in this library, or in what the run-time compiler made.
struct Kernels {
  gpuKernel_t of[2][KINDS];  // [SAVE, LOAD]
#if defined(GPU_DRIVER)
  gpuModule_t module = nullptr;
  int open(const void* code) {
#define PD_NAMES(name, V, P) {"pd_gather_" #name, "pd_scatter_" #name},
    static const char* const names[KINDS][2] = {PD_KERNELS(PD_NAMES)};
    TRY(gpuModuleLoadData(&module, code));
    for (uint32_t k = 0; k < KINDS; k++)
      for (int way = 0; way < 2; way++)
        if (failed(gpuModuleGetFunction(&of[way][k], module, names[k][way]), names[k][way])) return -1;
    return 0;
  }
  void close() {
    if (module) gpuModuleUnload(module);
  }
#else
  int open(const void*) {
#define PD_POINTERS(name, V, P) {(gpuKernel_t)pd_gather_##name, (gpuKernel_t)pd_scatter_##name},
    static const gpuKernel_t all[KINDS][2] = {PD_KERNELS(PD_POINTERS)};
    for (uint32_t k = 0; k < KINDS; k++)
      for (int way = 0; way < 2; way++) of[way][k] = all[k][way];
    return 0;
  }
  void close() {}
#endif
};

struct Context {
  int device;
  Pages pages;
  uint64_t* bases = nullptr;
  uint64_t staging_bytes;
  uint32_t blocks;  // thread blocks of one kernel, all heads together
  bool wide;        // 16-byte accesses
  Lane lanes[2];
  Kernels kernels;
};

enum { SAVE = 0, LOAD = 1 };

gpuError_t launch(const Context& c, int way, const Job& job, const Lane& lane, uint64_t* result, uint32_t blocks) {
  const uint32_t x = (blocks + c.pages.heads - 1) / c.pages.heads, kind = c.wide && !c.pages.payload ? WIDE : c.pages.payload;
  const void* arguments[] = {&c.pages, &job, &lane.sums, &result};
  return gpuLaunch(c.kernels.of[way][kind], x, c.pages.heads, THREADS, const_cast<void**>(arguments), lane.kernels);
}

// The stream whose turn it is; what is submitted there begins when the turn before has ended.
int begin_turn(Lane& lane, gpuStream_t& stream) {
  const int own = lane.turns % 2;
  stream = lane.copies[own];
  if (lane.turns) TRY(gpuStreamWaitEvent(stream, lane.turn[1 - own], 0));
  return 0;
}

int end_turn(Lane& lane) {
  const int own = lane.turns++ % 2;
  TRY(gpuEventRecord(lane.turn[own], lane.copies[own]));
  return 0;
}

// One ticket's digests, one per head, once what was submitted before on that stream has ended.
gpuError_t fetch_digests(const Context& c, const Lane& lane, uint64_t place, gpuStream_t stream) {
  return gpuMemcpyAsync(lane.results + place, lane.results_device + place, c.pages.heads * 8, gpuMemcpyDeviceToHost, stream);
}

// Bytes of one shard of a chunk.
uint64_t shard_bytes(const Pages& p, uint32_t tokens) {
  const uint32_t token = p.parts * p.part_bytes;
  return (uint64_t)p.layers * tokens * (p.payload ? 8 + token / ((p.payload & FORMAT) == FP32 ? 4 : 2) : token);
}

// What the kernel assumes is checked here: it works on raw addresses.
int make_job(const Context& c, Job& job, const int32_t* blocks, int count, uint32_t tokens, uint64_t stride, bool gather) {
  const uint64_t shard = shard_bytes(c.pages, tokens);
  if (tokens == 0 || count > MAX_BLOCKS || (uint64_t)count * c.pages.block_tokens < tokens) return refuse("blocks do not cover the tokens");
  if (shard > stride || stride % 16) return refuse("shard stride too small or not a multiple of 16");
  if (shard / 8 > 0x7fffffffull) return refuse("chunk too large");
  job.stride = stride;
  job.tokens = tokens;
  for (int i = 0; i < count; i++) {
    if (gather && blocks[i] < 0) return refuse("gather from no block");
    job.blocks[i] = blocks[i];
  }
  return 0;
}

int open_lane(Context& c, Lane& lane, int depth, int priority) {
  TRY(gpuStreamCreateWithPriority(&lane.kernels, gpuStreamNonBlocking, priority));
  for (int i = 0; i < 2; i++) {
    TRY(gpuStreamCreateWithPriority(&lane.copies[i], gpuStreamNonBlocking, priority));
    TRY(gpuEventCreateWithFlags(&lane.turn[i], gpuEventDisableTiming));
  }
  TRY(gpuMalloc((void**)&lane.sums.by_head, c.pages.heads * 8 + 8));
  TRY(gpuMemset(lane.sums.by_head, 0, c.pages.heads * 8 + 8));
  lane.sums.arrived = reinterpret_cast<unsigned*>(lane.sums.by_head + c.pages.heads);
  TRY(gpuHostMalloc((void**)&lane.results, RESULTS * c.pages.heads * 8, gpuHostMallocDefault));
  TRY(gpuMalloc((void**)&lane.results_device, RESULTS * c.pages.heads * 8));
  lane.slots.resize(depth);
  for (Slot& s : lane.slots) {
    TRY(gpuMalloc((void**)&s.buffer, c.staging_bytes));
    TRY(gpuEventCreateWithFlags(&s.copied, gpuEventDisableTiming | gpuEventBlockingSync));
    TRY(gpuEventCreateWithFlags(&s.computed, gpuEventDisableTiming));
    TRY(gpuEventCreateWithFlags(&s.end, gpuEventDisableTiming | gpuEventBlockingSync));
  }
  return 0;
}

void close_lane(Lane& lane) {
  gpuStream_t streams[] = {lane.kernels, lane.copies[0], lane.copies[1]};
  for (gpuStream_t s : streams)
    if (s) gpuStreamSynchronize(s);
  for (Slot& s : lane.slots) {
    if (s.buffer) gpuFree(s.buffer);
    for (gpuEvent_t e : {s.copied, s.computed, s.end})
      if (e) gpuEventDestroy(e);
  }
  for (gpuEvent_t e : lane.turn)
    if (e) gpuEventDestroy(e);
  if (lane.sums.by_head) gpuFree(lane.sums.by_head);
  if (lane.results) gpuHostFree(lane.results);
  if (lane.results_device) gpuFree(lane.results_device);
  for (gpuStream_t s : streams)
    if (s) gpuStreamDestroy(s);
}

void close_context(Context* c) {
  for (Lane& lane : c->lanes) close_lane(lane);
  if (c->bases) gpuFree(c->bases);
  c->kernels.close();
  delete c;
}

// The slot of the next ticket, free for use.
int next_slot(Lane& lane, Slot*& slot) {
  const int64_t depth = (int64_t)lane.slots.size();
  slot = &lane.slots[lane.submitted % depth];
  if (lane.submitted - lane.completed >= depth) {
    TRY(gpuEventSynchronize(slot->end));
    if (lane.completed < lane.submitted - depth + 1) lane.completed = lane.submitted - depth + 1;
  }
  return 0;
}

}  // namespace

extern "C" {

// Text of the last error in this thread.
const char* pd_gpu_error() { return last_error.c_str(); }

struct PdGeometry {
  int64_t block, head, token, part;
  uint32_t layers, heads, parts, part_bytes, block_tokens, payload;
};

#if defined(GPU_DRIVER)
// Comes first: where the driver's library is. Null, or what is wrong with it.
const char* pd_gpu_driver(const char* path) {
  last_error = driver::open(path);
  return last_error.empty() ? nullptr : last_error.c_str();
}
#endif

// `wide`: every address and stride of the pages is a multiple of 16. `code`: the kernels, if they are not in this library; not
// needed once this returns. Returns null on error.
void* pd_gpu_open(int device, const uint64_t* bases, const PdGeometry* g, uint64_t staging_bytes, int depth, int blocks, int wide,
                  const void* code) {
  Context* c = new Context();
  c->device = device;
  c->pages = Pages{nullptr, g->block, g->head, g->token, g->part, g->layers, g->heads, g->parts, g->part_bytes, g->block_tokens, g->payload};
  c->staging_bytes = staging_bytes;
  c->blocks = (uint32_t)blocks;
  c->wide = wide != 0;
  auto open = [&]() -> int {
    TRY(gpuSetDevice(device));
    if (c->kernels.open(code)) return -1;
    TRY(gpuMalloc((void**)&c->bases, g->layers * 8));
    TRY(gpuMemcpy(c->bases, bases, g->layers * 8, gpuMemcpyHostToDevice));
    c->pages.bases = c->bases;
    int low = 0, high = 0;
    TRY(gpuDeviceGetStreamPriorityRange(&low, &high));
    // A load is somebody waiting for a first token; a save is not.
    if (open_lane(*c, c->lanes[SAVE], depth, low) || open_lane(*c, c->lanes[LOAD], depth, high)) return -1;
    return 0;
  };
  if (open() == 0) return c;
  close_context(c);
  return nullptr;
}

void pd_gpu_close(void* context) {
  Context* c = static_cast<Context*>(context);
  gpuSetDevice(c->device);
  close_context(c);
}

int pd_gpu_register(int device, void* address, uint64_t bytes) {
  TRY(gpuSetDevice(device));
  TRY(gpuHostRegister(address, bytes, gpuHostRegisterFlags));
  return 0;
}

int pd_gpu_unregister(int device, void* address) {
  TRY(gpuSetDevice(device));
  TRY(gpuHostUnregister(address));
  return 0;
}

// A point in the work of `stream`, to be waited for by save and load. Null on error.
void* pd_gpu_mark(int device, void* stream) {
  gpuEvent_t event = nullptr;
  auto record = [&]() -> int {
    TRY(gpuSetDevice(device));
    TRY(gpuEventCreateWithFlags(&event, gpuEventDisableTiming));
    TRY(gpuEventRecord(event, static_cast<gpuStream_t>(stream)));
    return 0;
  };
  return record() == 0 ? event : nullptr;
}

void pd_gpu_unmark(int device, void* mark) {
  gpuSetDevice(device);
  gpuEventDestroy(static_cast<gpuEvent_t>(mark));
}

// Pages -> arena, after `mark` (may be null). `piece` > 0: other copies are let in after so many bytes at the latest. Returns a
// ticket, or -1.
int64_t pd_gpu_save(void* context, void* mark, const int32_t* blocks, int count, uint32_t tokens, uint64_t stride, void* host, uint64_t piece) {
  Context& c = *static_cast<Context*>(context);
  Lane& lane = c.lanes[SAVE];
  Job job;
  if (make_job(c, job, blocks, count, tokens, stride, true)) return -1;
  const uint64_t bytes = stride * c.pages.heads;
  if (bytes > c.staging_bytes) return refuse("chunk larger than the staging buffer");
  TRY(gpuSetDevice(c.device));
  Slot* slot;
  if (next_slot(lane, slot)) return -1;
  if (mark) TRY(gpuStreamWaitEvent(lane.kernels, static_cast<gpuEvent_t>(mark), 0));
  const uint64_t place = lane.submitted % RESULTS * c.pages.heads;
  job.chunk = slot->buffer;
  TRY(launch(c, SAVE, job, lane, lane.results_device + place, c.blocks));
  TRY(gpuEventRecord(slot->computed, lane.kernels));
  for (uint64_t at = 0, size; at < bytes; at += size) {
    size = piece && piece < bytes - at ? piece : bytes - at;
    gpuStream_t stream;
    if (begin_turn(lane, stream)) return -1;
    if (at == 0) {
      TRY(gpuStreamWaitEvent(stream, slot->computed, 0));
      TRY(fetch_digests(c, lane, place, stream));
    }
    TRY(gpuMemcpyAsync(static_cast<unsigned char*>(host) + at, slot->buffer + at, size, gpuMemcpyDeviceToHost, stream));
    if (at + size == bytes) TRY(gpuEventRecord(slot->end, stream));
    if (end_turn(lane)) return -1;
  }
  return lane.submitted++;
}

// Arena -> pages; only the scatter waits for `mark`, the DMA starts at once. `share` < 100: percent of the bus. Waits for the DMA,
// and the next such load begins when, at its share of the fastest so far, this one would have ended. Returns a ticket, or -1.
int64_t pd_gpu_load(void* context, void* mark, const int32_t* blocks, int count, uint32_t tokens, uint64_t stride, const void* host, int share) {
  Context& c = *static_cast<Context*>(context);
  Lane& lane = c.lanes[LOAD];
  Job job;
  if (make_job(c, job, blocks, count, tokens, stride, false)) return -1;
  const uint64_t bytes = stride * c.pages.heads;
  if (bytes > c.staging_bytes) return refuse("chunk larger than the staging buffer");
  if (share < 1) return refuse("no share of the bus");
  TRY(gpuSetDevice(c.device));
  Slot* slot;
  if (next_slot(lane, slot)) return -1;
  const uint64_t place = lane.submitted % RESULTS * c.pages.heads;
  job.chunk = slot->buffer;
  if (share < 100) std::this_thread::sleep_until(lane.next);
  const Clock::time_point began = Clock::now();
  TRY(gpuMemcpyAsync(slot->buffer, host, bytes, gpuMemcpyHostToDevice, lane.copies[0]));
  TRY(gpuEventRecord(slot->copied, lane.copies[0]));
  TRY(gpuStreamWaitEvent(lane.kernels, slot->copied, 0));
  if (mark) TRY(gpuStreamWaitEvent(lane.kernels, static_cast<gpuEvent_t>(mark), 0));
  TRY(launch(c, LOAD, job, lane, lane.results_device + place, c.blocks));
  TRY(gpuEventRecord(slot->computed, lane.kernels));
  // On a stream of its own: it may have to wait for a save's turn to end, and the next scatter should not.
  TRY(gpuStreamWaitEvent(lane.copies[1], slot->computed, 0));
  TRY(fetch_digests(c, lane, place, lane.copies[1]));
  TRY(gpuEventRecord(slot->end, lane.copies[1]));
  if (share < 100) {
    TRY(gpuEventSynchronize(slot->copied));
    const double each = std::chrono::duration<double, std::nano>(Clock::now() - began).count() / bytes;
    lane.fastest = lane.fastest > 0 ? std::min(lane.fastest, each) : each;
    const auto turn = std::chrono::nanoseconds((int64_t)(lane.fastest * bytes * 100 / share));
    lane.next = began + std::min<Clock::duration>(turn, LONGEST_TURN);
  }
  return lane.submitted++;
}

// Several chunks in one call, so that the caller's interpreter is left alone meanwhile. `blocks` of all of them, one after
// another. `piece` is of saves, `share` of loads. Returns how many were submitted (their tickets are the last ones of the lane);
// fewer than `chunks` after an error.
int pd_gpu_submit(void* context, int which, void* mark, int chunks, const int32_t* blocks, const int32_t* counts, const uint32_t* tokens,
                  const uint64_t* strides, void* const* hosts, uint64_t piece, int share) {
  for (int i = 0; i < chunks; blocks += counts[i], i++) {
    const int64_t ticket = which == SAVE ? pd_gpu_save(context, mark, blocks, counts[i], tokens[i], strides[i], hosts[i], piece)
                                         : pd_gpu_load(context, mark, blocks, counts[i], tokens[i], strides[i], hosts[i], share);
    if (ticket < 0) return i;
  }
  return chunks;
}

int64_t pd_gpu_submitted(void* context, int which) { return static_cast<Context*>(context)->lanes[which].submitted; }

// How many tickets of the lane (0 save, 1 load) are done: all below that number. Never waits. -1 on error.
int64_t pd_gpu_done(void* context, int which) {
  Context& c = *static_cast<Context*>(context);
  Lane& lane = c.lanes[which];
  TRY(gpuSetDevice(c.device));
  while (lane.completed < lane.submitted) {
    const gpuError_t state = gpuEventQuery(lane.slots[lane.completed % (int64_t)lane.slots.size()].end);
    if (state == gpuErrorNotReady) break;
    TRY(state);
    lane.completed++;
  }
  return lane.completed;
}

// Waits until `ticket` is done, without spinning.
int pd_gpu_wait(void* context, int which, int64_t ticket) {
  Context& c = *static_cast<Context*>(context);
  Lane& lane = c.lanes[which];
  if (ticket < lane.completed) return 0;
  TRY(gpuSetDevice(c.device));
  for (; lane.completed <= ticket; lane.completed++)
    TRY(gpuEventSynchronize(lane.slots[lane.completed % (int64_t)lane.slots.size()].end));
  return 0;
}

// Digests of a ticket that is done, one per head; `bytes`: of one shard.
void pd_gpu_digests(void* context, int which, int64_t ticket, uint64_t bytes, uint64_t* out) {
  Context& c = *static_cast<Context*>(context);
  const uint64_t* sums = c.lanes[which].results + ticket % RESULTS * c.pages.heads;
  for (uint32_t h = 0; h < c.pages.heads; h++) out[h] = finish(sums[h], bytes);
}

// When this returns, no submitted save reads pages any more. From any thread.
int pd_gpu_settle(void* context) {
  Context& c = *static_cast<Context*>(context);
  TRY(gpuSetDevice(c.device));
  TRY(gpuStreamSynchronize(c.lanes[SAVE].kernels));
  return 0;
}

// One kernel between pages and any memory the device can reach (device memory, or registered host memory), on the lane's
// kernel stream, waited for. For measuring and testing; `blocks_override` > 0 sets the grid.
int pd_gpu_move(void* context, int which, const int32_t* blocks, int count, uint32_t tokens, uint64_t stride, void* chunk, int blocks_override,
                uint64_t* out) {
  const Context& c = *static_cast<Context*>(context);
  const uint32_t grid = blocks_override > 0 ? (uint32_t)blocks_override : c.blocks;
  const Lane& lane = c.lanes[which];
  Job job;
  if (make_job(c, job, blocks, count, tokens, stride, which == SAVE)) return -1;
  TRY(gpuSetDevice(c.device));
  job.chunk = static_cast<unsigned char*>(chunk);
  const uint64_t place = (RESULTS - 1) * c.pages.heads;
  TRY(launch(c, which, job, lane, lane.results_device + place, grid));
  TRY(fetch_digests(c, lane, place, lane.kernels));
  TRY(gpuStreamSynchronize(lane.kernels));
  const uint64_t bytes = shard_bytes(c.pages, tokens);
  for (uint32_t h = 0; h < c.pages.heads; h++) out[h] = finish(lane.results[place + h], bytes);
  return 0;
}

}
