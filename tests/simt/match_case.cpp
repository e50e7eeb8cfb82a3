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
         " D=" + std::to_string(head_dim) + " T=" + std::to_string(tokens) + " M=" + std::to_string(entries) +
         " window=" + std::to_string(window) + " W=" + std::to_string(band) + " S=" + std::to_string(anchors) +
         (per_head ? " per head" : "") + (relative ? " relative " : " absolute ") + std::to_string(rho) +
         " drift=" + std::to_string(max_drift) + " depth=" + std::to_string(max_reuse_depth) +
         (twins ? " twins" : "") + " splits=" + std::to_string(splits) + " seed=" + std::to_string(seed);
}

MatchCase::MatchCase(const MatchSpec& spec)
    : seq_lens(spec.seq_lens.begin(), spec.seq_lens.end()),
      query_lens(spec.query_lens.begin(), spec.query_lens.end()),
      errors(spec.seq_lens.size()),
      ring([&] {
        Data data(spec.seed + 1000);
        const Shape shape{static_cast<int32_t>(spec.seq_lens.size()), spec.num_kv_heads, spec.group_size,
                          spec.head_dim, spec.tokens};
        return RingTensors(spec.dtype, shape, shape.batch + 2, spec.entries, spec.anchors, data);
      }()),
      spec_(spec),
      data_(spec.seed),
      query_(spec.dtype, static_cast<int>(spec.seq_lens.size()), heads() * spec.tokens, spec.head_dim, 1, data_) {
  const int batch = static_cast<int>(seq_lens.size());
  for (int i = 0; i < ring.num_slots; ++i) slots.push_back(i);
  data_.shuffle(slots);
  slots.resize(batch);
  for (int h = 0; h < heads(); ++h) {
    const double rho = spec.rho * (1 + 0.3 * (h % 3));
    thresholds.push_back(static_cast<float>(spec.relative ? rho : rho * spec.head_dim));
  }
  const Ring r = ring.view();
  const int G = spec.group_size, M = spec.entries;
  for (int b = 0; b < batch; ++b) {
    const int first = position(b), slot = slots[b];
    request_ids_.push_back(100 + b);
    *r.end(slot) = first - b % 3, *r.reach(slot) = first + (b + 1) % 3;
    *r.request(slot) = spec.request_ids ? request_ids_[b] : -1;
    for (int h = 0; h < spec.num_kv_heads; ++h) {
      *r.stored(slot, h) = data_.below(3) ? M + data_.below(M) : 1 + data_.below(M);
      for (int ago = 0, c = first; ago < M; ++ago) {
        c -= 1 + data_.below(spec.gap);
        const int place = ring.place(slot, h, ago), kind = data_.below(1000);
        const bool hole = kind < 1000 * spec.holes;
        *r.position(slot, h, place) = std::max(c, -1);
        if (hole) *r.position(slot, h, place) = data_.below(2) ? -1 : first + data_.below(3);
        const bool trap = hole || c < oldest(b, 0) || ago >= *r.stored(slot, h);
        if (trap || kind > 1000 * (1 - spec.near)) set_entry(b, h, place, trap ? 0 : data_.below(10) / 20.);
      }
      for (int ago = 1; spec.twins && ago + 7 < M; ago += 2) {  // of equal entries, the youngest is to be taken
        std::copy_n(r.query<uint16_t>(slot, h, ring.place(slot, h, ago)), G * spec.head_dim,
                    r.query<uint16_t>(slot, h, ring.place(slot, h, ago + 7)));
      }
    }
    if (seq_lens[b] == 0) slots[b] = kGarbage;
  }
}

void MatchCase::set_entry(int request, int kv_head, int place, double noise) {
  const int G = spec_.group_size, D = spec_.head_dim;
  uint16_t* row = ring.view().query<uint16_t>(slots[request], kv_head, place);
  const int token = seq_lens[request] > 0 ? data_.below(query_len(request)) : 0;
  for (int g = 0; g < G; ++g) {
    const reference::Vector query = query_.row(request, token * heads() + kv_head * G + g);
    // With decisions per head, each has another one that is near.
    const double own = spec_.per_head ? noise * data_.below(3) : noise;
    for (int d = 0; d < D; ++d) row[g * D + d] = encode(spec_.dtype, query[d] + own * data_.normal());
  }
}

void MatchCase::run(const Run& run) {
  const size_t batch = seq_lens.size();
  const size_t queries = batch * heads() * spec_.tokens;
  source_.assign(queries, 12345), place_.assign(queries, 12345);
  stored_.assign(batch * spec_.num_kv_heads, 12345);
  status_.assign(batch, 12345);
  best_.assign(queries, 0);
  done_.assign(batch * spec_.num_kv_heads, 0);
  error_flag_.assign(1, kStickyBit);
  unchanged_ = {};
  unchanged_.note(query_.bits()), unchanged_.note(thresholds), unchanged_.note(seq_lens), unchanged_.note(slots);
  unchanged_.note(request_ids_), unchanged_.note(ring.bytes), unchanged_.note(query_lens);
  MatchParams p{};
  p.shape = ring.shape, p.dtype = spec_.dtype;
  p.query = query_.view(heads());
  p.requests = {seq_lens.data(), slots.data(), spec_.request_ids ? request_ids_.data() : nullptr,
                query_lens.empty() ? nullptr : query_lens.data()};
  p.ring = ring.view();
  p.threshold = thresholds.data();
  p.relative = spec_.relative, p.max_drift = static_cast<float>(spec_.max_drift), p.per_head = spec_.per_head;
  p.window = spec_.window, p.band = spec_.band, p.min_context = spec_.min_context,
  p.max_reuse_depth = spec_.max_reuse_depth;
  p.matched = {source_.data(), place_.data(), stored_.data()};
  // As on sm_90, or for every other seed as on sm_80; several tokens' CTAs meet in memory on both.
  const int cluster =
      run.seed % 2 == 1 && spec_.tokens == 1 && spec_.splits <= cuda::kMaxCluster ? spec_.splits : 1;
  const cuda::MatchWorkspace w{best_.data(),       done_.data(), status_.data(),
                               error_flag_.data(), spec_.splits, cluster};
  (spec_.dtype == DType::kBFloat16 ? launch_match_bf16 : launch_match_fp16)(p, w, run);
}

int MatchCase::count_hits() const {
  return static_cast<int>(source_.size() - std::count(source_.begin(), source_.end(), kMiss));
}

int MatchCase::oldest(int request, int token) const {
  const int n = position(request) + token + 1;
  const int size = reference::sample_size(spec_.anchors, reference::old_end(n - 1, spec_.band));
  int position = std::max(0, n - 1 - spec_.window);
  while (reference::old_end(position, spec_.band) == 0) ++position;
  // A hit reads the band, what came since, and the sample; with all query tokens half of the context at most.
  const int share = n / 2 / query_len(request);
  while (spec_.anchors > 0 && position < n && spec_.band + n - 1 - position + size > share) ++position;
  return position;
}

int MatchCase::stored(int request, int kv_head) const {
  const int slot = slots[request], n = seq_lens[request];
  if (errors[request] || n <= 0 || slot == kNoSlot) return kNoHistory;
  const Ring r = ring.view();
  const int first = position(request);
  if (*r.end(slot) > first || first > *r.reach(slot) ||
      *r.request(slot) != (spec_.request_ids ? request_ids_[request] : -1)) {
    return kNoHistory;
  }
  const int stored = *r.stored(slot, kv_head);
  return stored >= 0 && stored < 2 * spec_.entries ? stored : kNoHistory;
}

reference::Vector MatchCase::query_of(int request, int head, int place) const {
  const int G = spec_.group_size, D = spec_.head_dim;
  const uint16_t* rows = ring.view().query<uint16_t>(slots[request], head / G, place);
  reference::Vector row;
  for (int d = 0; d < D; ++d) row.push_back(decode(spec_.dtype, rows[head % G * D + d]));
  return row;
}

bool MatchCase::is_candidate(int request, int token, int head, int place) const {
  const Ring r = ring.view();
  const int slot = slots[request], G = spec_.group_size, at = *r.position(slot, head / G, place);
  return at >= oldest(request, token) && at < position(request) &&
         r.depth(slot, head / G, place)[head % G] < spec_.max_reuse_depth;
}

MatchCase::Scores MatchCase::scores(int request, int token, int first_head, int num_heads) const {
  const int kv_head = first_head / spec_.group_size, slot = slots[request];
  const int answer = place_[row(request, token, first_head)];
  if (position(request) + token + 1 < spec_.min_context) return {};
  std::vector<reference::MatchHead> queries;
  for (int h = first_head; h < first_head + num_heads; ++h) {
    const reference::Vector query = query_.row(request, token * heads() + h);
    const double spread = *ring.view().spread(slot, kv_head);
    queries.push_back(
        {query, reference::match_theta(query, thresholds[h], spec_.relative, spec_.max_drift, spread)});
  }
  const auto rows_of = [&](int place) {
    reference::Rows rows;
    for (int h = first_head; h < first_head + num_heads; ++h) rows.push_back(query_of(request, h, place));
    return rows;
  };
  Scores scores;
  for (int ago = 0; ago < std::min(stored(request, kv_head), spec_.entries); ++ago) {
    const int place = ring.place(slot, kv_head, ago);
    if (!is_candidate(request, token, first_head, place)) continue;
    const double score = reference::match_score(queries, rows_of(place));
    if (score < scores.best) scores.best = score;  // NaN is not
    if (place == answer) scores.answer = score;
    if (answer != kMiss && std::isnan(scores.answer)) CHECK(rows_of(place) != rows_of(answer));
  }
  return scores;
}

// One decision of one or several heads. Scores are fp32 sums of up to G * D terms that are not negative, each right
// to some 2^-22, so that candidates whose scores differ by less than 1e-5 may change places; equal rows may not.
void MatchCase::check_decision(int request, int first_head, int num_heads) const {
  constexpr double kSlack = 1e-5;
  const int kv_head = first_head / spec_.group_size;
  const int history = stored(request, kv_head);
  CHECK(stored_[request * spec_.num_kv_heads + kv_head] == history);
  const bool searches = history != kNoHistory && !errors[request];
  bool hits = searches, surely = searches;  // with all tokens
  for (int token = 0; token < spec_.tokens; ++token) {
    const int64_t first = row(request, token, first_head);
    const int answer = place_[first];
    const bool there = searches && token < query_len(request);
    const int source = answer == kMiss ? kMiss : *ring.view().position(slots[request], kv_head, answer);
    CHECK(std::count(&place_[first], &place_[first] + num_heads, answer) == num_heads);
    CHECK(std::count(&source_[first], &source_[first] + num_heads, source) == num_heads);
    CHECK(there || answer == kMiss);
    if (!there) continue;
    const Scores found = scores(request, token, first_head, num_heads);
    hits = hits && answer != kMiss, surely = surely && found.best < 1 - kSlack;
    if (answer == kMiss) continue;
    CHECK(place_[row(request, 0, first_head)] != kMiss);
    CHECK(found.answer < 1 + kSlack && found.answer <= found.best * (1 + kSlack) + 1e-12);
  }
  CHECK(hits || !surely);
  CHECK(hits || place_[row(request, 0, first_head)] == kMiss);
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
