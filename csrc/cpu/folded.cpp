// The readout with one gate per head: the mean features of every head go through the projection once, and the queries,
// projected a block at a time, read the result.

#include "cpu/means.h"
#include "cpu/projected_gates.h"

namespace pom::cpu {
namespace {

template <class Acc>
struct FoldedPlan {
  Arena arena;
  ProjectedGates in;
  bool derived;
  int64_t rows, heads, width;            // groups of all samples; channels of a head: width
  Products products, of_heads;           // of_heads: of numbers of the accumulator's type
  Slot gate, tangent, map;               // map: (heads, rows, D)
  Acc *mean, *out_weight;                // (rows, C); the weight of the projection, if its type is another
  char *folded, *folded_tangent;         // dtype (rows, heads, D)
  char* both;                            // dtype (rows, 2 heads, D): of the state's direction and of the state
  char *value, *value_tangent, *values;  // dtype (rows of a block, heads); values: both, side by side
  Acc *ones, *zeros;
  double* counts;
  size_t bytes = 0;
  char* memory;

  FoldedPlan(const FoldedReadoutArgs& args, void* workspace, const Executor& executor = {})
      : arena(workspace),
        in(args, pom::gates_of(args, args.heads, 1),
           Blocks(args.batch, args.queries, args.out_dim * size_of(args.dtype), evenly_spaced(args),
                  args.x_tangent.data ? kBlockBytes : kResultBlockBytes),
           arena),
        derived(args.x_tangent.data),
        rows(args.batch * args.groups),
        heads(args.heads),
        width(args.channels / std::max<int64_t>(1, heads)),
        products(args.linear, args.dtype, {in.blocks.most_rows() * args.dim, 2 * heads * args.out_dim}, arena,
                 executor),
        of_heads(args.linear, kAcc, {rows * width, args.out_dim * width}, arena, executor),
        gate(products.slot(0, args.dtype, block_gates(), arena)),
        tangent(products.slot(1, args.dtype, derived ? block_gates() : 0, arena)),
        map(of_heads.slot(0, kAcc, rows * heads * args.out_dim, arena)),
        mean(arena.take<Acc>(rows * args.channels)),
        out_weight(arena.take<Acc>(args.dtype == kAcc ? 0 : args.out_dim * args.channels)),
        folded(arena.take<char>(rows * heads * args.out_dim * in.size)),
        folded_tangent(arena.take<char>(derived ? rows * heads * args.out_dim * in.size : 0)),
        both(arena.take<char>(derived ? 2 * rows * heads * args.out_dim * in.size : 0)),
        value(arena.take<char>(block_gates() * in.size)),
        value_tangent(arena.take<char>(derived ? block_gates() * in.size : 0)),
        values(arena.take<char>(derived ? 2 * block_gates() * in.size : 0)),
        ones(arena.take<Acc>(in.blocks.most_samples() * heads)),
        zeros(arena.take<Acc>(in.blocks.most_samples() * heads)),
        counts(arena.take<double>(in.blocks.most_samples())) {
    for (int64_t i = 0; i < in.blocks.count(); ++i)
      bytes = std::max(bytes, cpu::workspace(reading(in.blocks[i], nullptr, args.x_tangent.data, nullptr)));
    memory = arena.take<char>(int64_t(bytes));
  }

  // γ of the queries of a block, or its derivative: what they read of a state of ones.
  ReadoutArgs reading(const Block& block, const void* gate, const void* gate_tangent, void* value) const {
    return {in.gates(block, gate, gate_tangent), 1, nullptr, {ones, zeros, counts}, value};
  }

  static constexpr Dtype kAcc = kAccDtype<Acc>;

 private:
  int64_t block_gates() const { return in.blocks.most_rows() * heads; }
};

// The mean features of every head through its columns of the projection: `to` (rows, heads, D).
template <class Acc>
void fold(FoldedPlan<Acc>& plan, const StateView& state, char* to, const Executor& executor) {
  const FoldedReadoutArgs& args = plan.in.args;
  const int64_t channels = args.channels, dim = args.out_dim;
  means({state.total, state.residual, args.state.count}, plan.rows, channels, plan.mean, executor);
  const void* const weight = args.dtype == plan.kAcc ? args.out_weight : plan.out_weight;
  const MatrixProduct product = {plan.kAcc,
                                 plan.heads,
                                 plan.rows,
                                 plan.width,
                                 dim,
                                 {plan.mean, channels, 1, plan.width},
                                 {weight, channels, 1, plan.width}};
  const Acc* const result = static_cast<const Acc*>(plan.of_heads.multiply(product, plan.map));
  with_type(args.dtype, [&](auto element) {
    parallel(executor, plan.rows * plan.heads, [&](int64_t i) {
      const int64_t row = i / plan.heads, head = i % plan.heads;
      const Acc* const from = result + (head * plan.rows + row) * dim;
      auto* const folded = reinterpret_cast<decltype(element)*>(to) + (row * plan.heads + head) * dim;
      for (int64_t d = 0; d < dim; ++d) put(from[d], folded + d);
    });
  });
}

// Values (rows, maps) of the queries of a block, times what is folded for their groups (rows, maps, D), into y.
template <class Acc>
void multiply(FoldedPlan<Acc>& plan, const Block& block, const char* values, const char* folded, int64_t maps,
              const void* bias, void* y) {
  const FoldedReadoutArgs& args = plan.in.args;
  const int64_t size = plan.in.size, dim = args.out_dim;
  const LocalGroups local = plan.in.groups.of(block);
  for (int64_t i = 0; i < block.samples * local.count; ++i) {
    const int64_t sample = i / local.count, g = i % local.count, begin = local.bounds[g];
    const int64_t count = local.bounds[g + 1] - begin, row = sample * block.tokens + begin;
    if (count == 0) continue;
    const int64_t group = (block.sample + sample) * args.groups + local.first + g;
    plan.products.multiply_to({args.dtype, 0, count, maps, dim, dense(values + row * maps * size, maps),
                               transposed(dense(folded + group * maps * dim * size, dim)), bias},
                              at(y, (block.first + row) * dim * size));
  }
}

// Rows of two arrays side by side, each of so many bytes.
void interleave(const char* a, const char* b, int64_t rows, int64_t bytes, char* to) {
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(a + row * bytes, bytes, to + 2 * row * bytes);
    std::copy_n(b + row * bytes, bytes, to + (2 * row + 1) * bytes);
  }
}

template <class Acc>
Status run(const FoldedReadoutArgs& args, void* workspace, const Executor& executor) {
  FoldedPlan<Acc> plan(args, workspace, executor);
  const auto& in = plan.in;
  if (args.batch * args.queries == 0) return Status::ok;
  const int64_t heads = plan.heads;
  std::fill_n(plan.ones, in.blocks.most_samples() * heads, Acc(1));
  std::fill_n(plan.zeros, in.blocks.most_samples() * heads, Acc(0));
  std::fill_n(plan.counts, in.blocks.most_samples(), 1.0);
  if (args.dtype != plan.kAcc)
    with_type(args.dtype, [&](auto element) {
      const auto* const from = static_cast<const decltype(element)*>(args.out_weight);
      parallel(executor, args.out_dim, [&](int64_t row) {
        for (int64_t i = row * args.channels; i < (row + 1) * args.channels; ++i)
          plan.out_weight[i] = Acc(number(from[i]));
      });
    });
  fold(plan, args.state, plan.folded, executor);
  if (plan.derived) {  // both terms of the derivative are one product
    fold(plan, args.state_tangent, plan.folded_tangent, executor);
    interleave(plan.folded_tangent, plan.folded, plan.rows, heads * args.out_dim * in.size, plan.both);
  }
  for (int64_t i = 0; i < in.blocks.count(); ++i) {
    const Block block = in.blocks[i];
    const void* const gate = plan.products.multiply(in.projection(args.x, block, args.gate_bias), plan.gate);
    Status s = readout(plan.reading(block, gate, nullptr, plan.value), plan.memory, plan.bytes, executor);
    if (s != Status::ok) return s;
    multiply(plan, block, plan.value, plan.folded, heads, args.out_bias, args.y);
    if (!plan.derived) continue;
    const void* const tangent = plan.products.multiply(in.projection(args.x_tangent, block, nullptr), plan.tangent);
    s = readout(plan.reading(block, gate, tangent, plan.value_tangent), plan.memory, plan.bytes, executor);
    if (s != Status::ok) return s;
    interleave(plan.value, plan.value_tangent, block.rows(), heads * in.size, plan.values);
    multiply(plan, block, plan.values, plan.both, 2 * heads, nullptr, args.y_tangent);
  }
  return plan.of_heads.status() == Status::ok ? plan.products.status() : plan.of_heads.status();
}

}  // namespace

size_t workspace(const FoldedReadoutArgs& args) { return planned_bytes<FoldedPlan>(args.dtype, args); }

Status folded_readout(const FoldedReadoutArgs& args, void* workspace, size_t bytes, const Executor& executor) {
  return checked_run(args, args.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, executor); });
}

}  // namespace pom::cpu
