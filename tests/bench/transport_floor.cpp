// The plainest fast way from one end's memory to the other's, for bench_transports.py: no frames, no digests, no interpreter.
//
//   transport_floor recv HOST STREAMS SINK           prints {"port": N}
//   transport_floor send HOST PORT STREAMS SOURCE    prints {"gbs": X, "cpu_per_gb": Y}
//
// SOURCE: hot (one buffer of 1 MiB a stream, as iperf3 is told to have), cold (all of 512 MiB of shared memory, by send), or sendfile
// (the same memory by sendfile: its pages go into the socket, nobody copies them). SINK: hot, cold, or spin (cold, and never sleeps).
// "huge-" before either: its memory is in huge pages, asked for as the daemon's arena does.
#include <arpa/inet.h>
#include <cerrno>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <netinet/tcp.h>
#include <string>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

constexpr size_t ARENA = 512ul << 20, AT_ONCE = 1 << 20;
constexpr int ROUNDS = 12;  // each moves as much as the arena holds

void must(bool good, const char* what) {
  if (good) return;
  perror(what);
  exit(1);
}

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

double cpu() {
  rusage used;
  getrusage(RUSAGE_SELF, &used);
  return used.ru_utime.tv_sec + used.ru_stime.tv_sec + 1e-6 * (used.ru_utime.tv_usec + used.ru_stime.tv_usec);
}

constexpr size_t HUGE_PAGE = 2 << 20;
constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, which older headers do not name

struct Arena {
  int fd = memfd_create("floor", 0);
  unsigned char* at;
  explicit Arena(bool huge) {
    must(fd >= 0 && ftruncate(fd, ARENA) == 0, "memfd");
    auto* room = (unsigned char*)mmap(nullptr, ARENA + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(room != MAP_FAILED, "room");
    at = (unsigned char*)(((uintptr_t)room + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    must(mmap(at, ARENA, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == at, "mmap");
    for (size_t i = 0; huge && i < ARENA; i += HUGE_PAGE) at[i] = 1;
    if (huge) must(madvise(at, ARENA, COLLAPSE) == 0, "huge pages");
    for (size_t i = 0; i < ARENA; i += 8) *(uint64_t*)(at + i) = i * 0x9e3779b97f4a7c15ull;
  }
};

void take(int sock, unsigned char* to, size_t size, const std::string& sink) {
  const int flags = sink == "spin" ? MSG_DONTWAIT : 0;
  for (size_t done = 0; done < size;) {
    const size_t most = std::min(size - done, sink == "hot" ? AT_ONCE : AT_ONCE / 4);
    const ssize_t got = recv(sock, sink == "hot" ? to : to + done, most, flags);
    if (got < 0 && errno == EAGAIN) continue;
    must(got > 0, "recv");
    done += got;
  }
}

void give(int sock, const Arena& arena, size_t from, size_t size, const std::string& source) {
  for (size_t done = 0; done < size;) {
    ssize_t gone;
    if (source == "sendfile") {
      off_t at = from + done;
      gone = sendfile(sock, arena.fd, &at, std::min(size - done, AT_ONCE));
    } else if (source == "hot") {
      gone = send(sock, arena.at + from, std::min(size - done, AT_ONCE), 0);
    } else {
      gone = send(sock, arena.at + from + done, std::min(size - done, AT_ONCE), 0);
    }
    must(gone > 0, "send");
    done += gone;
  }
}

template <class Job>
void each(const std::vector<int>& socks, Job job) {
  std::vector<std::thread> threads;
  const size_t share = ARENA / socks.size();
  for (size_t i = 0; i < socks.size(); i++) threads.emplace_back([=] { job(socks[i], i * share, share); });
  for (auto& thread : threads) thread.join();
}

sockaddr_in address(const char* host, int port) {
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_port = htons(port);
  must(inet_pton(AF_INET, host, &a.sin_addr) == 1, host);
  return a;
}

// Takes "huge-" off the word.
bool wants_huge(std::string& word) {
  const bool huge = word.rfind("huge-", 0) == 0;
  if (huge) word.erase(0, 5);
  return huge;
}

void receive(const char* host, int streams, std::string sink) {
  Arena arena(wants_huge(sink));
  const int server = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in a = address(host, 0);
  socklen_t size = sizeof a;
  must(bind(server, (sockaddr*)&a, size) == 0 && listen(server, 64) == 0 && getsockname(server, (sockaddr*)&a, &size) == 0, "listen");
  printf("{\"port\": %d}\n", ntohs(a.sin_port));
  fflush(stdout);
  const int control = accept(server, nullptr, nullptr);
  std::vector<int> socks;
  for (int i = 0; i < streams; i++) socks.push_back(accept(server, nullptr, nullptr));
  for (int round = 0; round <= ROUNDS; round++) {
    each(socks, [&](int sock, size_t from, size_t share) { take(sock, arena.at + from, share, sink); });
    const double used = cpu();
    must(write(control, &used, sizeof used) == sizeof used, "control");
  }
}

int dialled(const char* host, int port) {
  const sockaddr_in a = address(host, port);
  const int sock = socket(AF_INET, SOCK_STREAM, 0), yes = 1, unsent = 512 << 10;
  must(connect(sock, (const sockaddr*)&a, sizeof a) == 0, "connect");
  setsockopt(sock, IPPROTO_TCP, TCP_CONGESTION, "cubic", 5);
  setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  setsockopt(sock, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof unsent);
  return sock;
}

void push(const char* host, int port, int streams, std::string source) {
  Arena arena(wants_huge(source));
  const int control = dialled(host, port);
  std::vector<int> socks;
  for (int i = 0; i < streams; i++) socks.push_back(dialled(host, port));
  std::vector<double> speeds;
  double first = 0, theirs = 0;
  for (int round = 0; round <= ROUNDS; round++) {
    const double start = now();
    each(socks, [&](int sock, size_t from, size_t share) { give(sock, arena, from, share, source); });
    must(recv(control, &theirs, sizeof theirs, MSG_WAITALL) == sizeof theirs, "control");
    if (round == 0) first = cpu() + theirs;
    else speeds.push_back(ARENA / (now() - start) / 1e9);
  }
  std::sort(speeds.begin(), speeds.end());
  const double used = cpu() + theirs - first;
  printf("{\"gbs\": %.4f, \"cpu_per_gb\": %.4f}\n", speeds[ROUNDS / 2], used / (ROUNDS * (ARENA / 1e9)));
}

}  // namespace

int main(int count, char** words) {
  const std::string role = count > 1 ? words[1] : "";
  if (role == "recv" && count == 5) receive(words[2], atoi(words[3]), words[4]);
  else if (role == "send" && count == 6) push(words[2], atoi(words[3]), atoi(words[4]), words[5]);
  else return 2;
}
