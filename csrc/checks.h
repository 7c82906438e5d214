// The argument checks of every operation, before it touches an output, on any device.
#pragma once

#include <initializer_list>

#include "pom/math.h"
#include "pom/pom.h"

namespace pom {

constexpr int64_t kMaxHeads = 1024;  // of one gate

// The first of several that is not ok.
inline Status first_refusal(std::initializer_list<Status> checked) {
  for (const Status s : checked)
    if (s != Status::ok) return s;
  return Status::ok;
}

// Whether the three parts of a state are there.
inline bool is_complete(const StateView& state) { return state.total && state.residual && state.count; }

inline Status check(const Rotary& rotary, Form form, int64_t width) {
  if (!rotary.axes) return Status::ok;
  if (form != Form::power) return Status::rotary_needs_power;
  if (rotary.axes < 0 || rotary.half < 1 || 2 * rotary.half * rotary.axes > width) return Status::bad_size;
  return rotary.cos && rotary.sin ? Status::ok : Status::null_pointer;
}

inline Status check(const Features& f) {
  if (f.degree < 1 || f.degree > kMaxDegree) return Status::bad_degree;
  if (f.batch < 0 || f.tokens < 0 || f.width < 1) return Status::bad_size;
  if (const Status s = check(f.rotary, f.form, f.width); s != Status::ok) return s;
  if (f.batch * f.tokens > 0 && !f.u) return Status::null_pointer;
  if (f.form == Form::power && (!f.coeff || (f.u_tangent && !f.coeff_tangent))) return Status::null_pointer;
  return Status::ok;
}

inline Status check(const Groups& groups, const Features& f) {
  if (groups.count < 0 || (groups.count > 1 && !groups.offsets && !groups.mask)) return Status::bad_size;
  if (groups.mask && (groups.offsets || groups.cumulative || f.weight)) return Status::bad_size;
  if (groups.count == 0 && f.tokens && !groups.mask) return Status::bad_size;  // tokens without a group
  return Status::ok;
}

inline Status check(const Gates& g) {
  if (g.batch < 0 || g.tokens < 0 || g.channels < 1 || g.heads < 1 || g.channels % g.heads) return Status::bad_size;
  if (g.heads > kMaxHeads) return Status::bad_size;
  if (const Status s = check(g.rotary, g.form, g.width()); s != Status::ok) return s;
  return g.batch * g.tokens > 0 && !g.gate ? Status::null_pointer : Status::ok;
}

// A state is complete, or absent.
inline Status check_prior(const StateView& prior) {
  return is_complete(prior) || !(prior.total || prior.residual || prior.count) ? Status::ok : Status::null_pointer;
}

inline Status check(const StateArgs& args) {
  const Status s = first_refusal({check(args.features), check(args.groups, args.features), check_prior(args.prior)});
  const bool empty = args.features.batch * args.groups.count == 0;
  return s == Status::ok && !empty && !is_complete(args.out.view()) ? Status::null_pointer : s;
}

inline Status check(const StateBackwardArgs& args) {
  const Features& f = args.features;
  if (const Status s = first_refusal({check(f), check(args.groups, f)}); s != Status::ok) return s;
  if (f.form == Form::power && !args.grad_coeff) return Status::null_pointer;
  if (f.batch * f.tokens > 0 && (!args.grad_u || (args.groups.count && !args.grad_total))) return Status::null_pointer;
  return Status::ok;
}

// Queries are split into groups by offsets, or evenly.
inline Status check_readout(const Gates& g, int64_t groups, const int64_t* offsets, const StateView& state) {
  if (const Status s = check(g); s != Status::ok) return s;
  if (groups < 0 || (!offsets && (groups ? g.tokens % groups : g.tokens))) return Status::bad_size;
  return g.batch * groups > 0 && !is_complete(state) ? Status::null_pointer : Status::ok;
}

inline Status check(const ReadoutArgs& args) {
  if (const Status s = check_readout(args.gates, args.groups, args.offsets, args.state); s != Status::ok) return s;
  if (args.tangent.total && !(args.tangent.residual && args.gates.tangent)) return Status::null_pointer;
  return args.gates.batch * args.gates.tokens > 0 && !args.y ? Status::null_pointer : Status::ok;
}

inline Status check(const ReadoutBackwardArgs& args) {
  if (const Status s = check_readout(args.gates, args.groups, args.offsets, args.state); s != Status::ok) return s;
  const bool tokens = args.gates.batch * args.gates.tokens > 0;
  if (tokens && !(args.grad_y && args.grad_gate)) return Status::null_pointer;
  return args.gates.batch * args.groups > 0 && !args.grad_total ? Status::null_pointer : Status::ok;
}

// Gates and features of a causal mix have the same tokens. Args: CausalArgs or CausalBackwardArgs.
template <class Args>
Status check_causal(const Args& args) {
  const Features& f = args.features;
  const Gates& g = args.gates;
  if (const Status s = first_refusal({check(f), check(g)}); s != Status::ok) return s;
  if (f.batch != g.batch || f.tokens != g.tokens || f.channels() != g.channels) return Status::bad_size;
  if (f.rotary.axes != g.rotary.axes || (g.heads == 1 && f.rotary.half != g.rotary.half)) return Status::bad_size;
  if (f.dtype != g.dtype) return Status::bad_dtype;
  if (f.u_tangent && g.tangent) return Status::no_tangents;
  return check_prior(args.prior);
}

inline Status check(const CausalArgs& args) {
  if (const Status s = check_causal(args); s != Status::ok) return s;
  if (args.features.batch * args.features.tokens > 0 && !args.y) return Status::null_pointer;
  return args.features.batch > 0 && !is_complete(args.out.view()) ? Status::null_pointer : Status::ok;
}

inline Status check(const CausalBackwardArgs& args) {
  const Features& f = args.features;
  if (const Status s = check_causal(args); s != Status::ok) return s;
  if (f.form == Form::power && !args.grad_coeff) return Status::null_pointer;
  if (f.batch * f.tokens > 0 && !(args.grad_y && args.grad_u && args.grad_gate)) return Status::null_pointer;
  return f.batch > 0 && !args.grad_prior ? Status::null_pointer : Status::ok;
}

// The context and the queries of a whole-context mix. Args: MixArgs or UpdateArgs; `out`: the state that it writes.
template <class Args>
Status check_mix(const Args& args, const StateView& prior, const StateOut& out) {
  const Features& f = args.features;
  const Gates& g = args.gates;
  if (const Status s = first_refusal({check(f), check(g)}); s != Status::ok) return s;
  if (f.batch != g.batch || f.channels() != g.channels || f.form != g.form) return Status::bad_size;
  if (f.u_tangent || g.tangent) return Status::no_tangents;
  if (f.dtype != g.dtype) return Status::bad_dtype;
  if (const Status s = check_prior(prior); s != Status::ok) return s;
  if (f.batch * g.tokens > 0 && !args.y) return Status::null_pointer;
  return f.batch > 0 && !is_complete(out.view()) ? Status::null_pointer : Status::ok;
}

inline Status check(const MixArgs& args) { return check_mix(args, args.prior, args.out); }
inline Status check(const UpdateArgs& args) { return check_mix(args, {}, args.state); }

// The operations with projections, on a CPU.
inline Status check(const ProjectStateArgs& args) {
  Features f = args.features;
  if (f.u_tangent) return Status::no_tangents;
  f.u = args.x.data;
  if (const Status s = check(StateArgs{f, args.groups, args.out, args.prior}); s != Status::ok) return s;
  if (args.groups.mask || args.dim < 1) return Status::bad_size;
  if (!args.weight || !args.prior_tangent.total != !args.prior_tangent.residual) return Status::null_pointer;
  if (!args.tangent_out.total) return args.x_tangent.data && args.groups.count ? Status::null_pointer : Status::ok;
  return args.tangent_out.residual && (args.x_tangent.data || f.batch * f.tokens == 0) ? Status::ok
                                                                                       : Status::null_pointer;
}

inline Status check(const ProjectStateBackwardArgs& args) {
  const ProjectStateArgs& state = args.state;
  Features f = state.features;
  if (f.u_tangent || state.x_tangent.data) return Status::no_tangents;
  f.u = state.x.data;
  if (const Status s = check(f); s != Status::ok) return s;
  if (const Status s = check(state.groups, f); s != Status::ok) return s;
  if (state.groups.mask || state.dim < 1) return Status::bad_size;
  const bool tokens = f.batch * f.tokens > 0;
  return !state.weight || (tokens && state.groups.count && !args.grad_total) ? Status::null_pointer : Status::ok;
}

// Gates that are still to be computed, with the form, the sizes and the positions of `args`.
inline Gates gates_of(const FoldedReadoutArgs& args, int64_t channels, int64_t heads) {
  return {args.form, args.dtype, args.batch, args.queries, channels, heads, args.x.data, 0, 0, args.rotary};
}

inline Status check_projected(const FoldedReadoutArgs& args, const Gates& gates, bool with_output) {
  if (const Status s = check_readout(gates, args.groups, args.offsets, args.state); s != Status::ok) return s;
  if (args.dim < 1 || args.out_dim < 1 || args.channels < 1 || (args.groups == 0 && args.queries))
    return Status::bad_size;
  if (!args.gate_weight || !args.out_weight) return Status::null_pointer;
  if (!with_output || args.batch * args.queries == 0) return Status::ok;
  const StateView& tangent = args.state_tangent;
  const bool derived = !args.x_tangent.data || (args.y_tangent && tangent.total && tangent.residual);
  return args.y && derived ? Status::ok : Status::null_pointer;
}

inline Status check(const ProjectReadoutArgs& args) {
  return check_projected(args, gates_of(args, args.channels, args.heads), true);
}

inline Status check(const FoldedReadoutArgs& args) {
  if (args.heads < 1 || args.channels % args.heads) return Status::bad_size;
  return check_projected(args, gates_of(args, args.heads, 1), true);
}

inline Status check(const ProjectReadoutBackwardArgs& args) {
  const ProjectReadoutArgs& readout = args.readout;
  if (readout.x_tangent.data) return Status::no_tangents;
  const Gates gates = gates_of(readout, readout.channels, readout.heads);
  if (const Status s = check_projected(readout, gates, false); s != Status::ok) return s;
  if (readout.batch * readout.queries > 0 && !(args.grad_y.data && args.grad_x)) return Status::null_pointer;
  const bool total = readout.batch * readout.groups == 0 || args.grad_total;
  return total && args.grad_gate_weight && args.grad_out_weight ? Status::ok : Status::null_pointer;
}

}  // namespace pom
