#include "launch_types.h"

namespace mac_attn::simt {

void launch_unrotate_bf16(const UnrotateParams& p, const Run& run) {
  launch_unrotate_type<bf16>(p, run);
}
void launch_match_bf16(const MatchParams& p, const cuda::MatchWorkspace& w, const Run& run) {
  launch_match_type<bf16>(p, w, run);
}
void launch_amend_bf16(const AmendParams& p, const cuda::AmendWorkspace& w, int ctas, const Run& run) {
  launch_amend_type<bf16, bf16>(p, w, ctas, run);
}
void launch_complete_bf16(const CompleteParams& p, const cuda::CompleteWorkspace& w, const Run& run) {
  launch_complete_type<bf16>(p, w, run);
}

}  // namespace mac_attn::simt
