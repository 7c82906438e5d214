// The state of tokens that are projected a block at a time, its derivative along a direction, and the way back.

#include "cpu/products.h"
#include "cpu/token_blocks.h"
#include "residual.h"

namespace pom::cpu {
namespace {

// Tokens by blocks, their projections, and the groups that these belong to.
template <class Acc>
struct ProjectedTokens {
  const ProjectStateArgs& args;
  Dtype dtype;
  int64_t channels;
  Blocks blocks;
  BlockGroups groups;

  ProjectedTokens(const ProjectStateArgs& args, int64_t block_bytes, Arena& arena)
      : args(args),
        dtype(args.features.dtype),
        channels(args.features.channels()),
        blocks(args.features.batch, args.features.tokens, channels * size_of(dtype),
               evenly_spaced(args.x, args.features.batch, args.features.tokens) &&
                   evenly_spaced(args.x_tangent, args.features.batch, args.features.tokens),
               block_bytes),
        groups({args.features.tokens, args.groups.count, args.groups.offsets}, arena) {}

  MatrixProduct projection(const Tokens& x, const Block& block, const void* bias) const {
    return {dtype, 0, block.rows(), args.dim, channels, rows_of(x, block, dtype), dense(args.weight, args.dim), bias};
  }
  Features features(const Block& block, const void* u) const {
    Features f = args.features;
    f.batch = block.samples, f.tokens = block.tokens;
    f.u = u, f.u_batch_stride = block.tokens * channels, f.u_token_stride = channels;
    f.weight = at(f.weight, block.first * int64_t(sizeof(Acc)));
    f.rotary = rotary_of(f.rotary, block, sizeof(Acc));
    return f;
  }
  // The row of the first group of a block in a state of all samples.
  int64_t row(const Block& block, const LocalGroups& local) const {
    return block.sample * groups.count() + local.first;
  }
};

// The states of all groups, summed from those of the blocks.
template <class Acc>
class BlockStates {
 public:
  BlockStates(const ProjectedTokens<Acc>& in, Arena& arena)
      : in_(in),
        rows_(in.args.features.batch * in.groups.count()),
        sums_(arena.take<double>(rows_ * in.channels)),
        counts_(arena.take<double>(rows_)) {}

  void clear() {
    std::fill_n(sums_, rows_ * in_.channels, 0.0);
    std::fill_n(counts_, rows_, 0.0);
  }
  // The states of a block's groups, the first of which is that of `first`.
  void add(const StateOut& part, int64_t first, int64_t rows, const Executor& executor) {
    const auto *const total = static_cast<const Acc*>(part.total), *const residual =
                                                                       static_cast<const Acc*>(part.residual);
    parallel(executor, rows, [&](int64_t row) {
      double* const sums = sums_ + (first + row) * in_.channels;
      for (int64_t c = 0, i = row * in_.channels; c < in_.channels; ++c, ++i)
        sums[c] += double(total[i]) + double(residual[i]);
      counts_[first + row] += part.count[row];
    });
  }
  void finish(const StateView& prior, const StateOut& out, const Executor& executor) {
    const int64_t groups = in_.groups.count(), channels = in_.channels;
    auto *const total = static_cast<Acc*>(out.total), *const residual = static_cast<Acc*>(out.residual);
    parallel(executor, in_.args.features.batch, [&](int64_t b) {
      for (int64_t row = b * groups; row < (b + 1) * groups; ++row) {
        double* const sums = sums_ + row * channels;
        if (in_.args.groups.cumulative && row > b * groups) {
          for (int64_t c = 0; c < channels; ++c) sums[c] += sums[c - channels];
          counts_[row] += counts_[row - 1];
        }
        for (int64_t c = 0, i = row * channels; c < channels; ++c, ++i) {
          double sum = sums[c];
          const double rest = add_prior<Acc>(prior, b * channels + c, sum);
          split(sum, rest, total[i], residual[i]);
        }
        if (out.count) out.count[row] = counts_[row] + (prior.count ? prior.count[b] : 0.0);
      }
    });
  }

 private:
  const ProjectedTokens<Acc>& in_;
  int64_t rows_;
  double *sums_, *counts_;
};

template <class Acc>
struct ProjectStatePlan {
  Arena arena;
  ProjectedTokens<Acc> in;
  bool derived;  // along a direction too
  Products products;
  Slot u, u_tangent;
  Acc* coeff_tangent;  // zeros: the direction is of the tokens alone
  BlockStates<Acc> states, tangents;
  size_t bytes = 0;  // for the state of a block
  char* memory;
  StateOut part;

  ProjectStatePlan(const ProjectStateArgs& args, void* workspace, const Executor& executor = {})
      : arena(workspace),
        in(args, kBlockBytes, arena),
        derived(args.tangent_out.total),
        products(args.linear, in.dtype, {in.blocks.most_rows() * args.dim, 0}, arena, executor),
        u(products.slot(0, in.dtype, in.blocks.most_rows() * in.channels, arena)),
        u_tangent(products.slot(1, in.dtype, derived ? in.blocks.most_rows() * in.channels : 0, arena)),
        coeff_tangent(arena.take<Acc>(derived ? in.channels * args.features.degree : 0)),
        states(in, arena),
        tangents(derived ? BlockStates<Acc>(in, arena) : states) {
    int64_t rows = 0;
    for (int64_t i = 0; i < in.blocks.count(); ++i) {
      const LocalGroups local = in.groups.of(in.blocks[i]);
      Features f = in.features(in.blocks[i], nullptr);
      f.u_tangent = args.x_tangent.data;
      rows = std::max(rows, in.blocks[i].samples * local.count);
      bytes = std::max(bytes, cpu::workspace(StateArgs{f, local.groups(), {}}));
    }
    memory = arena.take<char>(int64_t(bytes));
    part = {arena.take<Acc>(rows * in.channels), arena.take<Acc>(rows * in.channels), arena.take<double>(rows)};
  }
};

template <class Acc>
Status run(const ProjectStateArgs& args, void* workspace, const Executor& executor) {
  ProjectStatePlan<Acc> plan(args, workspace, executor);
  const auto& in = plan.in;
  plan.states.clear();
  if (plan.derived) {
    plan.tangents.clear();
    std::fill_n(plan.coeff_tangent, in.channels * args.features.degree, Acc(0));
  }
  for (int64_t i = 0; i < in.blocks.count(); ++i) {
    const Block block = in.blocks[i];
    const LocalGroups local = in.groups.of(block);
    Features f = in.features(block, plan.products.multiply(in.projection(args.x, block, args.bias), plan.u));
    for (BlockStates<Acc>* states : {&plan.states, &plan.tangents}) {
      if (states == &plan.tangents) {
        if (!plan.derived) break;
        f.u_tangent = plan.products.multiply(in.projection(args.x_tangent, block, nullptr), plan.u_tangent);
        f.u_tangent_batch_stride = f.u_batch_stride, f.u_tangent_token_stride = f.u_token_stride;
        f.coeff_tangent = f.coeff ? plan.coeff_tangent : nullptr;
      }
      const Status s = state({f, local.groups(), plan.part}, plan.memory, plan.bytes, executor);
      if (s != Status::ok) return s;
      states->add(plan.part, in.row(block, local), block.samples * local.count, executor);
    }
  }
  plan.states.finish(args.prior, args.out, executor);
  if (plan.derived) plan.tangents.finish(args.prior_tangent, args.tangent_out, executor);
  return plan.products.status();
}

template <class Acc>
struct ProjectStateBackwardPlan {
  Arena arena;
  ProjectedTokens<Acc> in;
  int64_t weight_size, bias_size, coeff_size;  // of the gradients, 0 for those that are not needed
  Products products;
  Slot u, part;            // part: of the gradient of the weight
  Acc* suffix;             // (batch, groups, C): gradients of every group's own tokens, for cumulative groups
  char* grad_u;            // dtype (rows, C)
  Acc *bias, *grad_coeff;  // of a block
  Sum<Acc> weight_sum, bias_sum, coeff_sum;
  size_t bytes = 0;
  char* memory;

  ProjectStateBackwardPlan(const ProjectStateBackwardArgs& args, void* workspace, const Executor& executor = {})
      : arena(workspace),
        in(args.state, kBackwardBlockBytes, arena),
        weight_size(args.grad_weight ? in.channels * args.state.dim : 0),
        bias_size(args.grad_bias ? in.channels : 0),
        coeff_size(args.state.features.form == Form::power ? in.channels * args.state.features.degree : 0),
        products(args.state.linear, in.dtype, most(args.state.dim), arena, executor),
        u(products.slot(0, in.dtype, args.saved ? 0 : rows() * in.channels, arena)),
        part(products.slot(1, in.dtype, weight_size, arena)),
        suffix(arena.take<Acc>(
            args.state.groups.cumulative ? args.state.features.batch * in.groups.count() * in.channels : 0)),
        grad_u(arena.take<char>(rows() * in.channels * size_of(in.dtype))),
        bias(arena.take<Acc>(bias_size)),
        grad_coeff(arena.take<Acc>(coeff_size)),
        weight_sum(weight_size, arena, executor),
        bias_sum(bias_size, arena, executor),
        coeff_sum(coeff_size, arena, executor) {
    for (int64_t i = 0; i < in.blocks.count(); ++i) {
      const Groups groups = in.groups.of(in.blocks[i]).groups();
      bytes = std::max(bytes, cpu::workspace(StateBackwardArgs{in.features(in.blocks[i], nullptr), groups}));
    }
    memory = arena.take<char>(int64_t(bytes));
  }

 private:
  int64_t rows() const { return in.blocks.most_rows(); }
  Products::Most most(int64_t dim) const {
    return {rows() * std::max(dim, in.channels), dim * std::max(rows(), in.channels)};
  }
};

// Gradients of every group's own tokens: with cumulative groups those of the groups behind it too.
template <class Acc>
const Acc* own_gradients(const ProjectStateBackwardArgs& args, const ProjectStateBackwardPlan<Acc>& plan,
                         const Executor& executor) {
  const Acc* const grad = static_cast<const Acc*>(args.grad_total);
  if (!args.state.groups.cumulative) return grad;
  const int64_t groups = plan.in.groups.count(), channels = plan.in.channels;
  parallel(executor, args.state.features.batch, [&](int64_t b) {
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (int64_t i = ((b + 1) * groups - 1) * channels + c; i >= b * groups * channels; i -= channels)
        plan.suffix[i] = Acc(sum += grad[i]);
    }
  });
  return plan.suffix;
}

template <class Acc>
Status run(const ProjectStateBackwardArgs& args, void* workspace, const Executor& executor) {
  ProjectStateBackwardPlan<Acc> plan(args, workspace, executor);
  const auto& in = plan.in;
  const Dtype dtype = in.dtype;
  const int64_t channels = in.channels, dim = args.state.dim;
  const Matrix weight = dense(args.state.weight, dim), grad_u = dense(plan.grad_u, channels);
  const Acc* const own = own_gradients(args, plan, executor);
  for (int64_t i = 0; i < in.blocks.count(); ++i) {
    const Block block = in.blocks[i];
    const LocalGroups local = in.groups.of(block);
    const void* u = at(args.saved, block.first * channels * size_of(dtype));
    if (!u) u = plan.products.multiply(in.projection(args.state.x, block, args.state.bias), plan.u);
    const Acc* const grad = own + in.row(block, local) * channels;
    const Status s = state_backward({in.features(block, u), local.groups(), grad, plan.grad_u, plan.grad_coeff},
                                    plan.memory, plan.bytes, executor);
    if (s != Status::ok) return s;
    if (args.grad_x)
      plan.products.multiply_to({dtype, 0, block.rows(), channels, dim, grad_u, transposed(weight)},
                                at(args.grad_x, block.first * dim * size_of(dtype)));
    if (args.grad_weight) {
      const Matrix x = rows_of(args.state.x, block, dtype);
      const MatrixProduct product = {dtype, 0, channels, block.rows(), dim, transposed(grad_u), transposed(x)};
      plan.weight_sum.add(plan.products.multiply(product, plan.part), dtype);
    }
    if (args.grad_bias) {
      plan.products.column_sums(grad_u, dtype, block.rows(), channels, plan.bias);
      plan.bias_sum.add(plan.bias, kAccDtype<Acc>);
    }
    plan.coeff_sum.add(plan.grad_coeff, kAccDtype<Acc>);
  }
  plan.weight_sum.write(args.grad_weight, dtype);
  plan.bias_sum.write(args.grad_bias, dtype);
  plan.coeff_sum.write(args.grad_coeff, kAccDtype<Acc>);
  return plan.products.status();
}

}  // namespace

size_t workspace(const ProjectStateArgs& args) { return planned_bytes<ProjectStatePlan>(args.features.dtype, args); }

Status project_state(const ProjectStateArgs& args, void* workspace, size_t bytes, const Executor& executor) {
  return checked_run(args, args.features.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, executor); });
}

size_t workspace(const ProjectStateBackwardArgs& args) {
  return planned_bytes<ProjectStateBackwardPlan>(args.state.features.dtype, args);
}

Status project_state_backward(const ProjectStateBackwardArgs& args, void* workspace, size_t bytes,
                              const Executor& executor) {
  return checked_run(args, args.state.features.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, executor); });
}

}  // namespace pom::cpu
