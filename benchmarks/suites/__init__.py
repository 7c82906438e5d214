"""The table of suites. A suite is a module of this folder with the same name, "_" for "-", and a function `main`."""

SUITES = {
    "core": "ops, layers and memory in one run",
    "ops": "the operations, beside the formula in plain torch, a copy, and the authors' kernels",
    "layers": "the layer PoM, forward and with gradients, beside attention and its own matrix products",
    "memory": "peak memory of operations and layers on the CPU",
    "models": "layers and whole image models beside attention, from 256 to 65,536 tokens: where each form wins",
    "compiled": "layers and image models under torch.compile, beside eager mode",
    "forward-mode": "the derivative in a direction (jvp) of layers and image models, beside their forward",
    "one-step": "images drawn in one step: a model trained by MeanFlow beside one trained by flow matching",
    "streaming": "time and memory of one more frame of video, with PoM and with attention",
    "video-lasts": "digits streamed for 192 frames: read, motion and distance from real ones, early and late",
    "engine": "latency of one more frame of a layer: the C++ engine, the engine from Python, and torch",
    "launches": "launches and bytes of the CUDA kernels, counted on the CPU; needs no GPU",
    "resources": "registers, spills and occupancy of the CUDA kernels, read from the build; needs no GPU",
}
DEFAULT = "core"
