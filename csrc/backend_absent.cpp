// What a build without CUDA has for it: a sentence, where there would be a missing dispatch key.
#include "backend.h"

#ifndef MAC_ATTN_WITH_CUDA
#include <c10/util/Exception.h>

namespace mac_attn::cuda_backend {

namespace {
[[noreturn]] void not_built() {
  TORCH_CHECK(false, "the tensors are on CUDA, but mac_attn was built without it; see `python -m mac_attn.info`");
}
}  // namespace

void match(const MatchParams&, const Persistent&, const at::Tensor&) {
  not_built();
}
void amend(const AmendParams&, const Persistent&, const at::Tensor&) {
  not_built();
}
void complete(const CompleteParams&, const Persistent&, const at::Tensor&) {
  not_built();
}
void unrotate(const UnrotateParams&, const at::Tensor&) {
  not_built();
}

}  // namespace mac_attn::cuda_backend
#endif
