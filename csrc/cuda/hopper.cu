// Tensor maps for the copies of tiles, and the driver's message if it refuses one.

#include "cuda/hopper.cuh"

#include <atomic>

namespace pom::cuda {
namespace {

// A function of the driver, looked up at first use, since the library is not linked to a driver. A failed lookup is
// repeated.
template <class Function>
class DriverFunction {
 public:
  constexpr DriverFunction(const char* name, unsigned version) : name_(name), version_(version) {}

  Status find(Function& function) {
    function = found_.load(std::memory_order_relaxed);
    if (function) return Status::ok;
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t code = cudaGetDriverEntryPointByVersion(name_, &entry, version_, cudaEnableDefault, &result);
#else
    const cudaError_t code = cudaGetDriverEntryPoint(name_, &entry, cudaEnableDefault, &result);
#endif
    if (const Status s = checked(code); s != Status::ok) return s;
    if (result != cudaDriverEntryPointSuccess || !entry)
      return refused("the driver describes no tensors (cuTensorMapEncodeTiled): one for CUDA 12 or later is needed");
    function = reinterpret_cast<Function>(entry);
    found_.store(function, std::memory_order_relaxed);
    return Status::ok;
  }

 private:
  const char* const name_;
  const unsigned version_;
  std::atomic<Function> found_{nullptr};
};

DriverFunction<decltype(&cuTensorMapEncodeTiled)> encode_tiled("cuTensorMapEncodeTiled", 12000);
DriverFunction<decltype(&cuGetErrorString)> error_string("cuGetErrorString", 6000);

// The driver's message, a static string.
Status refusal(CUresult code) {
  decltype(&cuGetErrorString) say;
  const char* words = nullptr;
  if (error_string.find(say) != Status::ok || say(code, &words) != CUDA_SUCCESS || !words)
    words = "the driver refuses to describe a tensor";
  return refused(words);
}

}  // namespace

Status make_tile_map(const Tensor16& tensor, int rows, TileMap& map) {
  decltype(&cuTensorMapEncodeTiled) encode;
  if (const Status s = encode_tiled.find(encode); s != Status::ok) return s;
  const cuuint64_t sizes[] = {cuuint64_t(tensor.elements), cuuint64_t(tensor.rows), cuuint64_t(tensor.samples)};
  const cuuint64_t bytes[] = {cuuint64_t(tensor.row_stride) * 2, cuuint64_t(tensor.sample_stride) * 2};
  const cuuint32_t box[] = {kDepth, cuuint32_t(rows), 1}, every[] = {1, 1, 1};
  const CUresult made = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(tensor.data), sizes, bytes,
                               box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? Status::ok : refusal(made);
}

}  // namespace pom::cuda
