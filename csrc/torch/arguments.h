// Reads the arguments of an operation from torch's stack, and writes its results there.
//
// An operation is a function of a few structs, each of which stands for several arguments that follow each other in the
// schema. Such a struct has a function `read`, beside which the schema of its arguments is defined as a macro.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <type_traits>

namespace pom_torch {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
template <size_t count>
using Tensors = std::array<Tensor, count>;  // the results of an operation

// The arguments of a call, each of which is read once and then belongs to the reader. Torch frees none of them: all
// must be read before the first is checked, or an error would leak the rest.
class Arguments {
 public:
  Arguments(const StableIValue* stack, uint64_t count) : next_(stack), end_(stack + count) {}

  template <class T>
  T next() {
    STD_TORCH_CHECK(next_ != end_, "pom_ext: a schema has fewer arguments than its operation reads");
    return torch::stable::detail::to<T>(*next_++);
  }
  Tensor tensor() { return next<Tensor>(); }
  Optional optional() { return next<Optional>(); }
  int64_t integer() { return next<int64_t>(); }
  bool boolean() { return next<bool>(); }

  void expect_end() const { STD_TORCH_CHECK(next_ == end_, "pom_ext: an operation reads not all of its arguments"); }

 private:
  const StableIValue *next_, *end_;
};

// Reads a parameter of an operation: a struct with a function `read`, or a single argument.
template <class T, class = void>
struct Reader {
  static T read(Arguments& arguments) { return arguments.next<T>(); }
};
template <class T>
struct Reader<T, std::void_t<decltype(T::read(std::declval<Arguments&>()))>> {
  static T read(Arguments& arguments) { return T::read(arguments); }
};

template <size_t count>
void write(StableIValue* stack, const Tensors<count>& results) {
  for (const Tensor& result : results) *stack++ = torch::stable::detail::from(result);
}
inline void write(StableIValue* stack, const Tensor& result) { *stack = torch::stable::detail::from(result); }
inline void write(StableIValue* stack, bool result) { *stack = torch::stable::detail::from(result); }

// The operation as torch calls it: what TORCH_BOX is for functions whose parameters are single arguments.
template <auto function>
struct Boxed;
template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t inputs, uint64_t) {
    Arguments arguments(stack, inputs);
    std::tuple<std::decay_t<Parameters>...> read{Reader<std::decay_t<Parameters>>::read(arguments)...};  // in order
    arguments.expect_end();
    if constexpr (std::is_void_v<Result>)
      std::apply(function, read);
    else
      write(stack, std::apply(function, read));
  }
};

}  // namespace pom_torch
