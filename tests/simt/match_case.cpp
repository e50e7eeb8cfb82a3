#include "match_case.h"

#include <algorithm>
#include <cmath>

namespace mac_attn::simt {

namespace {

constexpr int32_t kStickyBit = 1 << 20;

}  // namespace

std::string MatchSpec::name() const {
  return std::string("match ") + (dtype == DType::kBFloat16 ? "bf16" : "fp16") +
         " H=" + std::to_string(num_kv_heads) + " G=" + std::to_string(group_size) +
         " D=" + std::to_string(head_dim) + " M=" + std::to_string(window) + " W=" + std::to_string(band) +
         (per_head ? " per head" : "") + (relative ? " relative " : " absolute ") + std::to_string(rho) +
         " depth=" + std::to_string(max_reuse_depth) + (twins ? " twins" : "") +
         " splits=" + std::to_string(splits) + " seed=" + std::to_string(seed);
}

MatchCase::MatchCase(const MatchSpec& spec)
    : seq_lens(spec.seq_lens.begin(), spec.seq_lens.end()),
      errors(spec.seq_lens.size()),
      ring([&] {
        Data data(spec.seed + 1000);
        const Shape shape{static_cast<int32_t>(spec.seq_lens.size()), spec.num_kv_heads, spec.group_size,
                          spec.head_dim};
        return RingTensors(spec.dtype, shape, shape.batch + 2, spec.window, 0, data);
      }()),
      spec_(spec),
      data_(spec.seed),
      query_(spec.dtype, static_cast<int>(spec.seq_lens.size()), heads(), spec.head_dim, 1, data_) {
  const int batch = static_cast<int>(seq_lens.size());
  for (int i = 0; i < ring.num_slots; ++i) slots.push_back(i);
  data_.shuffle(slots);
  slots.resize(batch);
  for (int h = 0; h < heads(); ++h) {
    const double rho = spec.rho * (1 + 0.3 * (h % 3));
    thresholds.push_back(static_cast<float>(spec.relative ? rho : rho * spec.head_dim));
  }
  for (int b = 0; b < batch; ++b) {
    const int position = seq_lens[b] - 1, slot = slots[b];
    request_ids_.push_back(100 + b);
    ring.end[slot] = position;
    ring.request[slot] = spec.request_ids ? request_ids_[b] : -1;
    ring.begin[slot] = b % 2 ? std::max(0, position - spec.window / 2) : 0;
    for (int c = std::max(0, position - spec.window); c < position; ++c) {
      ring.position[slot * spec.window + c % spec.window] = c;
      const int kind = data_.below(1000);
      const bool hole = kind < 1000 * spec.holes;
      if (hole) ring.position[slot * spec.window + c % spec.window] = data_.below(2) ? -1 : c - spec.window;
      const bool trap = hole || c < ring.begin[slot] || c < spec.band;
      if (trap || kind > 1000 * (1 - spec.near)) set_entry(b, c, trap ? 0 : data_.below(10) / 20.);
    }
    if (spec.twins) {  // of equal entries, the newest is to be taken
      const int count = std::min(position, spec.window);
      for (int i = 1; i + 7 <= count; i += 2) {
        for (int h = 0; h < heads(); ++h) {
          std::copy_n(&ring.query[ring.row(slot, h, position - i) * spec.head_dim], spec.head_dim,
                      &ring.query[ring.row(slot, h, position - i - 7) * spec.head_dim]);
        }
      }
    }
    if (position < 0) slots[b] = kGarbage;
  }
}

void MatchCase::set_entry(int request, int position, double noise) {
  for (int h = 0; h < heads(); ++h) {
    const reference::Vector query = query_.row(request, h);
    const int64_t first = ring.row(slots[request], h, position) * spec_.head_dim;
    // With decisions per head, each has another one that is near.
    const double own = spec_.per_head ? noise * data_.below(3) : noise;
    for (int d = 0; d < spec_.head_dim; ++d) {
      ring.query[first + d] = encode(spec_.dtype, query[d] + own * data_.normal());
    }
  }
}

void MatchCase::run(const Run& run) {
  const size_t batch = seq_lens.size();
  source_.assign(batch * heads(), 12345);
  status_.assign(batch, 12345);
  best_.assign(batch * heads(), 0);
  done_.assign(batch * spec_.num_kv_heads, 0);
  error_flag_.assign(1, kStickyBit);
  unchanged_ = {};
  unchanged_.note(query_.bits()), unchanged_.note(thresholds), unchanged_.note(seq_lens), unchanged_.note(slots);
  unchanged_.note(request_ids_), unchanged_.note(ring.query), unchanged_.note(ring.out), unchanged_.note(ring.lse);
  unchanged_.note(ring.depth), unchanged_.note(ring.position), unchanged_.note(ring.begin);
  unchanged_.note(ring.end), unchanged_.note(ring.request), unchanged_.note(ring.counters);
  MatchParams p{};
  p.shape = ring.shape, p.dtype = spec_.dtype;
  p.query = query_.view();
  p.requests = {seq_lens.data(), slots.data(), spec_.request_ids ? request_ids_.data() : nullptr};
  p.ring = ring.view();
  p.threshold = thresholds.data();
  p.relative = spec_.relative, p.per_head = spec_.per_head;
  p.band = spec_.band, p.min_context = spec_.min_context, p.max_reuse_depth = spec_.max_reuse_depth;
  p.source = source_.data();
  // As on sm_90, or for every other seed as on sm_80.
  const int cluster = run.seed % 2 == 1 && spec_.splits <= cuda::kMaxCluster ? spec_.splits : 1;
  const cuda::MatchWorkspace w{best_.data(),       done_.data(), status_.data(),
                               error_flag_.data(), spec_.splits, cluster};
  (spec_.dtype == DType::kBFloat16 ? launch_match_bf16 : launch_match_fp16)(p, w, run);
}

int MatchCase::count_hits() const {
  return static_cast<int>(source_.size() - std::count(source_.begin(), source_.end(), kMiss));
}

reference::Vector MatchCase::stored(int request, int position, int head) const {
  reference::Vector row;
  const int64_t first = ring.row(slots[request], head, position) * spec_.head_dim;
  for (int d = 0; d < spec_.head_dim; ++d) row.push_back(decode(spec_.dtype, ring.query[first + d]));
  return row;
}

bool MatchCase::is_candidate(int request, int position, int head) const {
  const int current = seq_lens[request] - 1, slot = slots[request];
  if (position < std::max(0, current - spec_.window) || position >= current) return false;
  return reference::old_end(position, spec_.band) > 0 && position >= ring.begin[slot] &&
         ring.position[slot * spec_.window + position % spec_.window] == position &&
         ring.depth[ring.row(slot, head, position)] < spec_.max_reuse_depth;
}

// One decision of one or several heads. Scores are fp32 sums of up to G * D terms that are not negative, each right
// to some 2^-22, so that candidates whose scores differ by less than 1e-5 may change places; equal rows may not.
void MatchCase::check_decision(int request, int first_head, int num_heads) const {
  constexpr double kSlack = 1e-5;
  const int32_t* answers = &source_[request * heads() + first_head];
  const int answer = answers[0], position = seq_lens[request] - 1;
  CHECK(std::count(answers, answers + num_heads, answer) == num_heads);
  bool searches = !errors[request] && seq_lens[request] > 0 && seq_lens[request] >= spec_.min_context;
  if (searches) {
    const int slot = slots[request];
    searches = slot != kNoSlot && ring.end[slot] == position &&
               ring.request[slot] == (spec_.request_ids ? request_ids_[request] : -1);
  }
  if (!searches) {
    CHECK(answer == kMiss);
    return;
  }
  std::vector<reference::MatchHead> queries;
  for (int h = first_head; h < first_head + num_heads; ++h) {
    const reference::Vector query = query_.row(request, h);
    queries.push_back({query, reference::match_theta(query, thresholds[h], spec_.relative)});
  }
  double best = INFINITY, found = NAN;
  for (int c = std::max(0, position - spec_.window); c < position; ++c) {
    if (!is_candidate(request, c, first_head)) continue;
    reference::Rows rows;
    for (int h = first_head; h < first_head + num_heads; ++h) rows.push_back(stored(request, c, h));
    const double score = reference::match_score(queries, rows);
    if (score < best) best = score;  // NaN is not
    if (c == answer) found = score;
  }
  if (answer == kMiss) {
    CHECK(!(best < 1 - kSlack));
    return;
  }
  CHECK(is_candidate(request, answer, first_head));
  CHECK(found < 1 + kSlack && found <= best * (1 + kSlack) + 1e-12);
  for (int c = answer + 1; c < position; ++c) {
    if (!is_candidate(request, c, first_head)) continue;
    bool equal = true;
    for (int h = first_head; h < first_head + num_heads; ++h) {
      equal = equal && stored(request, c, h) == stored(request, answer, h);
    }
    CHECK(!equal);
  }
}

void MatchCase::check() const {
  CHECK(unchanged_.holds());
  CHECK(std::count(best_.begin(), best_.end(), 0) == static_cast<int64_t>(best_.size()));
  CHECK(std::count(done_.begin(), done_.end(), 0) == static_cast<int64_t>(done_.size()));
  int32_t flag = kStickyBit;
  const int decide_together = spec_.per_head ? 1 : spec_.group_size;
  for (int b = 0; b < static_cast<int>(seq_lens.size()); ++b) {
    CHECK(status_[b] == errors[b]);
    flag |= errors[b];
    for (int h = 0; h < heads(); h += decide_together) check_decision(b, h, decide_together);
  }
  CHECK(error_flag_[0] == flag);
}

}  // namespace mac_attn::simt
