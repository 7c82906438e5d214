// Descriptions of tensors for the copies of tiles, and whether the GPU has these.

#include "cuda/hopper.cuh"

namespace pom::cuda {
#ifdef __CUDACC__
namespace {

// The driver's function, found when it is first needed: the library itself is linked to no driver.
auto encode_tiled() {
  using Function = decltype(&cuTensorMapEncodeTiled);
  static const Function function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t code =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t code = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return code == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(found) : nullptr;
  }();
  return function;
}

}  // namespace

Status make_tile_map(const Tensor16& tensor, int rows, TileMap& map) {
  const auto encode = encode_tiled();
  if (!encode) return Status::no_device_code;
  const cuuint64_t sizes[] = {cuuint64_t(tensor.elements), cuuint64_t(tensor.rows), cuuint64_t(tensor.samples)};
  const cuuint64_t bytes[] = {cuuint64_t(tensor.row_stride) * 2, cuuint64_t(tensor.sample_stride) * 2};
  const cuuint32_t box[] = {kDepth, cuuint32_t(rows), 1}, every[] = {1, 1, 1};
  const CUresult made = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(tensor.data), sizes, bytes, box,
                               every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? Status::ok : Status::bad_size;
}
#else
Status make_tile_map(const Tensor16& tensor, int rows, TileMap& map) { return describe_tensor(tensor, rows, map); }
#endif

}  // namespace pom::cuda
