// Tensor maps for the copies of tiles, and the driver's message if it refuses one.

#include "cuda/hopper.cuh"

#include <atomic>

namespace pom::cuda {
namespace {

// Looks a function of the driver up at its first use, since the library is not linked to a driver. A failed lookup is
// repeated.
template <class Function>
Status find(const char* name, [[maybe_unused]] unsigned version, std::atomic<Function>& found) {
  if (found.load(std::memory_order_relaxed)) return Status::ok;
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t code = cudaGetDriverEntryPointByVersion(name, &entry, version, cudaEnableDefault, &result);
#else
  const cudaError_t code = cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &result);
#endif
  if (const Status s = checked(code); s != Status::ok) return s;
  if (result != cudaDriverEntryPointSuccess || !entry)
    return refused("the driver describes no tensors (cuTensorMapEncodeTiled): one for CUDA 12 or later is needed");
  found.store(reinterpret_cast<Function>(entry), std::memory_order_relaxed);
  return Status::ok;
}

std::atomic<decltype(&cuTensorMapEncodeTiled)> encode_tiled;
std::atomic<decltype(&cuGetErrorString)> error_string;

// The driver's message, a static string.
Status refusal(CUresult code) {
  const char* words = nullptr;
  const bool known = find("cuGetErrorString", 6000, error_string) == Status::ok &&
                     error_string.load()(code, &words) == CUDA_SUCCESS && words;
  return refused(known ? words : "the driver refuses to describe a tensor");
}

}  // namespace

Status make_tile_map(const Tensor16& tensor, int rows, TileMap& map) {
  if (const Status s = find("cuTensorMapEncodeTiled", 12000, encode_tiled); s != Status::ok) return s;
  const cuuint64_t sizes[] = {cuuint64_t(tensor.elements), cuuint64_t(tensor.rows), cuuint64_t(tensor.samples)};
  const cuuint64_t bytes[] = {cuuint64_t(tensor.row_stride) * 2, cuuint64_t(tensor.sample_stride) * 2};
  const cuuint32_t box[] = {kDepth, cuuint32_t(rows), 1}, every[] = {1, 1, 1};
  const CUresult made =
      encode_tiled.load()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(tensor.data), sizes, bytes, box,
                          every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? Status::ok : refusal(made);
}

}  // namespace pom::cuda
