// The readout of queries that are projected a block at a time, through the projection behind it, its derivative along a
// direction, and the way back.

#include "cpu/projected_gates.h"

namespace pom::cpu {
namespace {

Gates gates_of(const ProjectReadoutArgs& args) { return pom::gates_of(args, args.channels, args.heads); }

struct ProjectReadoutPlan {
  Arena arena;
  ProjectedGates in;
  Products products;
  Slot gate, tangent;
  char* mixed;  // dtype (rows, C): what the queries of a block read
  size_t bytes = 0;
  char* memory;

  ProjectReadoutPlan(const ProjectReadoutArgs& args, void* workspace, const Executor& executor = {})
      : arena(workspace),
        in(args, gates_of(args),
           Blocks(args.batch, args.queries, args.channels * size_of(args.dtype), evenly_spaced(args)), arena),
        products(args.linear, args.dtype, {in.blocks.most_rows() * args.dim, 0}, arena, executor),
        gate(products.slot(0, args.dtype, args.saved ? 0 : in.blocks.most_rows() * in.width, arena)),
        tangent(products.slot(1, args.dtype, args.x_tangent.data ? in.blocks.most_rows() * in.width : 0, arena)),
        mixed(arena.take<char>(in.blocks.most_rows() * args.channels * in.size)) {
    for (int64_t i = 0; i < in.blocks.count(); ++i)
      bytes = std::max(bytes, cpu::workspace(reading(in.blocks[i], nullptr, args.x_tangent.data, args.state_tangent)));
    memory = arena.take<char>(int64_t(bytes));
  }

  // What the queries of a block read, or its derivative.
  ReadoutArgs reading(const Block& block, const void* gate, const void* gate_tangent, const StateView& tangent) const {
    const LocalGroups local = in.groups.of(block);
    const int64_t row = in.row(block, local);
    return {in.gates(block, gate, gate_tangent), local.count, local.offsets(),
            in.view(in.args.state, row),         mixed,       in.view(tangent, row)};
  }
};

Status run(const ProjectReadoutArgs& args, void* workspace, const Executor& executor) {
  ProjectReadoutPlan plan(args, workspace, executor);
  const auto& in = plan.in;
  // What is read, and from there to y.
  const auto read = [&](const Block& block, const ReadoutArgs& reading, const void* bias, void* y) {
    const Status s = readout(reading, plan.memory, plan.bytes, executor);
    if (s == Status::ok)
      plan.products.multiply_to({args.dtype, 0, block.rows(), args.channels, args.out_dim,
                                 dense(plan.mixed, args.channels), dense(args.out_weight, args.channels), bias},
                                at(y, block.first * args.out_dim * in.size));
    return s;
  };
  for (int64_t i = 0; i < in.blocks.count(); ++i) {
    const Block block = in.blocks[i];
    const void* gate = at(args.saved, block.first * in.width * in.size);
    if (!gate) gate = plan.products.multiply(in.projection(args.x, block, args.gate_bias), plan.gate);
    Status s = read(block, plan.reading(block, gate, nullptr, {}), args.out_bias, args.y);
    if (s == Status::ok && args.x_tangent.data) {
      const void* const tangent = plan.products.multiply(in.projection(args.x_tangent, block, nullptr), plan.tangent);
      s = read(block, plan.reading(block, gate, tangent, args.state_tangent), nullptr, args.y_tangent);
    }
    if (s != Status::ok) return s;
  }
  return plan.products.status();
}

template <class Acc>
struct ProjectReadoutBackwardPlan {
  const ProjectReadoutArgs& args;
  Arena arena;
  ProjectedGates in;
  Products products;
  Slot gate, grad_mixed, part;  // part: of the gradient of a weight
  char *mixed, *grad_gate;      // dtype (rows, C) and (rows, gates)
  Acc *grad_total, *bias;       // of a block: (groups, C); (out_dim or gates)
  double* totals;               // (batch, groups, C)
  Sum<Acc> gate_weight, gate_bias, out_weight, out_bias;
  size_t bytes = 0;
  char* memory;

  ProjectReadoutBackwardPlan(const ProjectReadoutBackwardArgs& backward, void* workspace, const Executor& executor = {})
      : args(backward.readout),
        arena(workspace),
        in(args, gates_of(args),
           Blocks(args.batch, args.queries, args.channels * size_of(args.dtype),
                  evenly_spaced(args) && evenly_spaced(backward.grad_y, args.batch, args.queries), kBackwardBlockBytes),
           arena),
        products(args.linear, args.dtype, most(), arena, executor),
        gate(products.slot(0, args.dtype, args.saved ? 0 : rows() * in.width, arena)),
        grad_mixed(products.slot(1, args.dtype, rows() * args.channels, arena)),
        part(products.slot(2, args.dtype, std::max(in.width * args.dim, args.out_dim * args.channels), arena)),
        mixed(arena.take<char>(rows() * args.channels * in.size)),
        grad_gate(arena.take<char>(rows() * in.width * in.size)),
        bias(arena.take<Acc>(std::max(in.width, args.out_dim))),
        totals(arena.take<double>(args.batch * args.groups * args.channels)),
        gate_weight(in.width * args.dim, arena, executor),
        gate_bias(in.width, arena, executor),
        out_weight(args.out_dim * args.channels, arena, executor),
        out_bias(args.out_dim, arena, executor) {
    int64_t groups = 0;
    for (int64_t i = 0; i < in.blocks.count(); ++i) {
      const ReadoutArgs read = reading(in.blocks[i], nullptr);
      groups = std::max(groups, in.blocks[i].samples * read.groups);
      bytes = std::max({bytes, cpu::workspace(read), cpu::workspace(way_back(read, nullptr))});
    }
    memory = arena.take<char>(int64_t(bytes));
    grad_total = arena.take<Acc>(groups * args.channels);
  }

  // What the queries of a block have read, and the way back from there.
  ReadoutArgs reading(const Block& block, const void* gate) const {
    const LocalGroups local = in.groups.of(block);
    return {in.gates(block, gate), local.count, local.offsets(), in.view(args.state, in.row(block, local)), mixed};
  }
  ReadoutBackwardArgs way_back(const ReadoutArgs& r, const void* grad) const {
    return {r.gates,       r.groups,  r.offsets, r.state, grad, r.gates.tokens * args.channels,
            args.channels, grad_gate, grad_total};
  }
  // Adds aᵀ b of the rows of a block to the gradient of a weight (outputs, inputs), and the sums of a to its bias's.
  void add(const Block& block, const Matrix& a, const Matrix& b, Sum<Acc>& weight, int64_t outputs, int64_t inputs) {
    const MatrixProduct product = {args.dtype, 0, outputs, block.rows(), inputs, transposed(a), transposed(b)};
    weight.add(products.multiply(product, part), args.dtype);
  }
  void add_bias(const Block& block, const Matrix& a, Sum<Acc>& sum, int64_t outputs) {
    products.column_sums(a, args.dtype, block.rows(), outputs, bias);
    sum.add(bias, kAccDtype<Acc>);
  }

 private:
  int64_t rows() const { return in.blocks.most_rows(); }
  Products::Most most() const {
    return {rows() * std::max({args.dim, args.out_dim, in.width}),
            std::max({args.channels * args.out_dim, in.width * args.dim, rows() * std::max(args.channels, args.dim)})};
  }
};

template <class Acc>
Status run(const ProjectReadoutBackwardArgs& args, void* workspace, const Executor& executor) {
  ProjectReadoutBackwardPlan<Acc> plan(args, workspace, executor);
  const ProjectReadoutArgs& r = args.readout;
  const auto& in = plan.in;
  const Dtype dtype = r.dtype;
  const Matrix out_weight = dense(r.out_weight, r.channels), gate_weight = dense(r.gate_weight, r.dim),
               mixed = dense(plan.mixed, r.channels), grad_gate = dense(plan.grad_gate, in.width);
  std::fill_n(plan.totals, r.batch * r.groups * r.channels, 0.0);
  for (int64_t i = 0; i < in.blocks.count(); ++i) {
    const Block block = in.blocks[i];
    const Matrix x = rows_of(r.x, block, dtype), dy = rows_of(args.grad_y, block, dtype);
    const void* gate = at(r.saved, block.first * in.width * in.size);
    if (!gate) gate = plan.products.multiply(in.projection(r.x, block, r.gate_bias), plan.gate);
    const void* const grad_mixed = plan.products.multiply(
        {dtype, 0, block.rows(), r.out_dim, r.channels, dy, transposed(out_weight)}, plan.grad_mixed);
    const ReadoutArgs read = plan.reading(block, gate);
    Status s = readout(read, plan.memory, plan.bytes, executor);
    if (s != Status::ok) return s;
    plan.add(block, dy, mixed, plan.out_weight, r.out_dim, r.channels);
    if (args.grad_out_bias) plan.add_bias(block, dy, plan.out_bias, r.out_dim);
    s = readout_backward(plan.way_back(read, grad_mixed), plan.memory, plan.bytes, executor);
    if (s != Status::ok) return s;
    double* const totals = plan.totals + in.row(block, in.groups.of(block)) * r.channels;
    for (int64_t k = 0; k < block.samples * read.groups * r.channels; ++k) totals[k] += plan.grad_total[k];
    plan.products.multiply_to({dtype, 0, block.rows(), in.width, r.dim, grad_gate, transposed(gate_weight)},
                              at(args.grad_x, block.first * r.dim * in.size));
    plan.add(block, grad_gate, x, plan.gate_weight, in.width, r.dim);
    if (args.grad_gate_bias) plan.add_bias(block, grad_gate, plan.gate_bias, in.width);
  }
  std::copy_n(plan.totals, r.batch * r.groups * r.channels, static_cast<Acc*>(args.grad_total));
  plan.gate_weight.write(args.grad_gate_weight, dtype);
  plan.gate_bias.write(args.grad_gate_bias, dtype);
  plan.out_weight.write(args.grad_out_weight, dtype);
  plan.out_bias.write(args.grad_out_bias, dtype);
  return plan.products.status();
}

}  // namespace

size_t workspace(const ProjectReadoutArgs& args) { return ProjectReadoutPlan(args, nullptr).arena.used(); }

Status project_readout(const ProjectReadoutArgs& args, void* workspace, size_t bytes, const Executor& executor) {
  return checked_run(args, args.dtype, workspace, bytes,
                     [&](auto, void* memory) { return run(args, memory, executor); });
}

size_t workspace(const ProjectReadoutBackwardArgs& args) {
  return planned_bytes<ProjectReadoutBackwardPlan>(args.readout.dtype, args);
}

Status project_readout_backward(const ProjectReadoutBackwardArgs& args, void* workspace, size_t bytes,
                                const Executor& executor) {
  return checked_run(args, args.readout.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, executor); });
}

}  // namespace pom::cpu
