// Shared memory of the blocks of cuda_on_cpu.cpp.
#pragma once

#include <utility>

#include "guarded.h"

// A block's memory. It ends at an inaccessible page; another one lies before its first page.
class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(SharedMemory&& other) : memory_(std::exchange(other.memory_, nullptr)), pages_(other.pages_) {}
  ~SharedMemory() {
    if (memory_) unmap_guarded(memory_, pages_);
  }

  void clear(size_t bytes) {
    const size_t pages = whole_pages((bytes + 15) / 16 * 16);
    if (pages != pages_ || !memory_) {
      if (memory_) unmap_guarded(memory_, pages_);
      memory_ = map_guarded(pages);
      pages_ = pages;
    }
    std::memset(memory_, 0xff, pages);
    bytes_ = bytes;
  }
  char* data() const { return memory_ + pages_ - (bytes_ + 15) / 16 * 16; }
  // Bytes that no page protects: up to a page before the block's memory, and up to 15 bytes after it.
  bool written_before() const { return !untouched(memory_, data()); }
  bool written_past() const { return !untouched(data() + bytes_, memory_ + pages_); }
  bool is_before(const char* address) const { return address >= memory_ - page_size() && address < memory_; }
  bool is_past(const char* address) const {
    return address >= memory_ + pages_ && address < memory_ + pages_ + page_size();
  }

 private:
  char* memory_ = nullptr;
  size_t pages_ = 0, bytes_ = 0;
};
