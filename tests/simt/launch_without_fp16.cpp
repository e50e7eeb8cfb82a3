// In place of launch_fp16.cpp and launch_fp16_fp8.cpp in builds with sanitizers (CMakeLists.txt).
#include <stdexcept>

#include "launch_kernels.h"

namespace mac_attn::simt {
namespace {

[[noreturn]] void refuse() {
  throw std::invalid_argument(
      "fp16 is not in this build, which has sanitizers: the dtype must be bf16 or bf16_fp8");
}

}  // namespace

void launch_unrotate_fp16(const UnrotateParams&, const Run&) {
  refuse();
}
void launch_match_fp16(const MatchParams&, const cuda::MatchWorkspace&, const Run&) {
  refuse();
}
void launch_amend_fp16(const AmendParams&, const cuda::AmendWorkspace&, int, const Run&) {
  refuse();
}
void launch_amend_fp16_fp8(const AmendParams&, const cuda::AmendWorkspace&, int, const Run&) {
  refuse();
}
void launch_complete_fp16(const CompleteParams&, const cuda::CompleteWorkspace&, const Run&) {
  refuse();
}

}  // namespace mac_attn::simt
