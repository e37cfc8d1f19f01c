// Registers the operators as `torch.ops.skipkv_cuda.*`; `skipkv_vllm/ops/native.py` loads them. Their list and their
// schemas are in `operators.h`, which csrc/generate.py writes.
#include <torch/csrc/stable/library.h>

#include "gpu.h"
#include "operators.h"

#define SKIPKV_DEFINE(name, schema) m.def(#name schema);
#define SKIPKV_IMPLEMENT(name, schema) m.impl(#name, TORCH_BOX(&skipkv::name));

#define SKIPKV_TEXT(images) #images
#define SKIPKV_EXPANDED_TEXT(images) SKIPKV_TEXT(images)
#ifndef SKIPKV_IMAGES
#define SKIPKV_IMAGES
#endif

// The images that nvcc was asked for, joined by "+"; setup.py passes them, and `skipkv_vllm/ops/images.py` reads them.
extern "C" {
extern __attribute__((visibility("default"))) const char skipkv_images[];
const char skipkv_images[] = SKIPKV_EXPANDED_TEXT(SKIPKV_IMAGES);
}

STABLE_TORCH_LIBRARY(skipkv_cuda, m) { SKIPKV_OPERATORS(SKIPKV_DEFINE) }

STABLE_TORCH_LIBRARY_IMPL(skipkv_cuda, SKIPKV_DISPATCH_KEY, m) { SKIPKV_OPERATORS(SKIPKV_IMPLEMENT) }
