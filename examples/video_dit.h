// The model: blocks of local convolution, polynomial mixer and feed-forward layer, modulated by time and label.
//
// A layer's memory of earlier frames lies in the engine's stream: the state of its mixer, and beside it the earlier
// frames that its convolution sees.
#pragma once

#include "conditions.h"

namespace example {

// What an evaluation does to the stream.
enum class Memory { stays, goes_on };

template <class Device>
class VideoDit {
 public:
  VideoDit(Device& device, const Safetensors& file, const Config& config, int64_t batch)
      : device_(device),
        config_(config),
        batch_(batch),
        patch_in_(device, file, "patch_in", config.dim, config.values()),
        patch_out_(device, file, "patch_out", config.values(), config.dim),
        positions_(uploaded(device, file, "positions", {config.tokens(), config.dim})) {
    const int64_t rows = batch * config.tokens();
    for (float** const tokens : {&x_, &spare_, &normed_, &branch_}) *tokens = device.floats(rows * config.dim);
    for (size_t i = 0; i < config.layers.size(); ++i)
      layers_.emplace_back(device, file, config, "layers." + std::to_string(i), config.layers[i],
                           config.conv_frames[i]);
    hidden_ = device.floats(rows * config.ffw);
    for (Layer& layer : layers_) layer.step.x = normed_, layer.step.y = branch_;
  }

  // Call before the first evaluation on a stream: takes the engine's workspace.
  void prepare(const pom_stream& stream) {
    for (size_t i = 0; i < layers_.size(); ++i)
      workspace_bytes_ = std::max(workspace_bytes_, pom_stream_step_workspace(&stream, int64_t(i), &layers_[i].step));
    workspace_ = device_.floats(int64_t(workspace_bytes_ / sizeof(float) + 1));
  }

  // The prediction (batch, tokens, values) for a frame x (tokens, values) that follows the stream, with one `condition`
  // per batch entry. If `prediction` is null, the frame is only remembered, and what comes after the last mixer is
  // skipped.
  void evaluate(pom_stream& stream, int64_t evaluation, Memory memory, const float* x, const Modulation& condition,
                float* prediction) {
    const int64_t dim = config_.dim, tokens = config_.tokens(), rows = batch_ * tokens;
    float *now = x_, *spare = spare_;
    Modulation modulation = condition;
    patch_in_.apply(device_, tokens, x, spare);
    device_.rows(rows, Embed{dim, tokens, spare, positions_, now});
    for (size_t i = 0; i < layers_.size(); ++i, modulation.values += kParts * dim) {
      const Layer& layer = layers_[i];
      if (config_.conv_frames[i]) {
        const int64_t earlier = config_.conv_frames[i] - 1;
        pom_state state;
        check(pom_stream_state(&stream, evaluation, int64_t(i), &state));
        float* const cache = static_cast<float*>(state.kept);
        device_.rows(rows, Convolve{dim, config_.rows(), config_.columns(), earlier, now, cache, layer.conv_weight,
                                    layer.conv_bias, spare});
        if (memory == Memory::goes_on) device_.rows(rows, UpdateCache{dim, tokens, earlier, now, cache});
        std::swap(now, spare);
      }
      device_.rows(rows, Normalise{dim, part(modulation, kMixerScale), now, normed_});
      check(pom_stream_step(&stream, evaluation, int64_t(i), &layer.step, memory == Memory::goes_on, workspace_,
                            workspace_bytes_));
      if (!prediction && i + 1 == layers_.size()) return;
      device_.rows(rows, AddGated{dim, part(modulation, kMixerGate), branch_, now});
      device_.rows(rows, Normalise{dim, part(modulation, kFfwScale), now, normed_});
      layer.ffw_in.apply(device_, rows, normed_, hidden_);
      device_.rows(rows, Gelu{config_.ffw, hidden_});
      layer.ffw_out.apply(device_, rows, hidden_, branch_);
      device_.rows(rows, AddGated{dim, part(modulation, kFfwGate), branch_, now});
    }
    device_.rows(rows, Normalise{dim, modulation, now, normed_});
    patch_out_.apply(device_, rows, normed_, prediction);
  }

 private:
  struct Layer {
    const float *conv_weight = nullptr, *conv_bias = nullptr;
    Linear<Device> mixer_in, mixer_out, ffw_in, ffw_out;
    pom_step step = {};

    Layer(Device& device, const Safetensors& file, const Config& config, const std::string& name,
          const pom_layer& shape, int64_t conv_frames)
        : mixer_in(device, file, name + ".mixer_in", channels_of(shape) + gates_of(shape), config.dim),
          mixer_out(device, file, name + ".mixer_out", config.dim, channels_of(shape)),
          ffw_in(device, file, name + ".ffw_in", config.ffw, config.dim),
          ffw_out(device, file, name + ".ffw_out", config.dim, config.ffw) {
      if (conv_frames) {
        conv_weight = uploaded(device, file, name + ".conv.weight", {9 * conv_frames, config.dim});
        conv_bias = uploaded(device, file, name + ".conv.bias", {config.dim});
      }
      step.tokens = config.tokens(), step.dim = config.dim;
      step.in_weight = mixer_in.weight, step.in_bias = mixer_in.bias;
      step.out_weight = mixer_out.weight, step.out_bias = mixer_out.bias;
      if (shape.form == POM_POWER) step.coeff = uploaded(device, file, name + ".coeff", {shape.width, shape.degree});
      step.linear = Device::linear, step.linear_context = &device;
    }
  };

  // The modulation of a block, `dim` numbers each; a shift follows its scale.
  enum Part { kMixerScale, kMixerShift, kMixerGate, kFfwScale, kFfwShift, kFfwGate, kParts };

  Modulation part(Modulation modulation, Part part) const {
    modulation.values += part * config_.dim;
    return modulation;
  }

  Device& device_;
  const Config& config_;
  int64_t batch_;
  Linear<Device> patch_in_, patch_out_;
  const float* positions_;
  std::vector<Layer> layers_;
  float *x_, *spare_, *normed_, *branch_, *hidden_, *workspace_ = nullptr;
  size_t workspace_bytes_ = 0;
};

}  // namespace example
