// The CUDA kernels for a caller without nvcc: what they need and how they are launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../params.h"

namespace mac_attn::cuda {

constexpr int32_t kMaxTileHeads = 16;  // query heads that one pass over the tokens serves
constexpr int32_t kWarpTokens = 16;    // tokens with one anchor candidate among them
constexpr int32_t kMaxAnchors = 256;
constexpr int32_t kMaxGroup = 128;

// Bits of a request's status and of the sticky error flag; mac_attn/cache.py reads them.
enum Error : int32_t { kBadLength = 1, kBadPage = 2, kBadSlot = 4 };

struct MatchWorkspace {
  int32_t* status;      // [B] Error bits, written for every request
  int32_t* error_flag;  // [1] sticky, or null
};

// Device memory of one amend call. `done` is zero before the launch and after it.
struct AmendWorkspace {
  int32_t* done;           // [B, H] CTAs that have left their segments
  int32_t* status;         // [B] Error bits
  int32_t* error_flag;     // [1] sticky, or null
  float* partial_out;      // [C + B H head_tiles, kNumSpans, tile_heads, D] sum of weight * value
  float* partial_max;      // [.., kNumSpans, tile_heads] log2
  float* partial_sum;      // [.., kNumSpans, tile_heads]
  int32_t* candidate;      // [B, H, max_candidates] token or -1; of every 16 old tokens of a miss
  float* candidate_logit;  // [B, H, max_candidates, G] log2
  float* candidate_max;    // [B, H, max_candidates, G] the maximum its weight was relative to
  int32_t max_candidates;
  int32_t num_pages;
  int64_t max_tokens;  // max_pages * page_size
  int32_t tile_heads;  // min(G, kMaxTileHeads)
  int32_t head_tiles;  // passes per KV head: ceil(G / kMaxTileHeads)
};

struct CompleteWorkspace {
  const int32_t* status;  // [B] Error bits of match and amend, null in exact mode
};

// CTAs of the persistent amend grid on the current device.
cudaError_t amend_ctas(int32_t head_dim, int32_t group_size, int32_t* ctas);

cudaError_t launch_match(const MatchParams& params, const MatchWorkspace& workspace, cudaStream_t stream);
cudaError_t launch_amend(const AmendParams& params, const AmendWorkspace& workspace, int32_t ctas,
                         cudaStream_t stream);
cudaError_t launch_complete(const CompleteParams& params, const CompleteWorkspace& workspace, cudaStream_t stream);

}  // namespace mac_attn::cuda
