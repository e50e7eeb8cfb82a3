#include "launch_types.h"

namespace mac_attn::simt {

void launch_unrotate_fp16(const UnrotateParams& p, const Run& run) {
  launch_unrotate_type<fp16>(p, run);
}
void launch_match_fp16(const MatchParams& p, const cuda::MatchWorkspace& w, const Run& run) {
  launch_match_type<fp16>(p, w, run);
}
void launch_amend_fp16(const AmendParams& p, const cuda::AmendWorkspace& w, int ctas, const Run& run) {
  launch_amend_type<fp16, fp16>(p, w, ctas, run);
}
void launch_complete_fp16(const CompleteParams& p, const cuda::CompleteWorkspace& w, const Run& run) {
  launch_complete_type<fp16>(p, w, run);
}

}  // namespace mac_attn::simt
