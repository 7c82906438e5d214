// Whole-context mix, and the update of a running state: the state of the context, what came before, and the readout.

#include "cpu/means.h"
#include "cpu/plan.h"

namespace pom::cpu {
namespace {

template <class Acc>
struct MixPlan {
  Arena arena;
  StateOut state;  // (batch, 1, C), until all outputs can be written
  size_t bytes;    // for the state, then for the readout
  char* memory;

  MixPlan(const Features& f, const Gates& g, void* workspace)
      : arena(workspace),
        state{arena.take<Acc>(f.batch * f.channels()), arena.take<Acc>(f.batch * f.channels()),
              arena.take<double>(f.batch)},
        bytes(std::max(cpu::workspace(StateArgs{f, {}, state}), cpu::workspace(readout(g, nullptr)))),
        memory(arena.take<char>(bytes)) {}

  ReadoutArgs readout(const Gates& g, void* y) const { return {g, 1, nullptr, state.view(), y}; }
};

template <class Acc>
Status run(const Features& f, const Gates& g, const StateView& prior, const StateOut& out, void* y, void* workspace,
           const Executor& executor) {
  if (f.batch == 0) return Status::ok;
  const MixPlan<Acc> plan(f, g, workspace);
  if (const Status s = state({f, {}, plan.state, prior}, plan.memory, plan.bytes, executor); s != Status::ok) return s;
  if (const Status s = readout(plan.readout(g, y), plan.memory, plan.bytes, executor); s != Status::ok) return s;
  std::copy_n(static_cast<Acc*>(plan.state.total), f.batch * f.channels(), static_cast<Acc*>(out.total));
  std::copy_n(static_cast<Acc*>(plan.state.residual), f.batch * f.channels(), static_cast<Acc*>(out.residual));
  std::copy_n(plan.state.count, f.batch, out.count);
  return Status::ok;
}

size_t workspace_of(const Features& f, const Gates& g) { return planned_bytes<MixPlan>(f.dtype, f, g); }

}  // namespace

size_t workspace(const MixArgs& args) { return workspace_of(args.features, args.gates); }
size_t workspace(const UpdateArgs& args) { return workspace_of(args.features, args.gates); }

Status mix(const MixArgs& args, void* workspace, size_t bytes, const Executor& executor) {
  return checked_run(args, args.features.dtype, workspace, bytes, [&](auto acc, void* memory) {
    return run<decltype(acc)>(args.features, args.gates, args.prior, args.out, args.y, memory, executor);
  });
}

Status update(const UpdateArgs& args, void* workspace, size_t bytes, const Executor& executor) {
  return checked_run(args, args.features.dtype, workspace, bytes, [&](auto acc, void* memory) {
    return run<decltype(acc)>(args.features, args.gates, args.state.view(), args.state, args.y, memory, executor);
  });
}

}  // namespace pom::cpu
