// In place of torch's header of this name: csrc/backend_cuda.cpp on the host execution.
#pragma once

#include <c10/util/Exception.h>

#define C10_CUDA_CHECK(call) TORCH_CHECK((call) == 0, "a launch failed")
