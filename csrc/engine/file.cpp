// A stream as the bytes of a file: header, layers, states, checksum.

#include <cstring>

#include "engine/device.h"
#include "engine/layout.h"

namespace pom::engine {
namespace {

constexpr char kMagic[8] = {'P', 'O', 'M', 'S', 'T', 'A', 'T', 'E'};
constexpr uint32_t kVersion = 1;

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t layer_bytes;  // of one LayerRecord
  int64_t layer_count, batch, evaluations;
  uint64_t states_bytes;
};
struct LayerRecord {
  int32_t form, degree, acc_bytes, reserved;
  int64_t width;
  uint64_t kept;
};

// CRC-32 of IEEE 802.3, which finds every change of a single bit.
struct Table {
  uint32_t entries[256];
  constexpr Table() : entries() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t rest = i;
      for (int bit = 0; bit < 8; ++bit) rest = rest & 1 ? 0xedb88320u ^ (rest >> 1) : rest >> 1;
      entries[i] = rest;
    }
  }
};
constexpr Table kTable;

uint32_t checksum(const char* data, size_t bytes) {
  uint32_t rest = ~0u;
  for (size_t i = 0; i < bytes; ++i) rest = kTable.entries[(rest ^ uint8_t(data[i])) & 0xff] ^ (rest >> 8);
  return ~rest;
}

// Calls body(offset, record, bytes) for the header and the record of each layer, as they lie in the file.
template <class Body>
void each_record(const pom_shape& shape, Body body) {
  Header header = {{},          kVersion,          sizeof(LayerRecord), shape.layer_count,
                   shape.batch, shape.evaluations, states_bytes(shape)};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  body(0, &header, sizeof header);
  for (int64_t i = 0; i < shape.layer_count; ++i) {
    const pom_layer& l = shape.layers[i];
    const LayerRecord record = {l.form, l.degree, int32_t(size_of_acc(dtype(l))), 0, l.width, l.kept};
    body(sizeof header + size_t(i) * sizeof record, &record, sizeof record);
  }
}

size_t bytes_before_states(const pom_shape& shape) {
  return sizeof(Header) + size_t(shape.layer_count) * sizeof(LayerRecord);
}

// Whether these are all the bytes of a file of this version, as they were written. The checksum stands at the end.
Status check_file(const char* file, size_t bytes) {
  Header header;
  if (bytes < sizeof header + sizeof(uint32_t)) return Status::bad_file;
  std::memcpy(&header, file, sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) return Status::bad_file;
  if (header.version > kVersion) return Status::later_version;
  uint32_t sum;
  std::memcpy(&sum, file + bytes - sizeof sum, sizeof sum);
  return checksum(file, bytes - sizeof sum) == sum ? Status::ok : Status::bad_file;
}

bool same_shape(const char* file, size_t bytes, const pom_stream& stream) {
  bool same = bytes == pom_stream_saved_bytes(&stream);
  each_record(stream.shape, [&](size_t at, const void* record, size_t size) {
    same = same && std::memcmp(file + at, record, size) == 0;
  });
  return same;
}

}  // namespace
}  // namespace pom::engine

using namespace pom;
using namespace pom::engine;

size_t pom_stream_saved_bytes(const pom_stream* stream) {
  if (check(stream) != Status::ok) return 0;
  return bytes_before_states(stream->shape) + states_bytes(stream->shape) + sizeof(uint32_t);
}

pom_status pom_stream_save(const pom_stream* stream, void* file, size_t bytes) {
  if (const Status s = check(stream); s != Status::ok) return int(s);
  if (!file) return POM_NULL_POINTER;
  if (bytes < pom_stream_saved_bytes(stream)) return POM_MEMORY_TOO_SMALL;
  const pom_shape& shape = stream->shape;
  char *const out = static_cast<char*>(file), *const states = out + bytes_before_states(shape);
  if (const Status s = copy(stream->place, states, memory_of(*stream), states_bytes(shape)); s != Status::ok)
    return int(s);
  if (const Status s = wait(stream->place); s != Status::ok) return int(s);
  each_record(shape, [&](size_t at, const void* record, size_t size) { std::memcpy(out + at, record, size); });
  const size_t covered = pom_stream_saved_bytes(stream) - sizeof(uint32_t);
  const uint32_t sum = checksum(out, covered);
  std::memcpy(out + covered, &sum, sizeof sum);
  return POM_OK;
}

pom_status pom_stream_load(pom_stream* stream, const void* file, size_t bytes) {
  if (const Status s = check(stream); s != Status::ok) return int(s);
  if (!file) return POM_NULL_POINTER;
  const char* const in = static_cast<const char*>(file);
  if (const Status s = check_file(in, bytes); s != Status::ok) return int(s);
  if (!same_shape(in, bytes, *stream)) return POM_OTHER_SHAPE;
  const char* const states = in + bytes_before_states(stream->shape);
  if (const Status s = copy(stream->place, memory_of(*stream), states, states_bytes(stream->shape)); s != Status::ok)
    return int(s);
  return int(wait(stream->place));  // the caller may free the file now
}
