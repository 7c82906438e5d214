// What every operation checks before it touches an output, on any device.
#pragma once

#include "pom/math.h"
#include "pom/pom.h"

namespace pom {

constexpr int64_t kMaxHeads = 1024;  // of one gate

inline Status check(const Features& f) {
  if (f.degree < 1 || f.degree > kMaxDegree) return Status::bad_degree;
  if (f.batch < 0 || f.tokens < 0 || f.width < 1) return Status::bad_size;
  if (f.rotary.axes) {
    if (f.form != Form::power) return Status::rotary_needs_power;
    if (f.rotary.axes < 0 || f.rotary.half < 1 || 2 * f.rotary.half * f.rotary.axes > f.width) return Status::bad_size;
    if (!f.rotary.cos || !f.rotary.sin) return Status::null_pointer;
  }
  if (f.batch * f.tokens > 0 && !f.u) return Status::null_pointer;
  if (f.form == Form::power && (!f.coeff || (f.u_tangent && !f.coeff_tangent))) return Status::null_pointer;
  return Status::ok;
}

inline Status check(const Groups& groups, const Features& f) {
  if (groups.count < 0 || (groups.count > 1 && !groups.offsets && !groups.mask)) return Status::bad_size;
  if (groups.mask && (groups.offsets || groups.cumulative || f.weight)) return Status::bad_size;
  if (groups.count == 0 && f.tokens && !groups.mask) return Status::bad_size;  // tokens of no group
  return Status::ok;
}

inline Status check(const Gates& g) {
  if (g.batch < 0 || g.tokens < 0 || g.channels < 1 || g.heads < 1 || g.channels % g.heads) return Status::bad_size;
  if (g.heads > kMaxHeads) return Status::bad_size;
  if (g.rotary.axes) {
    if (g.form != Form::power) return Status::rotary_needs_power;
    const bool fits = 2 * g.rotary.half * g.rotary.axes <= g.width();
    if (g.rotary.axes < 0 || g.rotary.half < 1 || !fits) return Status::bad_size;
    if (!g.rotary.cos || !g.rotary.sin) return Status::null_pointer;
  }
  return g.batch * g.tokens > 0 && !g.gate ? Status::null_pointer : Status::ok;
}

// All of a state, or nothing.
inline Status check_prior(const StateView& prior) {
  const int given = !!prior.total + !!prior.residual + !!prior.count;
  return given == 0 || given == 3 ? Status::ok : Status::null_pointer;
}

inline Status check(const StateArgs& args) {
  if (const Status s = check(args.features); s != Status::ok) return s;
  if (const Status s = check(args.groups, args.features); s != Status::ok) return s;
  if (const Status s = check_prior(args.prior); s != Status::ok) return s;
  const bool empty = args.features.batch * args.groups.count == 0;
  return !empty && !(args.out.total && args.out.residual && args.out.count) ? Status::null_pointer : Status::ok;
}

inline Status check(const StateBackwardArgs& args) {
  if (const Status s = check(args.features); s != Status::ok) return s;
  if (const Status s = check(args.groups, args.features); s != Status::ok) return s;
  const Features& f = args.features;
  if (f.form == Form::power && !args.grad_coeff) return Status::null_pointer;
  if (f.batch * f.tokens > 0 && (!args.grad_u || (args.groups.count && !args.grad_total))) return Status::null_pointer;
  return Status::ok;
}

// Groups of queries: dealt by offsets, or evenly.
inline Status check_readout(const Gates& gates, int64_t groups, const int64_t* offsets, const StateView& state) {
  if (const Status s = check(gates); s != Status::ok) return s;
  if (groups < 0 || (!offsets && (groups ? gates.tokens % groups : gates.tokens))) return Status::bad_size;
  const bool empty = gates.batch * groups == 0;
  return !empty && !(state.total && state.residual && state.count) ? Status::null_pointer : Status::ok;
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

// Gates and features of a causal mix are of the same tokens.
inline Status check_causal(const Features& f, const Gates& g, const StateView& prior) {
  if (const Status s = check(f); s != Status::ok) return s;
  if (const Status s = check(g); s != Status::ok) return s;
  if (f.batch != g.batch || f.tokens != g.tokens || f.channels() != g.channels) return Status::bad_size;
  if (f.rotary.axes != g.rotary.axes || (g.heads == 1 && f.rotary.half != g.rotary.half)) return Status::bad_size;
  if (f.dtype != g.dtype) return Status::bad_dtype;
  if (f.u_tangent && g.tangent) return Status::no_tangents;
  return check_prior(prior);
}

inline Status check(const CausalArgs& args) {
  if (const Status s = check_causal(args.features, args.gates, args.prior); s != Status::ok) return s;
  const bool batch = args.features.batch > 0, tokens = batch && args.features.tokens > 0;
  if (tokens && !args.y) return Status::null_pointer;
  return batch && !(args.out.total && args.out.residual && args.out.count) ? Status::null_pointer : Status::ok;
}

inline Status check(const CausalBackwardArgs& args) {
  if (const Status s = check_causal(args.features, args.gates, args.prior); s != Status::ok) return s;
  if (args.features.form == Form::power && !args.grad_coeff) return Status::null_pointer;
  const bool batch = args.features.batch > 0, tokens = batch && args.features.tokens > 0;
  if (tokens && !(args.grad_y && args.grad_u && args.grad_gate)) return Status::null_pointer;
  return batch && !args.grad_prior ? Status::null_pointer : Status::ok;
}

// The context and the queries of a whole-context mix.
inline Status check_mix(const Features& f, const Gates& g) {
  if (const Status s = check(f); s != Status::ok) return s;
  if (const Status s = check(g); s != Status::ok) return s;
  if (f.batch != g.batch || f.channels() != g.channels || f.form != g.form) return Status::bad_size;
  if (f.u_tangent || g.tangent) return Status::no_tangents;
  return f.dtype == g.dtype ? Status::ok : Status::bad_dtype;
}

inline Status check(const MixArgs& args) {
  if (const Status s = check_mix(args.features, args.gates); s != Status::ok) return s;
  if (const Status s = check_prior(args.prior); s != Status::ok) return s;
  if (args.features.batch * args.gates.tokens > 0 && !args.y) return Status::null_pointer;
  return args.features.batch > 0 && !(args.out.total && args.out.residual && args.out.count) ? Status::null_pointer
                                                                                             : Status::ok;
}

inline Status check(const UpdateArgs& args) {
  if (const Status s = check_mix(args.features, args.gates); s != Status::ok) return s;
  if (args.features.batch * args.gates.tokens > 0 && !args.y) return Status::null_pointer;
  return args.features.batch > 0 && !(args.state.total && args.state.residual && args.state.count)
             ? Status::null_pointer
             : Status::ok;
}

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
