// Memory between inaccessible pages: an access outside ends the program on the spot.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

inline size_t page_size() {
  static const size_t size = size_t(sysconf(_SC_PAGESIZE));
  return size;
}
inline size_t whole_pages(size_t bytes) { return (bytes + page_size() - 1) / page_size() * page_size(); }

// Whole pages of zeros, with an inaccessible page before and after.
inline char* map_guarded(size_t bytes) {
  char* const memory = static_cast<char*>(
      mmap(nullptr, bytes + 2 * page_size(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (memory == MAP_FAILED || mprotect(memory + page_size(), bytes, PROT_READ | PROT_WRITE)) {
    std::perror("memory between inaccessible pages");
    std::abort();
  }
  return memory + page_size();
}
// Whether all bytes are still 0xff.
inline bool untouched(const char* begin, const char* end) {
  return begin == end || (*begin == '\xff' && !std::memcmp(begin, begin + 1, size_t(end - begin) - 1));
}

inline void unmap_guarded(char* memory, size_t bytes) { munmap(memory - page_size(), bytes + 2 * page_size()); }

// `bytes` bytes that end `gap` bytes before an inaccessible page or begin `gap` bytes after one, so at any alignment.
// All are 0xff at first. The destructor checks that the bytes around them are unchanged.
class GuardedBuffer {
 public:
  enum class Side { begin, end };

  GuardedBuffer() = default;
  explicit GuardedBuffer(size_t bytes, Side side = Side::end, size_t gap = 0)
      : bytes_(bytes), mapped_(whole_pages(bytes + gap)), memory_(map_guarded(mapped_)) {
    data_ = side == Side::begin ? memory_ + gap : memory_ + mapped_ - gap - bytes;
    std::memset(memory_, 0xff, mapped_);
  }
  GuardedBuffer(GuardedBuffer&& other) { swap(other); }
  GuardedBuffer& operator=(GuardedBuffer&& other) {
    swap(other);
    return *this;
  }
  ~GuardedBuffer() {
    if (!memory_) return;
    if (!untouched(memory_, data_) || !untouched(data_ + bytes_, memory_ + mapped_)) {
      std::fprintf(stderr, "written outside a buffer of %zu bytes\n", bytes_);
      std::abort();
    }
    unmap_guarded(memory_, mapped_);
  }

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void swap(GuardedBuffer& other) {
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
  }

  size_t bytes_ = 0, mapped_ = 0;
  char *memory_ = nullptr, *data_ = nullptr;
};
