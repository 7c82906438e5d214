// Reads safetensors files: a JSON header with the names, shapes and places of tensors, followed by their numbers.
//
// Strict: refuses anything else, or data beyond the end of the file, with std::runtime_error.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>

#include "files.h"

namespace example {

class Safetensors {
 public:
  explicit Safetensors(const std::string& path) : path_(path), bytes_(read_file(path)) {
    uint64_t header = 0;  // length of the header in bytes, little-endian
    if (bytes_.size() < 8) fail("is not a safetensors file");
    for (int i = 7; i >= 0; --i) header = header << 8 | uint8_t(bytes_[size_t(i)]);
    if (header > bytes_.size() - 8) fail("is truncated, or not a safetensors file");
    at_ = bytes_.data() + 8;
    end_ = numbers_ = at_ + header;
    read_header();
  }

  // One entry of the metadata; all entries are strings.
  const std::string& metadata(const std::string& name) const {
    const auto found = metadata_.find(name);
    if (found == metadata_.end()) fail("lacks '" + name + "' in its metadata; write it with: pom-ext export");
    return found->second;
  }

  // The numbers of a float32 tensor of this shape.
  std::vector<float> floats(const std::string& name, const std::vector<int64_t>& shape) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) fail("lacks the tensor '" + name + "'");
    const Tensor& tensor = found->second;
    if (tensor.dtype != "F32" || tensor.shape != shape)
      fail("has '" + name + "' as " + tensor.dtype + text(tensor.shape) + ", expected F32" + text(shape));
    std::vector<float> numbers((tensor.end - tensor.begin) / sizeof(float));
    std::memcpy(numbers.data(), numbers_ + tensor.begin, tensor.end - tensor.begin);
    return numbers;
  }

  [[noreturn]] void fail(const std::string& what) const { throw std::runtime_error(path_ + " " + what); }

 private:
  struct Tensor {
    std::string dtype;
    std::vector<int64_t> shape;
    uint64_t begin = 0, end = 0;
  };

  void read_header() {
    read_object([&](const std::string& name) {
      if (name == "__metadata__") return read_object([&](const std::string& key) { metadata_[key] = read_string(); });
      Tensor tensor;
      std::vector<int64_t> place;
      read_object([&](const std::string& key) {
        if (key == "dtype") return void(tensor.dtype = read_string());
        if (key == "shape") return void(tensor.shape = read_integers());
        if (key == "data_offsets") return void(place = read_integers());
        fail("has an unknown entry '" + key + "' in its header");
      });
      if (place.size() != 2 || place[0] > place[1] || place[1] > bytes_.data() + bytes_.size() - numbers_)
        fail("is truncated: the tensor '" + name + "' lies outside of it");
      tensor.begin = uint64_t(place[0]), tensor.end = uint64_t(place[1]);
      if (tensor.dtype == "F32" && double(place[1] - place[0]) != bytes_of(tensor.shape))
        fail("is damaged: the tensor '" + name + "' has another shape than place");
      if (!tensors_.emplace(name, tensor).second) fail("has the tensor '" + name + "' twice");
    });
    skip_spaces();
    if (at_ != end_) fail("has more in its header than one JSON object");
  }

  template <class Entry>
  void read_object(Entry entry) {
    expect('{');
    if (take('}')) return;
    do {
      const std::string key = read_string();
      expect(':');
      entry(key);
    } while (take(','));
    expect('}');
  }

  std::vector<int64_t> read_integers() {
    std::vector<int64_t> all;
    expect('[');
    if (take(']')) return all;
    do {
      skip_spaces();
      int64_t number = 0;
      int digits = 0;
      for (; at_ != end_ && *at_ >= '0' && *at_ <= '9' && digits < 18; ++at_, ++digits)
        number = 10 * number + (*at_ - '0');
      if (!digits) fail("has no integer where its header needs one");
      all.push_back(number);
    } while (take(','));
    expect(']');
    return all;
  }

  std::string read_string() {
    std::string made;
    expect('"');
    while (at_ != end_ && *at_ != '"') {
      if (*at_ != '\\') {
        made += *at_++;
        continue;
      }
      static const char kEscapes[] = "\"\\/bfnrt", kMeant[] = "\"\\/\b\f\n\r\t";
      const char* const escape = ++at_ == end_ ? nullptr : std::strchr(kEscapes, *at_);
      if (!escape || !*escape) fail("has an escape in its header that this program does not know");
      made += kMeant[escape - kEscapes];
      ++at_;
    }
    if (at_ == end_) fail("has a header that ends too early");
    ++at_;
    return made;
  }

  void skip_spaces() {
    while (at_ != end_ && std::strchr(" \n\r\t", *at_) && *at_) ++at_;
  }
  bool take(char wanted) {
    skip_spaces();
    if (at_ == end_ || *at_ != wanted) return false;
    ++at_;
    return true;
  }
  void expect(char wanted) {
    if (!take(wanted)) fail(std::string("has no '") + wanted + "' where its header needs one; is it safetensors?");
  }

  static double bytes_of(const std::vector<int64_t>& shape) {  // a double overflows without harm
    double bytes = sizeof(float);
    for (const int64_t length : shape) bytes *= double(length);
    return bytes;
  }
  static std::string text(const std::vector<int64_t>& shape) {
    std::string made;
    for (const int64_t length : shape) made += (made.empty() ? "" : ", ") + std::to_string(length);
    return " (" + made + ")";
  }

  std::string path_;
  std::vector<char> bytes_;
  const char *at_, *end_, *numbers_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace example
