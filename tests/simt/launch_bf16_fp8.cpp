#include "launch_types.h"

namespace mac_attn::simt {

void launch_amend_bf16_fp8(const AmendParams& p, const cuda::AmendWorkspace& w, int ctas, const Run& run) {
  launch_amend_type<bf16, fp8>(p, w, ctas, run);
}

}  // namespace mac_attn::simt
