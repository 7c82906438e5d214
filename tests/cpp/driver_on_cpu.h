// What csrc/cuda/hopper.cu uses of CUDA's driver, on a CPU: functions looked up by name, and tensor maps, which it
// refuses as a driver does.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_on_cpu.h"

#define CUDART_VERSION 13000

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_NOT_SUPPORTED = 801 };
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_UINT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

// A map of 16-bit elements; tiles have rows of 128 bytes with swizzled chunks.
struct CUtensorMap {
  const uint16_t* data = nullptr;
  int64_t elements = 0, rows = 0, samples = 0, row_stride = 0, sample_stride = 0;
  int tile_rows = 0;
};

namespace cuda_on_cpu {
// Set by tests: the answer to every tensor map, and whether the driver lacks its functions.
inline thread_local CUresult map_refusal = CUDA_SUCCESS;
inline thread_local bool has_entry_points = true;
}  // namespace cuda_on_cpu

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* every, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (cuda_on_cpu::map_refusal != CUDA_SUCCESS) return cuda_on_cpu::map_refusal;
  bool taken = reinterpret_cast<uintptr_t>(data) % 16 == 0 && data;
  for (int i = 0; i < 3; ++i)
    taken = taken && sizes[i] > 0 && sizes[i] <= uint64_t(1) << 32 && box[i] > 0 && box[i] <= 256;
  for (int i = 0; i < 2; ++i) taken = taken && strides[i] > 0 && strides[i] % 16 == 0 && strides[i] < uint64_t(1) << 40;
  if (!taken) return CUDA_ERROR_INVALID_VALUE;
  const bool known = type == CU_TENSOR_MAP_DATA_TYPE_UINT16 && rank == 3 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
                     box[0] == 64 && box[2] == 1 && every[0] == 1 && every[1] == 1 && every[2] == 1;
  if (!known) return CUDA_ERROR_NOT_SUPPORTED;  // by this stand-in
  *map = {static_cast<const uint16_t*>(data),
          int64_t(sizes[0]),
          int64_t(sizes[1]),
          int64_t(sizes[2]),
          int64_t(strides[0] / 2),
          int64_t(strides[1] / 2),
          int(box[1])};
  return CUDA_SUCCESS;
}

inline CUresult cuGetErrorString(CUresult error, const char** words) {
  if (error != CUDA_ERROR_INVALID_VALUE && error != CUDA_ERROR_NOT_SUPPORTED) return CUDA_ERROR_INVALID_VALUE;
  *words = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "operation not supported";
  return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
constexpr unsigned long long cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  *function = nullptr;
  if (!std::strcmp(name, "cuTensorMapEncodeTiled")) *function = reinterpret_cast<void*>(cuTensorMapEncodeTiled);
  if (!std::strcmp(name, "cuGetErrorString")) *function = reinterpret_cast<void*>(cuGetErrorString);
  if (!cuda_on_cpu::has_entry_points) *function = nullptr;
  *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
