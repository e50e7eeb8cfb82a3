// Which tokens a head has to attend to, and how they are cut into tasks.
#pragma once

#include <algorithm>

#include "../params.h"
#include "kernels.h"

namespace mac_attn::cpu {

// Whether a request's tokens are split at E(p), for the new entry.
inline bool reuses(const AmendParams& p, int request) {
  return p.matched.source && has_ring(p.requests, request);
}

// First token that a query, of the request's [H, T, G], attends to afresh: E(c) on a hit, 0 on a miss or without
// reuse.
inline int32_t amend_start(const AmendParams& p, int request, int query) {
  if (!reuses(p, request)) return 0;
  const int32_t source = p.matched.source[static_cast<int64_t>(request) * p.shape.num_queries() + query];
  return source == kMiss ? 0 : band_start(source, p.band);
}

// How many anchors a list of S has: behind them is nothing but kNoAnchor.
inline int32_t num_anchors(const int32_t* anchors, int32_t size) {
  const auto given = [](int32_t token) { return token != kNoAnchor; };
  return static_cast<int32_t>(std::partition_point(anchors, anchors + size, given) - anchors);
}

}  // namespace mac_attn::cpu
