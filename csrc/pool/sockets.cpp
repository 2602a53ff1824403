// Pages over sockets: sent and received in blocks that fit the nearest caches, without coming back to Python in between.
#include <sys/socket.h>
#include <sys/time.h>

#include <cerrno>
#include <chrono>
#include <cstring>

#include "error.h"
#include "hash.h"
#include "page_hash.h"
#include "pool.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr uint64_t BLOCK = 256 << 10;

// The receive time-out of a socket, set anew only where it changes.
class Wait {
 public:
  Wait(int fd, uint64_t stall_ms, uint64_t limit_ms)
      : fd_(fd), stall_(stall_ms), end_(Clock::now() + std::chrono::milliseconds(limit_ms)) {}

  // False when the time is over.
  bool arm() {
    auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end_ - Clock::now()).count();
    if (left <= 0) return false;
    uint64_t wait = static_cast<uint64_t>(left) < stall_ ? static_cast<uint64_t>(left) : stall_;
    if (wait == armed_) return true;
    timeval time{static_cast<time_t>(wait / 1000), static_cast<suseconds_t>(wait % 1000 * 1000)};
    armed_ = wait;
    return setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time) == 0;
  }

 private:
  int fd_;
  uint64_t stall_, armed_ = 0;
  Clock::time_point end_;
};

}  // namespace

LSP_API int lsp_send(int fd, uint64_t address, uint64_t length) {
  const auto* data = reinterpret_cast<const unsigned char*>(address);
  while (length) {
    ssize_t sent = send(fd, data, length < BLOCK ? length : BLOCK, MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return lsp::fail(-ETIMEDOUT, "the reader took no byte in time");
      return lsp::fail(-errno, "cannot send: %s", strerror(errno));
    }
    data += sent;
    length -= static_cast<uint64_t>(sent);
  }
  return 0;
}

LSP_API int lsp_recv_checksums(int fd, const uint64_t* addresses, const uint64_t* lengths, size_t count,
                               uint64_t stall_ms, uint64_t limit_ms, uint64_t* sums) {
  const lsp::ChunkHash chunk_sum = lsp::chunk_hash();
  Wait wait(fd, stall_ms, limit_ms);
  for (size_t page = 0; page < count; ++page) {
    auto* data = reinterpret_cast<unsigned char*>(addresses[page]);
    const uint64_t length = lengths[page];
    uint64_t got = 0, chunk = 0, sum = 0;
    while (got < length) {
      if (!wait.arm()) return lsp::fail(-ETIMEDOUT, "the time given is over");
      ssize_t n = recv(fd, data + got, length - got < BLOCK ? length - got : BLOCK, MSG_WAITALL);
      if (n < 0) {
        if (errno == EINTR) continue;
        if (errno == EAGAIN || errno == EWOULDBLOCK) return lsp::fail(-ETIMEDOUT, "no byte arrived in time");
        return lsp::fail(-errno, "cannot receive: %s", strerror(errno));
      }
      if (n == 0) return lsp::fail(-EPIPE, "the stream ended early");
      got += static_cast<uint64_t>(n);
      for (; (chunk + 1) * lsp::CHUNK <= got; ++chunk) sum += chunk_sum(data + chunk * lsp::CHUNK, chunk);
    }
    if (uint64_t rest = length % lsp::CHUNK) {
      alignas(64) unsigned char padded[lsp::CHUNK] = {};
      memcpy(padded, data + length - rest, rest);
      sum += chunk_sum(padded, chunk);
    }
    sums[page] = lsp::finish(sum, length);
  }
  return 0;
}
