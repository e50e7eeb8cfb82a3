// The CPU side of the ops: checks of values, and ATen's threads for the kernels.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "backend.h"
#include "checks.h"
#include "cpu/schedule.h"

namespace mac_attn::cpu_backend {

namespace {

// Enters `kernel` with every thread of ATen's team or, where there is too little for two, with this one alone: a
// team takes 5 microseconds to come together, and milliseconds where other programs have its cores.
template <typename Kernel, typename Params, typename Work>
void run_team(Kernel kernel, const Params& params, Work& work, bool alone) {
  if (alone) return kernel(params, work);
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { kernel(params, work); });
}

// The anchors of a matched entry are old tokens of it, on pages of the cache.
void check_anchors(const AmendParams& p, int32_t request, int32_t kv_head, int32_t place) {
  const int64_t slot = p.requests.slots[request];
  const int32_t* anchors = p.ring.anchors(slot, kv_head, place);
  const int32_t source = *p.ring.position(slot, kv_head, place), end = band_start(source, p.band);
  const int32_t count = cpu::num_anchors(anchors, p.num_anchors);
  // All at once; which one is wrong, if one is, is found out afterwards.
  bool fits = count > 0;
  for (int32_t i = 0; i < count; ++i) fits &= is_below(anchors[i], end);
  if (fits && has_pages(p.kv, request, 0, anchors[count - 1])) return;
  for (int32_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(anchors[i] >= 0 && anchors[i] < end, "ring_anchors of slot ", slot, ", position ", source,
                      " hold ", anchors[i], ", must be from 0 to ", end - 1);
    check_pages(p.kv, request, anchors[i], anchors[i]);
  }
}

// What amend is going to read: the tokens of every request, the anchors of every matched entry.
void check_amend_reads(const AmendParams& p) {
  check_scale(p.kv.k_scale, "k_scale", p.shape.num_kv_heads);
  check_scale(p.kv.v_scale, "v_scale", p.shape.num_kv_heads);
  check_seq_lens(p.shape, p.requests, std::min(max_tokens(p.kv), kMaxTokens));
  if (p.matched.source) {
    check_slots(p.shape, p.requests, p.ring.num_slots);
    check_matched(p.shape, p.requests, p.matched, p.ring, p.band);
  }
  for (int32_t b = 0; b < p.shape.batch; ++b) {
    const int32_t n = p.requests.seq_lens[b];
    if (n == 0) continue;
    const int32_t T_G = p.shape.group_queries(), G = p.shape.group_size;
    const int32_t there = query_len(p.shape, p.requests, b) * G;  // of each KV head
    int32_t first = n;
    for (int32_t i = 0; i < p.shape.num_queries(); ++i) {
      if (i % T_G < there) first = std::min(first, cpu::amend_start(p, b, i));
    }
    check_pages(p.kv, b, first, n - 1);
    for (int32_t i = 0; p.num_anchors > 0 && i < p.shape.num_queries(); i += G) {
      const int64_t row = static_cast<int64_t>(b) * p.shape.num_queries() + i;
      if (p.matched.source[row] != kMiss) check_anchors(p, b, i / T_G, p.matched.place[row]);
    }
  }
}

}  // namespace

void match(const MatchParams& p) {
  check_seq_lens(p.shape, p.requests, INT32_MAX);
  check_slots(p.shape, p.requests, p.ring.num_slots);
  cpu::MatchWork work(p, at::get_num_threads());
  run_team(cpu::kernels(p.shape).match, p, work, work.num_tasks == 0);
  work.write_matched(p);
}

void amend(const AmendParams& p) {
  check_amend_reads(p);
  cpu::AmendWork work(p, at::get_num_threads());
  run_team(cpu::kernels(p.shape).amend, p, work, work.tasks.size() <= 1);
}

bool hands_on_candidates() {
  return false;
}

void complete(const CompleteParams& p) {
  for (int32_t h = 0; p.sinks && h < p.shape.num_qo_heads(); ++h) {
    TORCH_CHECK_VALUE(p.sinks[h] < INFINITY, "sinks[", h, "] is ", p.sinks[h], ", must be below infinity");
  }
  check_seq_lens(p.shape, p.requests, p.kv.k ? max_tokens(p.kv) : INT32_MAX);
  if (p.matched.source) {
    check_slots(p.shape, p.requests, p.ring.num_slots);
    check_matched(p.shape, p.requests, p.matched, p.ring, p.band);
  }
  cpu::CompleteWork work(p);
  constexpr int64_t kFewElements = 8192;
  const int64_t elements = int64_t{p.shape.batch} * p.shape.num_queries() * p.shape.head_dim_v;
  run_team(cpu::kernels(p.shape).complete, p, work, elements <= kFewElements);
}

// On one thread: the queries are few.
void unrotate(const UnrotateParams& p) {
  const int64_t step = p.interleaved ? 2 : 1, second = p.interleaved ? 1 : p.pairs;
  const int64_t heads = p.shape.num_qo_heads(), D = p.shape.head_dim;
  std::vector<float> cos(p.pairs), sin(p.pairs);
  const auto type = p.dtype == DType::kBFloat16  ? at::kBFloat16
                    : p.dtype == DType::kFloat16 ? at::kHalf
                                                 : at::kFloat;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, type, "unrotate", [&] {
    for (int64_t b = 0; b < p.shape.batch; ++b) {
      const int64_t first = int64_t{p.positions[b]} - (p.each_back ? p.each_back[b] : p.back);
      const scalar_t* rows = static_cast<const scalar_t*>(p.query.data) + b * p.query.batch_stride;
      for (int64_t row = 0; row < p.shape.tokens * heads; ++row) {
        const int64_t token = row / heads, h = row % heads;
        for (int64_t i = 0; h == 0 && i < p.pairs; ++i) {
          const float angle = static_cast<float>(first + token) * p.inv_freq[i];
          cos[i] = std::cos(angle) * p.inverse_scale;
          sin[i] = std::sin(angle) * p.inverse_scale;
        }
        const scalar_t* from = rows + token * p.query.token_stride + h * p.query.head_stride;
        scalar_t* to = static_cast<scalar_t*>(p.out) + ((b * p.shape.tokens + token) * heads + h) * D;
        for (int64_t i = 0; i < p.pairs; ++i) {
          const float x = static_cast<float>(from[i * step]), y = static_cast<float>(from[i * step + second]);
          to[i * step] = static_cast<scalar_t>(x * cos[i] + y * sin[i]);
          to[i * step + second] = static_cast<scalar_t>(y * cos[i] - x * sin[i]);
        }
        std::copy(from + 2 * p.pairs, from + D, to + 2 * p.pairs);
      }
    }
  });
}

}  // namespace mac_attn::cpu_backend
