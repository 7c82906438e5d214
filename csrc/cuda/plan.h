// Splits an operation into blocks. The split depends only on the shape of one sample, and so do the bits of the result.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "arena.h"
#include "checks.h"
#include "cuda/launch.h"
#include "pom/math.h"

namespace pom::cuda {

constexpr int kLanes = 32;     // threads side by side in a row of a block: a warp reads 512 contiguous bytes
constexpr int kThreads = 256;  // of most blocks: 8 rows
constexpr int kWarp = 32;
constexpr int64_t kMaxTokens = (int64_t(1) << 31) - 1024;  // of a sample, and channels: both fit in 32 bits

POM_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
POM_HD constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
POM_HD constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Groups of consecutive tokens, cut at the borders of chunks of 2^shift tokens: pieces, each with a partial sum in a
// slot. Slots count the borders, of chunks and of groups, in the order of tokens; pieces between coinciding borders are
// empty. The slots of a group are consecutive, and all of them are written.
struct Piece {
  int64_t group, begin, end;
};
struct Pieces {
  int64_t tokens = 0, chunks = 1, groups = 1;
  int shift = 0;                     // a chunk has 2^shift tokens
  int64_t group_length = 0;          // if there are no offsets
  const int64_t* offsets = nullptr;  // (groups + 1), or null: groups of equal length
  bool apart = false;                // every group has `chunks` rows of its own, whatever they hold

  Pieces() = default;
  Pieces(int64_t tokens, int shift, int64_t groups, const int64_t* offsets)
      : tokens(tokens),
        chunks(max(1, ceil_div(tokens, int64_t(1) << shift))),
        groups(groups),
        shift(shift),
        group_length(tokens / max(1, groups)),
        offsets(offsets) {}
  static Pieces rows(int64_t groups, int64_t of_each = 1) {
    Pieces pieces;
    pieces.chunks = of_each, pieces.groups = groups, pieces.apart = true;
    return pieces;
  }

  POM_HD int64_t slots() const { return apart ? chunks * groups : groups ? chunks + groups - 1 : 0; }

  // Offsets lie in the caller's device memory and the host never saw them: no token outside the sample may be touched.
  POM_HD int64_t border(int64_t group) const {
    if (offsets) return max(0, min(tokens, offsets[group]));
    return group < groups ? group * group_length : tokens;
  }
  POM_HD int64_t passed(int64_t token) const { return token > 0 ? (token - 1) >> shift : 0; }  // whole chunks before
  POM_HD int64_t first_slot(int64_t group) const {
    return apart ? group * chunks : min(group + passed(border(group)), chunks + group - 1);
  }
  POM_HD int64_t last_slot(int64_t group) const {
    return apart ? group * chunks + chunks - 1 : min(group + passed(border(group + 1)), chunks + group - 1);
  }

  POM_HD int64_t group_of(int64_t slot) const {
    if (groups == 1) return 0;
    int64_t low = max(0, slot - (chunks - 1)), high = min(slot, groups - 1);
    while (low < high) {  // finds the first group whose slots do not end before this one
      const int64_t middle = (low + high) / 2;
      if (last_slot(middle) < slot)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
  POM_HD Piece at(int64_t slot, int64_t group) const {
    const int64_t chunk = slot - group, begin = chunk << shift, end = min(tokens, (chunk + 1) << shift);
    if (groups == 1) return {group, begin, end};
    return {group, max(begin, border(group)), min(end, border(group + 1))};
  }
  POM_HD Piece at(int64_t slot) const { return at(slot, group_of(slot)); }
  // The last slot, at most `end`, such that the pieces from `slot` on are consecutive tokens of one group. Offsets that
  // do not run from 0 to all tokens leave slots without a group; these are taken one at a time.
  POM_HD int64_t last_of_run(int64_t slot, int64_t end, int64_t group) const {
    return slot < first_slot(group) ? slot : max(slot, min(end, last_slot(group)));
  }
};

// log2 of the tokens of a chunk: from 64 tokens, for many blocks, to 512, where writing partial sums takes no time
// beside reading tokens and a thread still adds few numbers in single precision.
inline int chunk_shift(int64_t tokens) {
  int shift = 6;
  while (shift < 9 && tokens > int64_t(256) << shift) ++shift;
  return shift;
}

// The channels of one thread: `ranges` runs of Vec channels, `stride` apart.
struct Place {
  int64_t channel = 0, stride = 0;
  int ranges = 0;     // 0 if the thread has no channels
  int64_t pair = -1;  // column of the angle tables; -1 if not rotated
};

// Splits the channels into tiles, one per row of threads. The factors of the product form lie in ranges `width` apart;
// with rotary positions a thread holds the two ranges of a rotated pair.
struct ChannelTiles {
  int64_t width = 0;  // of one range
  int ranges = 1, vec = 1, lanes = kLanes;
  int64_t half = 0;    // pairs of one axis
  int axis_tiles = 0;  // tiles of one axis
  int rotated_tiles = 0, count = 0;

  ChannelTiles() = default;
  ChannelTiles(int64_t width, int ranges, const Rotary& rotary, int vec, int lanes)
      : width(width), ranges(ranges), vec(vec), lanes(lanes), half(rotary.half) {
    if (rotary.axes) axis_tiles = int(ceil_div(half, lanes * vec));
    rotated_tiles = axis_tiles * rotary.axes;
    count = rotated_tiles + int(ceil_div(width - 2 * half * rotary.axes, lanes * vec));
  }

  POM_HD Place place(unsigned channel_tile, int lane) const {
    Place place;
    if (int(channel_tile) < rotated_tiles) {
      const int axis = int(channel_tile) / axis_tiles;
      const int64_t low = (int64_t(channel_tile) - axis * axis_tiles) * lanes * vec + int64_t(lane) * vec;
      place = {2 * half * axis + low, half, low < half ? 2 : 0, low < half ? half * axis + low : -1};
    } else {
      const int64_t rotated = axis_tiles ? 2 * half * (rotated_tiles / axis_tiles) : 0;
      place.channel = rotated + (int64_t(channel_tile) - rotated_tiles) * lanes * vec + int64_t(lane) * vec;
      place.stride = width;
      place.ranges = place.channel < width ? ranges : 0;
    }
    return place;
  }
};

// Elements of the widest access, at most 16 bytes. Rotated channels come in pairs, with coefficients for both, and
// tangents double everything: these take half as many, to stay in registers.
constexpr int widest_vec(size_t size, bool paired = false) { return size == 8 ? 1 : size == 4 || paired ? 4 : 8; }

// How many elements (8, 4 or 1) each access can take: all pointers, strides and widths must be multiples of that.
class Alignment {
 public:
  explicit Alignment(Dtype dtype)
      : size_(dtype == Dtype::f64   ? 8
              : dtype == Dtype::f32 ? 4
                                    : 2),
        vec_(widest_vec(size_)) {}

  // Pointers to elements.
  Alignment& pointers(std::initializer_list<const void*> pointers) {
    for (const void* p : pointers) narrow(int64_t(reinterpret_cast<uintptr_t>(p)), size_);
    return *this;
  }
  // Pointers to numbers of the accumulator's type. A vector of these is one or several loads of 16 bytes.
  Alignment& numbers(std::initializer_list<const void*> pointers) {
    for (const void* p : pointers)
      if (reinterpret_cast<uintptr_t>(p) % 16) vec_ = 1;
    return *this;
  }
  Alignment& sizes(std::initializer_list<int64_t> sizes) {
    for (int64_t n : sizes) narrow(n, 1);
    return *this;
  }
  Alignment& with(const Alignment& other) {
    vec_ = int(min(vec_, other.vec_));
    return *this;
  }
  int vec() const { return vec_; }

 private:
  void narrow(int64_t n, int64_t unit) {
    while (vec_ > 1 && n % (vec_ * unit)) vec_ = vec_ == 8 ? 4 : 1;
  }

  int64_t size_;
  int vec_;
};

// A form whose features, or a gate whose values, are derivatives along a tangent.
template <class Value>
struct WithTangent : Value {
  using Value::Value;
};
// A form without a tangent beside gates that have one.
template <class Form>
struct WithGateTangent : Form {
  using Form::Form;
  using Gate = WithTangent<typename Form::Gate>;
};
template <class Value>
constexpr bool has_tangent = false;
template <class Value>
constexpr bool has_tangent<WithTangent<Value>> = true;

// One instance of a kernel. There are few: eight or four elements per access for degrees 2, 3 and 4 (with tangents
// four, for 2 and 3), and one for everything else.
template <class Form_, class T_, int Vec_, bool rotated_>
struct Instance {
  using Form = Form_;
  using T = T_;
  using Acc = typename accumulator<T>::type;
  static constexpr int Vec = Vec_;
  static constexpr bool rotated = rotated_;
};

// Calls body(std::integral_constant<int, vec>{}) for a vec of 8, 4 or 1 that is at most `widest`.
template <int widest, class Body>
Status with_vec(int vec, Body body) {
  if constexpr (widest == 8)
    if (vec == 8) return body(std::integral_constant<int, 8>{});
  if constexpr (widest >= 4)
    if (vec == 4) return body(std::integral_constant<int, 4>{});
  return body(std::integral_constant<int, 1>{});
}

// With tangents there are vector instances only for the dtypes and degrees that models are trained in.
constexpr bool is_general_with_tangent(Dtype dtype, int degree) {
  return (dtype != Dtype::f32 && dtype != Dtype::bf16) || degree < 2 || degree > 3;
}

// The form for values without a tangent: GELU of 16-bit types may be coarse.
template <template <int> class Form, int K, class T>
using FormFor = std::conditional_t<Form<K>::has_coeff || sizeof(T) != 2, Form<K>, CoarseProduct<K>>;

template <template <int> class Form, bool rotated, bool tangents, class T, class Body>
Status with_degree(const Features& f, int vec, Body body) {
  if constexpr (tangents) {
    if (f.u_tangent) {
      if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bf16>) {
        if (vec == 4 && f.degree == 2) return body(Instance<WithTangent<Form<2>>, T, 4, rotated>{});
        if (vec == 4 && f.degree == 3) return body(Instance<WithTangent<Form<3>>, T, 4, rotated>{});
      }
      return body(Instance<WithTangent<Form<0>>, T, 1, rotated>{});
    }
  }
  return with_vec<widest_vec(sizeof(T), rotated)>(vec, [&](auto elements) {
    constexpr int Vec = decltype(elements)::value;
    if constexpr (Vec > 1) {
      if (f.degree == 2) return body(Instance<FormFor<Form, 2, T>, T, Vec, rotated>{});
      if (f.degree == 3) return body(Instance<FormFor<Form, 3, T>, T, Vec, rotated>{});
      return body(Instance<FormFor<Form, 4, T>, T, Vec, rotated>{});
    }
    return body(Instance<FormFor<Form, 0, T>, T, 1, rotated>{});
  });
}

// Calls body(T{}) for this dtype, one of those whose numbers are added in Acc.
template <class Acc, class Body>
Status with_dtype(Dtype dtype, Body body) {
  if constexpr (std::is_same_v<Acc, double>)
    return body(double{});
  else
    return dtype == Dtype::bf16 ? body(bf16{}) : dtype == Dtype::f16 ? body(f16{}) : body(float{});
}

// Calls body(Instance{}) for these features, split into these tiles. tangents = false leaves out the instances with
// tangents.
template <class Acc, bool tangents = true, class Body>
Status with_instance(const Features& f, const ChannelTiles& channel_tiles, Body body) {
  return with_dtype<Acc>(f.dtype, [&](auto type) {
    using T = decltype(type);
    const int vec = channel_tiles.vec;
    if (f.form == Form::product) return with_degree<Product, false, tangents, T>(f, vec, body);
    if (channel_tiles.rotated_tiles) return with_degree<Power, true, tangents, T>(f, vec, body);
    return with_degree<Power, false, tangents, T>(f, vec, body);
  });
}

// A plan splits a call among kernels and takes their workspace: Plan<Acc>(args, memory), `arena`, and run(stream).
//
// The workspace bytes of a plan; 0 for arguments that will be refused. Pointers may be null at this point.
template <template <class> class Plan, class Args>
size_t planned_bytes(const Args& args, Dtype dtype) {
  const Status status = check(args);
  if (status != Status::ok && status != Status::null_pointer) return 0;
  return dtype == Dtype::f64 ? Plan<double>(args, nullptr).arena.used() : Plan<float>(args, nullptr).arena.used();
}

// Whether all these sizes fit in 32 bits.
inline bool fit(std::initializer_list<int64_t> sizes) {
  for (const int64_t n : sizes)
    if (n > kMaxBlocks) return false;
  return true;
}

// Checks the arguments, then runs the plan in the caller's workspace.
template <template <class> class Plan, class Args>
Status run_plan(const Args& args, Dtype dtype, void* memory, size_t bytes, void* stream) {
  if (const Status s = check(args); s != Status::ok) return s;
  if (!memory || bytes < workspace(args)) return Status::workspace_too_small;
  memory = Arena::align(memory);
  return dtype == Dtype::f64 ? Plan<double>(args, memory).run(stream) : Plan<float>(args, memory).run(stream);
}

}  // namespace pom::cuda
