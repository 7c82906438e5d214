// How an operation is cut into tasks, and where its scratch memory lies.
//
// The cut depends on the shapes alone, never on the number of threads or on the batch, and partial sums are added in
// the order of the tokens: results are the same bits on any machine with the same instruction set.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "arena.h"
#include "checks.h"
#include "cpu/kernels.h"

namespace pom::cpu {

constexpr int64_t kPanel = 8;        // tokens an inner loop takes at once
constexpr int64_t kMaxChunks = 64;   // bounds the partial sums: memory is O(state), never O(tokens)
constexpr int64_t kTileWidth = 512;  // channels of a tile, over all its ranges: a panel of scratch stays in L1
constexpr int64_t kMinRange = 32;    // channels of one range, at least
constexpr int64_t kScratch = kPanel * (kTileWidth > kMaxDegree * kMinRange ? kTileWidth : kMaxDegree * kMinRange);
constexpr int64_t kWantedTasks = 64;  // enough for many cores to share evenly

template <class Body>
void parallel(const Executor& executor, int64_t n, Body&& body) {
  auto call = [](void* argument, int64_t i) { (*static_cast<std::remove_reference_t<Body>*>(argument))(i); };
  if (executor.parallel_for && n > 1)
    executor.parallel_for(executor.context, n, call, &body);
  else
    for (int64_t i = 0; i < n; ++i) body(i);
}

// Tokens in chunks of equal length, few enough that a partial sum of each can be kept.
struct Chunks {
  int64_t tokens, length, count;
  explicit Chunks(int64_t tokens) : tokens(tokens) {
    const int64_t wanted = (tokens + kMaxChunks - 1) / kMaxChunks;
    length = std::max<int64_t>(64, (wanted + kPanel - 1) / kPanel * kPanel);
    count = std::max<int64_t>(1, (tokens + length - 1) / length);
  }
  int64_t begin(int64_t chunk) const { return chunk * length; }
  int64_t end(int64_t chunk) const { return std::min(tokens, begin(chunk) + length); }
};

// Groups of consecutive tokens: by offsets, or evenly dealt where there are none.
struct Segments {
  int64_t tokens, count;
  const int64_t* offsets;
  int64_t begin(int64_t group) const {
    return offsets ? offsets[group] : group * (tokens / std::max<int64_t>(1, count));
  }
  int64_t end(int64_t group) const { return offsets || group + 1 < count ? begin(group + 1) : tokens; }
  // The last group that begins at or before `token` and is not empty there.
  int64_t at(int64_t token) const {
    if (!offsets) return count ? std::min(count - 1, token / std::max<int64_t>(1, tokens / count)) : 0;
    return std::upper_bound(offsets, offsets + count, token) - offsets - 1;
  }
};

// Pieces: the chunks cut at the borders of the groups. A piece has a partial sum of its own. Piece p of a chunk is
// the part of group first_group + p in it; numbering them chunk + group makes all numbers different.
struct Pieces {
  Chunks chunks;
  Segments segments;
  int64_t count() const { return chunks.count + segments.count; }
  static int64_t number(int64_t chunk, int64_t group) { return chunk + group; }

  // body(piece, group, begin, end) for the non-empty pieces of one chunk, in order
  template <class Body>
  void each(int64_t chunk, Body body) const {
    int64_t token = chunks.begin(chunk);
    const int64_t stop = chunks.end(chunk);
    if (token >= stop) return;
    for (int64_t group = segments.at(token); token < stop; ++group) {
      const int64_t end = std::min(stop, segments.end(group));
      if (end > token) body(number(chunk, group), group, token, end);
      token = std::max(token, end);
    }
  }

  // body(piece) for the non-empty pieces of one group, in order
  template <class Body>
  void of_group(int64_t group, Body body) const {
    const int64_t begin = segments.begin(group), end = segments.end(group);
    if (begin == end) return;
    for (int64_t chunk = begin / chunks.length; chunk * chunks.length < end; ++chunk) body(number(chunk, group));
  }
};

// The tiles of C channels. With rotary positions a tile holds two runs that are turned into each other.
class Tiles {
 public:
  Tiles(int64_t ranges, int64_t width, const Rotary& rotary) : ranges_(ranges), width_(width), rotary_(rotary) {
    tile_ = std::max<int64_t>(kMinRange, kTileWidth / (rotary.axes ? 2 : std::max<int64_t>(1, ranges)));
    per_axis_ = rotary.axes ? (rotary.half + tile_ - 1) / tile_ : 0;
    turned_ = 2 * rotary.half * rotary.axes;
    count_ = per_axis_ * rotary.axes + (width - turned_ + tile_ - 1) / tile_;
  }
  int64_t count() const { return count_; }

  Tile operator[](int64_t i) const {
    Tile tile;
    if (i < per_axis_ * rotary_.axes) {
      const int64_t axis = i / per_axis_, low = i % per_axis_ * tile_;
      tile.begin = 2 * rotary_.half * axis + low;
      tile.width = std::min(tile_, rotary_.half - low);
      tile.ranges = 2;
      tile.range_stride = rotary_.half;
      tile.rotary_begin = rotary_.half * axis + low;
    } else {
      tile.begin = turned_ + (i - per_axis_ * rotary_.axes) * tile_;
      tile.width = std::min(tile_, width_ - tile.begin);
      tile.ranges = ranges_;
      tile.range_stride = width_;
    }
    return tile;
  }

 private:
  int64_t ranges_, width_, tile_, per_axis_, turned_, count_;
  Rotary rotary_;
};

// Tiles dealt to `count` tasks, so that a short sequence still fills the cores.
struct TileGroups {
  int64_t tiles, count;
  TileGroups(int64_t tiles, int64_t other_tasks)
      : tiles(tiles),
        count(std::clamp<int64_t>(kWantedTasks / std::max<int64_t>(1, other_tasks), 1, std::max<int64_t>(1, tiles))) {}
  int64_t begin(int64_t group) const { return tiles * group / count; }
  int64_t end(int64_t group) const { return tiles * (group + 1) / count; }
};

// The bytes that a plan takes, by the accumulator's type.
template <template <class> class Plan, class... Args>
size_t planned_bytes(Dtype dtype, const Args&... args) {
  return dtype == Dtype::f64 ? Plan<double>(args..., nullptr).arena.used() : Plan<float>(args..., nullptr).arena.used();
}

// Checks, then body(accumulator{}, aligned workspace).
template <class Args, class Body>
Status checked_run(const Args& args, Dtype dtype, void* memory, size_t bytes, Body body) {
  if (const Status s = check(args); s != Status::ok) return s;
  if (!memory || bytes < workspace(args)) return Status::workspace_too_small;
  return dtype == Dtype::f64 ? body(double{}, Arena::align(memory)) : body(float{}, Arena::align(memory));
}

}  // namespace pom::cpu
