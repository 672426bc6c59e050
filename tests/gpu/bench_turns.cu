// How long a small copy waits beside large ones of the same direction, and what these still carry: why stores take turns.
//
//     nvcc -O2 -std=c++17 tests/gpu/bench_turns.cu -o /tmp/turns && /tmp/turns
//
// Large copies of one size follow each other without end, 96 MiB of them submitted ahead, on one stream, on two without order, on two
// that take turns by events, or one at a time; 64 bytes are copied on a stream of their own meanwhile. 12 seconds; about 2 GiB.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#define TRY(call)                                                                    \
  do {                                                                               \
    const cudaError_t code = call;                                                   \
    if (code != cudaSuccess) {                                                       \
      fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(code));                  \
      exit(1);                                                                       \
    }                                                                                \
  } while (0)

using Clock = std::chrono::steady_clock;

enum Way { ONE, TURNS, FREE, SINGLE };
const char* const NAMES[] = {"one stream", "two taking turns", "two without order", "one at a time"};
constexpr size_t TOTAL = size_t(1) << 30, AHEAD = size_t(96) << 20;
constexpr double SECONDS = 0.15, STARVED = 0.1;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct Memory {
  char *device, *host, *small_device, *small_host;
};

void copy(const Memory& m, bool up, size_t at, size_t bytes, cudaStream_t stream) {
  if (up) TRY(cudaMemcpyAsync(m.device + at, m.host + at, bytes, cudaMemcpyHostToDevice, stream));
  else TRY(cudaMemcpyAsync(m.host + at, m.device + at, bytes, cudaMemcpyDeviceToHost, stream));
}

void large(const Memory& m, bool up, Way way, size_t piece, const std::atomic<bool>& stop, std::atomic<long>& ended) {
  cudaStream_t streams[2];
  for (cudaStream_t& s : streams) TRY(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  std::vector<cudaEvent_t> ends(way == SINGLE ? 1 : std::max<size_t>(2, AHEAD / piece));
  for (cudaEvent_t& e : ends) TRY(cudaEventCreateWithFlags(&e, cudaEventDisableTiming | cudaEventBlockingSync));
  const long ahead = (long)ends.size();
  size_t at = 0;
  for (long i = 0; !stop; i++) {
    TRY(cudaEventSynchronize(ends[i % ahead]));  // one that was never recorded has ended
    cudaStream_t stream = way == TURNS || way == FREE ? streams[i % 2] : streams[0];
    if (way == TURNS && i) TRY(cudaStreamWaitEvent(stream, ends[(i - 1) % ahead], 0));
    if (at + piece > TOTAL) at = 0;
    copy(m, up, at, piece, stream);
    TRY(cudaEventRecord(ends[i % ahead], stream));
    at += piece;
    if (i >= ahead) ended++;
  }
  for (cudaStream_t s : streams) {
    TRY(cudaStreamSynchronize(s));
    TRY(cudaStreamDestroy(s));
  }
  for (cudaEvent_t e : ends) TRY(cudaEventDestroy(e));
}

void measure(const Memory& m, bool up, Way way, size_t piece) {
  std::atomic<bool> stop{false};
  std::atomic<long> ended{0};
  std::thread other([&] { large(m, up, way, piece, stop, ended); });
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  cudaStream_t stream;
  cudaEvent_t end;
  TRY(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  TRY(cudaEventCreateWithFlags(&end, cudaEventDisableTiming));
  const Clock::time_point start = Clock::now();
  const long before = ended;
  std::vector<double> waits;
  bool starved = false;
  const Memory small{m.small_device, m.small_host, nullptr, nullptr};
  while (since(start) < SECONDS && !starved) {
    const Clock::time_point asked = Clock::now();
    copy(small, up, 0, 64, stream);
    TRY(cudaEventRecord(end, stream));
    while (cudaEventQuery(end) == cudaErrorNotReady && !starved) starved = since(asked) > STARVED;
    waits.push_back(since(asked) * 1e6);
    std::this_thread::sleep_for(std::chrono::microseconds(300));
  }
  const double rate = (ended - before) * (double)piece / since(start) / 1e9;
  stop = true;
  other.join();
  TRY(cudaStreamSynchronize(stream));
  TRY(cudaStreamDestroy(stream));
  TRY(cudaEventDestroy(end));
  std::sort(waits.begin(), waits.end());
  printf("%s, %s, %2zu MiB: %.1f GB/s; 64 bytes wait %.0f us (p50), %.0f (p90), %.0f at most%s\n", up ? "to the device" : "to the host",
         NAMES[way], piece >> 20, rate, waits[waits.size() / 2], waits[waits.size() * 9 / 10], waits.back(), starved ? ": never served" : "");
}

int main() {
  Memory m{};
  TRY(cudaMalloc(&m.device, TOTAL));
  TRY(cudaMallocHost(&m.host, TOTAL));
  TRY(cudaMalloc(&m.small_device, 4096));
  TRY(cudaMallocHost(&m.small_host, 4096));
  for (const bool up : {false, true})
    for (const Way way : {ONE, TURNS, FREE, SINGLE})
      for (const size_t mib : {1, 2, 4, 8, 16, 36})
        if (way != FREE || mib == 4) measure(m, up, way, mib << 20);
}
