// The same loop on a GPU.

#include "cuda.cuh"
#include "draw.h"

namespace example {

void draw_on_gpu(const Options& options) { draw<Cuda>(options); }

}  // namespace example
