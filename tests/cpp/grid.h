// The cases that every operation is tested with: each form, degree, dtype and context, with random shape and layout.
#pragma once

#include <initializer_list>

#include "inputs.h"

// Shapes that no vector width divides, and shapes that the CUDA kernels can access eight or four elements at a time.
constexpr Shape kShapes[] = {{1, 1, 17},  {3, 1, 30},  {2, 7, 5},   {2, 12, 1}, {5, 2, 3}, {1, 70, 33},
                             {2, 130, 9}, {1, 9, 530}, {1, 300, 4}, {2, 0, 5},  {0, 4, 5}};
constexpr Shape kFriendlyShapes[] = {{3, 1, 8},   {2, 70, 8},  {1, 300, 16}, {2, 9, 64},   {1, 37, 128},
                                     {1, 3, 256}, {2, 5, 264}, {2, 0, 16},   {1, 12, 272}, {3, 1, 4},
                                     {2, 70, 12}, {1, 37, 36}, {1, 9, 100},  {2, 5, 132},  {1, 3, 260}};
constexpr int64_t kLargest = 20'000;  // most features of a random case, times the degree

template <size_t n>
Shape drawn_shape(const Case& c, const Shape (&shapes)[n]) {
  Shape shape;
  do shape = shapes[choose(n)];
  while (shape.batch * shape.tokens * shape.width * c.degree > kLargest);
  return shape;
}

// Draws everything that the grid leaves open.
inline Case drawn(Case c, bool friendly) {
  c.shape = friendly ? drawn_shape(c, kFriendlyShapes) : drawn_shape(c, kShapes);
  constexpr int64_t kHeads[] = {1, 1, 1, 3, 5, 10, 17}, kFriendlyHeads[] = {1, 1, 2, 4, 16};
  do c.heads = friendly ? kFriendlyHeads[choose(std::size(kFriendlyHeads))] : kHeads[choose(std::size(kHeads))];
  while (c.channels() % c.heads);
  if (c.form == Form::power) c.axes = int(choose(3));
  if (2 * c.axes > c.gates()) c.axes = 0;
  c.prior = choose(2) == 0;
  c.layout = Layout(choose(6));
  if (friendly && c.layout == Layout::padded) c.layout = Layout::spaced;
  c.aligned = choose(friendly ? 8 : 2) > 0;
  return c;
}

template <class Test>
void test_grid(Test test, std::initializer_list<Context> contexts) {
  for (Context context : contexts)
    for (Form form : {Form::product, Form::power})
      for (int degree : {1, 2, 3, 4, 5, 16})
        for (Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
          for (bool weighted : {false, true})
            if (!weighted || (context != Context::mask && context != Context::even))
              for (bool friendly : {false, true})
                if (!friendly || (degree >= 2 && degree <= 4))
                  test(drawn({form, degree, dtype, context, weighted}, friendly));
}

// Calls in which all arrays but one allow accesses of 16 bytes, for each array in turn: it starts 8 bytes after a
// multiple of 16, or its rows or samples do.
template <class Test>
void test_each_odd(Test test, std::initializer_list<Context> contexts) {
  auto each = [](int& until_odd, auto run) {
    for (int before = 0; until_odd < 0; ++before) {
      until_odd = before;
      run();
    }
    until_odd = -1;
  };
  for (Context context : contexts)
    for (Dtype dtype : {Dtype::f32, Dtype::bf16}) {
      const Case plain = {Form::power, 3, dtype, context, context != Context::mask, true, {2, 8, 16}};
      Case heads = plain, turned = plain, product = plain;
      heads.heads = 2, turned.axes = 1, product.form = Form::product;
      for (const Case& c : {plain, heads, turned, product}) {
        if (kCuda) each(Buffer::until_odd, [&] { test(c); });  // CPU memory has no known alignment
        for (Layout layout : {Layout::odd_rows, Layout::odd_samples}) {
          Rows::odd = layout;
          each(Rows::until_odd, [&] { test(c); });
        }
      }
    }
}
