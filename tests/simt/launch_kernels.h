// The kernels on the host execution. launch_types.h alone knows of their grids, blocks and shared memory.
#pragma once

#include "../../csrc/params.h"
#include "check.h"
#include "kernels.h"

namespace mac_attn::simt {

void launch_unrotate_bf16(const UnrotateParams& p, const Run& run);
void launch_unrotate_fp16(const UnrotateParams& p, const Run& run);
void launch_match_bf16(const MatchParams& p, const cuda::MatchWorkspace& w, const Run& run);
void launch_match_fp16(const MatchParams& p, const cuda::MatchWorkspace& w, const Run& run);
void launch_amend_bf16(const AmendParams& p, const cuda::AmendWorkspace& w, int ctas, const Run& run);
void launch_amend_fp16(const AmendParams& p, const cuda::AmendWorkspace& w, int ctas, const Run& run);
void launch_amend_bf16_fp8(const AmendParams& p, const cuda::AmendWorkspace& w, int ctas, const Run& run);
void launch_amend_fp16_fp8(const AmendParams& p, const cuda::AmendWorkspace& w, int ctas, const Run& run);
void launch_complete_bf16(const CompleteParams& p, const cuda::CompleteWorkspace& w, const Run& run);
void launch_complete_fp16(const CompleteParams& p, const cuda::CompleteWorkspace& w, const Run& run);

}  // namespace mac_attn::simt
