// Bytes from a socket into memory, digested while they are still in this core's cache: reading them again later would cost as
// much as receiving them. Called through ctypes, which releases the GIL for the whole of a segment.
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <poll.h>
#include <sys/socket.h>

#include "digest.h"

namespace {

// Fits the second-level cache of every processor in use beside what the kernel copies from.
constexpr size_t STEP_BYTES = 256 << 10;
// Being woken costs the core that delivers the bytes an interrupt to ours, as much as it takes to send some 30 KiB; a receiver
// faster than its sender would be woken for every packet. So we sleep until so much is there.
constexpr size_t WAKE_BYTES = 1 << 20;

// Sum of mixed words; a plain loop, since compilers make vector code of it.
uint64_t mixed(const unsigned char* from, size_t words, uint64_t first) {
  uint64_t sum = 0;
  for (size_t i = 0; i < words; i++) {
    uint64_t w;
    std::memcpy(&w, from + 8 * i, 8);
    sum += pd::mix(w + (first + i + 1) * pd::STEP);
  }
  return sum;
}

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

// Waits for many bytes at a time. SO_RCVLOWAT with poll(), and never with a blocking recv: that takes what is there and then waits
// for as many again, which may be more than ever come.
class Patience {
 public:
  explicit Patience(int fd) : fd_(fd) {}
  ~Patience() { wake_at(1); }  // whoever reads next knows nothing of it

  // Until `left` bytes are there, or WAKE_BYTES; false when the time is over.
  bool wait(size_t left, int64_t ends) {
    wake_at((int)(left < WAKE_BYTES ? left : WAKE_BYTES));
    const int64_t time = ends - now_ns();
    pollfd one{fd_, POLLIN, 0};
    return time > 0 && poll(&one, 1, (int)((time + 999999) / 1000000)) > 0;
  }

 private:
  void wake_at(int bytes) {
    if (bytes != now_ && setsockopt(fd_, SOL_SOCKET, SO_RCVLOWAT, &bytes, sizeof bytes) == 0) now_ = bytes;
  }
  int fd_, now_ = 1;
};

}  // namespace

extern "C" {

// How far a segment has come. Lives across calls; all zero to begin with, `digested` = the size where no digest is wanted.
struct Arrival {
  uint64_t done;      // bytes that are there
  uint64_t digested;  // of them, in `sum`
  uint64_t sum;       // of mixed words: the digest before finish()
  uint64_t beyond;    // bytes of what follows the segment that came along
};

// Receives until `size` bytes are at `to`, and what of the next header comes with them at `next`. `first` is the position of the
// segment's first word in its piece. Whatever the sender does, it returns after some `patience_ns`.
// Returns 1 when all is there, 0 when the time is over, -errno, or -ESHUTDOWN when the peer has closed.
int64_t pd_receive(int fd, unsigned char* to, uint64_t size, unsigned char* next, uint64_t next_size, uint64_t first,
                   int64_t patience_ns, Arrival* a) {
  const int64_t ends = now_ns() + patience_ns;
  Patience patience(fd);
  while (a->done < size) {
    const size_t left = size - a->done, step = left < STEP_BYTES ? left : STEP_BYTES;
    iovec parts[2] = {{to + a->done, step}, {next, next_size}};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = step == left ? 2 : 1;
    const ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT);
    if (got == 0) return -ESHUTDOWN;
    if (got < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != EWOULDBLOCK) return -errno;
      if (!patience.wait(left, ends)) return 0;
      continue;
    }
    a->done += (size_t)got > left ? left : (size_t)got;
    if ((size_t)got > left) a->beyond = got - left;
    const size_t words = a->digested < size ? (a->done - a->digested) / 8 : 0;
    a->sum += mixed(to + a->digested, words, first + a->digested / 8);
    a->digested += 8 * words;
    if (a->done == size && a->digested < size) {  // the piece's last word, padded with zeros
      uint64_t w = 0;
      std::memcpy(&w, to + a->digested, size - a->digested);
      a->sum += pd::mix(w + (first + a->digested / 8 + 1) * pd::STEP);
      a->digested = size;
    }
    if (a->done == size) break;
    if (now_ns() > ends) return 0;
    if ((size_t)got < step && !patience.wait(size - a->done, ends)) return 0;
  }
  return 1;
}

// The digest of a piece of `bytes` whose segments' sums add up to `sum`.
uint64_t pd_finish(uint64_t sum, uint64_t bytes) { return pd::finish(sum, bytes); }

// The sum of a segment that is there already.
uint64_t pd_sum(const unsigned char* from, uint64_t bytes, uint64_t first) {
  uint64_t sum = mixed(from, bytes / 8, first);
  if (const size_t rest = bytes % 8) {
    uint64_t w = 0;
    std::memcpy(&w, from + bytes - rest, rest);
    sum += pd::mix(w + (first + bytes / 8 + 1) * pd::STEP);
  }
  return sum;
}
}
