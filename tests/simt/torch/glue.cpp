// mac_attn's ops on CPU tensors, but computed by the CUDA kernels on the host execution: csrc/ops.cpp and
// csrc/backend_cuda.cpp as they are, with this in place of the CPU backend and of the launches.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstdlib>

#include "../../../csrc/backend.h"
#include "../../../csrc/cpu/kernels.h"
#include "../launch_kernels.h"

namespace mac_attn {

namespace cuda {

namespace {

// Another schedule of the blocks and threads for every launch.
simt::Run next_run() {
  static uint64_t seed = 0;
  return {simt::Engine::kFibers, ++seed};
}

}  // namespace

cudaError_t match_splits(const MatchParams& p, MatchWorkspace& w) {
  static int calls = 0;
  w.splits = 2, w.cluster = p.shape.tokens == 1 && ++calls % 2 ? 2 : 1;
  return 0;
}
cudaError_t amend_ctas(const AmendParams&, int32_t* ctas) {
  *ctas = 3;
  return std::getenv("MAC_SIMT_NO_CODE") ? cudaErrorNoKernelImageForDevice : 0;
}
cudaError_t launch_unrotate(const UnrotateParams& p, cudaStream_t) {
  simt::launch_unrotate_bf16(p, next_run());
  return 0;
}
cudaError_t launch_match(const MatchParams& p, const MatchWorkspace& w, cudaStream_t) {
  simt::launch_match_bf16(p, w, next_run());
  return 0;
}
cudaError_t launch_amend(const AmendParams& p, const AmendWorkspace& w, int32_t ctas, cudaStream_t) {
  (p.kv.float8 ? simt::launch_amend_bf16_fp8 : simt::launch_amend_bf16)(p, w, ctas, next_run());
  return 0;
}
cudaError_t launch_complete(const CompleteParams& p, const CompleteWorkspace& w, cudaStream_t) {
  simt::launch_complete_bf16(p, w, next_run());
  return 0;
}

}  // namespace cuda

namespace cpu_backend {

namespace {

// A cache on the CPU has no workspace, so all caches of a process share this one, as layers could on a GPU.
Persistent persistent(bool reuse) {
  if (!reuse) return {};
  static const at::Tensor workspace = at::zeros({1 << 16}, at::kInt), flag = at::zeros({1}, at::kInt);
  TORCH_CHECK_VALUE(*flag.const_data_ptr<int32_t>() == 0, "the kernels have set the error flag");
  return {workspace, flag};
}

const at::Tensor& on_host() {
  static const at::Tensor tensor = at::empty({0}, at::kInt);
  return tensor;
}

}  // namespace

void match(const MatchParams& p) {
  cuda_backend::match(p, persistent(true), on_host());
}
void amend(const AmendParams& p) {
  cuda_backend::amend(p, persistent(p.matched.source), on_host());
}
bool hands_on_candidates() {
  return true;
}
void complete(const CompleteParams& p) {
  cuda_backend::complete(p, persistent(p.matched.source), on_host());
}
void unrotate(const UnrotateParams& p) {
  cuda_backend::unrotate(p, on_host());
}

}  // namespace cpu_backend

namespace cpu {
const Kernels& best_kernels() {
  static const Kernels none{"CUDA kernels on the host execution", 0, nullptr, nullptr, nullptr};
  return none;
}
}  // namespace cpu

}  // namespace mac_attn
