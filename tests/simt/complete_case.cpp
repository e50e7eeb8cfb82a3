#include "complete_case.h"

#include <algorithm>
#include <cmath>

namespace mac_attn::simt {

namespace {

constexpr uint16_t kGap = 0x1234;  // between the rows of `out`

constexpr int kLayer = 5;
constexpr float kScale = 0.3f;  // of the logits

bool close(double got, double want) {
  return got == want || std::abs(got - want) <= 3e-5;
}

}  // namespace

std::string CompleteSpec::name() const {
  return std::string("complete ") + (dtype == DType::kBFloat16 ? "bf16" : "fp16") +
         " H=" + std::to_string(num_kv_heads) + " G=" + std::to_string(group_size) +
         " D=" + std::to_string(head_dim) + " V=" + std::to_string(head_dim_v()) + " S=" + std::to_string(anchors) +
         (exact ? " exact" : "") + " T=" + std::to_string(tokens) + (candidates ? " candidates" : "") +
         (per_head ? " per head" : "") + (sinks ? " sinks" : "") + (keys ? fp8 ? " fp8 keys" : " keys" : "") +
         " depth=" + std::to_string(max_reuse_depth) + " seed=" + std::to_string(seed);
}

CompleteCase::CompleteCase(const CompleteSpec& spec)
    : seq_lens(spec.seq_lens.begin(), spec.seq_lens.end()),
      query_lens(spec.query_lens.begin(), spec.query_lens.end()),
      status(spec.seq_lens.size()),
      ring([&] {
        Data data(spec.seed + 1000);
        const Shape shape{static_cast<int32_t>(spec.seq_lens.size()),
                          spec.num_kv_heads,
                          spec.group_size,
                          spec.head_dim,
                          spec.tokens,
                          spec.head_dim_v()};
        return RingTensors(spec.dtype, shape, shape.batch + 2, spec.entries, spec.anchors, data);
      }()),
      pages([&] {
        Data data(spec.seed + 2000);
        return Pages(spec.dtype, spec.fp8, spec.seq_lens, spec.num_kv_heads, spec.head_dim, spec.head_dim_v(), 16,
                     spec.seed % 2, data);
      }()),
      spec_(spec),
      data_(spec.seed),
      query_(spec.dtype, static_cast<int>(spec.seq_lens.size()), queries(), spec.head_dim, 1, data_),
      rotated_(spec.dtype, static_cast<int>(spec.seq_lens.size()), queries(), spec.head_dim, 1, data_),
      head_stride_(spec.head_dim_v() + 3),
      batch_stride_(queries() * head_stride_ + 5),
      before_(ring) {
  const int batch = static_cast<int>(seq_lens.size()), H = spec.num_kv_heads, G = spec.group_size;
  const int V = spec.head_dim_v(), S = spec.anchors, M = spec.entries;
  for (int i = 0; i < ring.num_slots; ++i) slots.push_back(i);
  data_.shuffle(slots);
  slots.resize(batch);
  const int64_t rows = int64_t{batch} * queries();
  for (int64_t row = 0; row < kNumSpans * rows; ++row) {
    const int request = static_cast<int>(row / queries() % batch), token = static_cast<int>(row / G % spec.tokens);
    const bool empty = token >= query_len(request) || data_.below(4) == 0;
    state_lse.push_back(empty ? -INFINITY
                              : static_cast<float>(data_.below(8) ? 3 * data_.normal() : 60 * data_.normal()));
    for (int d = 0; d < V; ++d) states.push_back(empty ? 0.f : static_cast<float>(data_.normal()));
  }
  source_.assign(rows, kMiss), place_.assign(rows, kMiss), log_ratio_.assign(rows, 0.f);
  for (int b = 0; b < batch; ++b) {
    request_ids_.push_back(100 + b);
    const auto& without = spec.without_ring;
    const bool has_ring = std::find(without.begin(), without.end(), b) == without.end();
    match(b, has_ring);
    for (int h = 0; h < H; ++h) {
      const bool hits = source_[row(b, 0, h * G)] != kMiss;
      stored_.push_back(hits ? 1 + data_.below(2 * M - 1) : data_.below(3) ? data_.below(2 * M) : kNoHistory);
      const int size = reference::sample_size(S, reference::old_end(position(b), spec.band));
      const int sampled[] = {kNotSampled, 0, 1, size, 4 * size, 4 * size + 1};
      for (int token = 0; token < spec.tokens; ++token) {
        const bool reads = S > 0 && hits && token < query_len(b), draws = S > 0 && !hits && token == 0;
        sampled_.push_back(reads ? data_.below(S + 1) : draws ? sampled[data_.below(6)] : kNotSampled);
      }
      *ring.view().missed(slots[b], h) = data_.below(40);
      if (data_.below(5) == 0) *ring.view().tau(slots[b], h) = data_.below(2) ? NAN : 0.f;
    }
    if (seq_lens[b] == 0) slots[b] = kGarbage;
    if (!has_ring) slots[b] = kNoSlot;
  }
  for (int h = 0; spec.sinks && h < heads(); ++h) {
    sinks_.push_back(data_.below(6) ? static_cast<float>(4 * data_.normal()) : -INFINITY);
  }
  for (int i = 0; i < batch * H * S; ++i) {
    anchors_.push_back(data_.below(4) ? data_.below(1000) : kNoAnchor);
    anchor_weights_.push_back(static_cast<float>(data_.normal()));
  }
  candidates_.assign(spec.candidates ? batch * H * kCandidateRoom * S : 0, {kGarbage, NAN});
  for (int i = 0; spec.candidates && i < batch * H; ++i) draw(i / H, i % H);
  for (int i = 0; spec.keys && i < batch * H; ++i) fill_keys(i / H, i % H);
}

// Those that are looked at; all others are NaN.
void CompleteCase::fill_keys(int request, int kv_head) {
  const int n = seq_lens[request], D = spec_.head_dim;
  reference::Vector sum(D), squares(D);
  for (int i = 0; i < 512 && n >= 512; ++i) {
    reference::Vector k, v(D);
    for (int d = 0; d < D; ++d) k.push_back((1 + kv_head) * data_.normal() + 5);  // a mean does not count
    pages.round(kv_head, k, v);
    pages.set(request, static_cast<int>(int64_t{i} * n / 512), kv_head, k, v);
    for (int d = 0; d < D; ++d) sum[d] += k[d] / 512, squares[d] += k[d] * k[d] / 512;
  }
  double variance = 0;
  for (int d = 0; d < D; ++d) variance += (squares[d] - sum[d] * sum[d]) / D;
  spreads_.push_back(n >= 512 ? kScale * kScale * variance : 0);
}

// What the kernel must have left; fp32 sums of 512 numbers of a variance of at least a 25th of their square.
float CompleteCase::spread(int request, int kv_head, float before) const {
  const int number = group(request, kv_head);
  const bool grown = std::log2(seq_lens[request]) >= std::floor(std::log2(std::max(position(request), 1))) + 1;
  if (stored_[number] != kNoHistory && !grown) return before;
  const float got = *ring.view().spread(slots[request], kv_head);
  const double want = spec_.keys ? spreads_[number] : 0;
  CHECK(std::abs(got - want) <= 1e-4 * want);
  return got;
}

// Candidates of a miss, whose keys are far enough apart for fp32 to order them.
void CompleteCase::draw(int request, int kv_head) {
  const int number = group(request, kv_head), room = kCandidateRoom * spec_.anchors;
  int32_t& sampled = sampled_[number * spec_.tokens];
  if (source_[row(request, 0, kv_head * spec_.group_size)] != kMiss || sampled < 0) return;
  std::vector<int> tokens;
  for (int i = 0; i < reference::old_end(position(request), spec_.band); ++i) tokens.push_back(i);
  data_.shuffle(tokens);
  sampled = std::min(sampled, static_cast<int32_t>(tokens.size()));
  std::vector<int> rank(sampled);
  for (int i = 0; i < sampled; ++i) rank[i] = i;
  data_.shuffle(rank);
  for (int i = 0; i < std::min(sampled, room); ++i) {
    const double u = reference::uniform(position(request), kv_head, kLayer, tokens[i]);
    candidates_[number * room + i] = {tokens[i], static_cast<float>(0.02 + 0.01 * rank[i] + std::log2(u))};
  }
}

reference::Sample CompleteCase::kept(int request, int kv_head) const {
  const int number = group(request, kv_head), room = kCandidateRoom * spec_.anchors;
  const int count = sampled_[number * spec_.tokens];
  const int size = reference::sample_size(spec_.anchors, reference::old_end(position(request), spec_.band));
  const cuda::Candidate* first = &candidates_[number * room];
  const auto key = [&](const cuda::Candidate& c) {
    return c.lead - std::log2(reference::uniform(position(request), kv_head, kLayer, c.token));
  };
  std::vector<cuda::Candidate> all(first, first + count);
  std::sort(all.begin(), all.end(), [&](const auto& a, const auto& b) { return key(a) > key(b); });
  const double cut = count > size ? key(all[size]) : 0;
  all.resize(std::min(count, size));
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.token < b.token; });
  reference::Sample sample{count, {}, {}};
  for (const cuda::Candidate& c : all) {
    sample.tokens.push_back(c.token), sample.a.push_back(std::max(0.0, std::exp2(cut - c.lead) - 1));
  }
  return sample;
}

// What match has answered: a head hits with all of its tokens. And amend, for hits with anchors: what is read again
// is a part of the entry's state, now and then more than it or nothing.
void CompleteCase::match(int request, bool has_ring) {
  const int G = spec_.group_size, first = position(request), M = spec_.entries;
  const Ring r = ring.view();
  std::vector<int> empty(M);  // entries that hold nothing
  for (int& entry : empty) entry = data_.below(8) == 0;
  for (int head = 0; head < heads(); ++head) {
    const bool decides = head == 0 || spec_.per_head || head % G == 0;
    if (head > 0 && decides) ++next_age_;
    const int age = spec_.ages[next_age_ % spec_.ages.size()], kv_head = head / G, g = head % G;
    if (!has_ring || seq_lens[request] == 0 || age == 0 || first - age - spec_.tokens < spec_.band) continue;
    for (int token = 0; token < query_len(request); ++token) {
      const int64_t at = row(request, token, head);
      source_[at] = first - age - token * 5 % spec_.tokens;
      place_[at] = decides ? data_.below(M) : place_[at - 1];
      if (spec_.anchors == 0) continue;
      const int kind = data_.below(8), place = place_[at];
      float& entry_lse = r.lse(slots[request], kv_head, place)[g];
      if (empty[place]) entry_lse = -INFINITY;
      const double share = kind == 1 ? -0.1 : 0.1 + 0.08 * data_.below(10);
      const bool nothing = empty[place] || kind == 2;
      state_lse[at] = nothing ? -INFINITY : static_cast<float>(entry_lse + std::log1p(-share));
      log_ratio_[at] = kind == 3 ? -INFINITY : static_cast<float>(data_.normal());
      r.depth(slots[request], kv_head, place)[g] = 0;
    }
  }
  ++next_age_;
}

void CompleteCase::run(const Run& run) {
  const int batch = static_cast<int>(seq_lens.size());
  if (ran_) ring = before_;
  before_ = ring;
  ran_ = true;
  out_.assign((batch - 1) * batch_stride_ + (queries() - 1) * head_stride_ + spec_.head_dim_v(), kGap);
  lse_.assign(batch * queries(), 12345.f);
  unchanged_ = {};
  unchanged_.note(query_.bits()), unchanged_.note(rotated_.bits()), unchanged_.note(states);
  unchanged_.note(state_lse), unchanged_.note(source_), unchanged_.note(place_), unchanged_.note(stored_);
  unchanged_.note(anchors_), unchanged_.note(anchor_weights_), unchanged_.note(sampled_);
  unchanged_.note(log_ratio_), unchanged_.note(seq_lens), unchanged_.note(slots), unchanged_.note(request_ids_);
  unchanged_.note(status), unchanged_.note(sinks_), unchanged_.note(query_lens), unchanged_.note(candidates_);
  CompleteParams p{};
  p.shape = ring.shape, p.dtype = spec_.dtype;
  p.requests = {seq_lens.data(), spec_.exact ? nullptr : slots.data(),
                spec_.exact || !spec_.request_ids ? nullptr : request_ids_.data(),
                query_lens.empty() ? nullptr : query_lens.data()};
  p.states = states.data(), p.state_lse = state_lse.data();
  if (!spec_.exact) {
    p.matched = {source_.data(), place_.data(), stored_.data()};
    p.log_ratio = log_ratio_.data(), p.anchors = anchors_.data(), p.anchor_weights = anchor_weights_.data();
    p.sampled = sampled_.data(), p.layer = kLayer;
    if (spec_.candidates) p.candidates = candidates_.data(), p.anchors = nullptr, p.anchor_weights = nullptr;
    p.query = query_.view(heads()), p.ring = ring.view();
    if (spec_.anchors > 0) p.rotated = rotated_.view(heads());
    p.max_reuse_depth = spec_.anchors > 0 ? 1 : spec_.max_reuse_depth;
  }
  p.band = spec_.band;
  p.out = out_.data(), p.out_batch_stride = batch_stride_, p.out_head_stride = head_stride_;
  p.out_token_stride = heads() * head_stride_;
  p.lse = lse_.data();
  p.sinks = spec_.sinks ? sinks_.data() : nullptr;
  if (spec_.keys) p.kv = pages.view(), p.sm_scale = kScale;
  const cuda::CompleteWorkspace w{spec_.exact ? nullptr : status.data(), cuda::Divisor(spec_.group_size)};
  (spec_.dtype == DType::kBFloat16 ? launch_complete_bf16 : launch_complete_fp16)(p, w, run);
}

int64_t CompleteCase::entries_stored() const {
  int64_t count = 0;
  for (int slot = 0; slot < ring.num_slots; ++slot) {
    count += ring.view().counters(slot)[kEntriesStored] - before_.view().counters(slot)[kEntriesStored];
  }
  return count;
}

reference::State CompleteCase::state(Span span, int request, int token, int head) const {
  const int64_t at = int64_t{span} * static_cast<int64_t>(seq_lens.size()) * queries() + row(request, token, head);
  const float* first = &states[at * spec_.head_dim_v()];
  return {{first, first + spec_.head_dim_v()}, state_lse[at], {}};
}

// fp32: the weights' exponents are differences of numbers up to some 100, so right to 1e-5, and values are near 1.
bool CompleteCase::near(const float* got, const reference::Vector& want, const char* what) const {
  double largest = 1;  // what is left of an entry's state may be a difference of larger numbers
  for (const double x : want) largest = std::max(largest, std::abs(x));
  for (size_t d = 0; d < want.size(); ++d) {
    if (!(std::abs(got[d] - want[d]) <= 3e-5 * largest)) {
      std::printf("%s, element %d: %.7g, should be %.7g\n", what, static_cast<int>(d), got[d], want[d]);
      return false;
    }
  }
  return true;
}

CompleteCase::Carried CompleteCase::carried(int request, int token, int head) const {
  const reference::State old = state(kOld, request, token, head), fresh = state(kFresh, request, token, head);
  const int64_t at = row(request, token, head);
  const int G = spec_.group_size, place = exact(request) ? kMiss : place_[at];
  if (place == kMiss || status[request] != 0) return {old, 0, reference::merge(old, fresh)};
  const Ring r = before_.view();
  const float* first = r.out(slots[request], head / G, place) + head % G * spec_.head_dim_v();
  const reference::State entry{
      {first, first + spec_.head_dim_v()}, r.lse(slots[request], head / G, place)[head % G], {}};
  const int depth = r.depth(slots[request], head / G, place)[head % G] + 1;
  if (spec_.anchors > 0) return {old, depth, reference::hit(entry, old, log_ratio_[at], fresh)};
  const reference::State carried = reference::merge(entry, old);
  return {carried, depth, reference::merge(carried, fresh)};
}

void CompleteCase::check_head(int request, int token, int head, const Carried& carried) const {
  const int64_t in_request = token * heads() + head, row = int64_t{request} * queries() + in_request;
  const uint16_t* out = &out_[request * batch_stride_ + in_request * head_stride_];
  if ((!spec_.exact && status[request] != 0) || std::isnan(carried.whole.lse)) {
    CHECK(std::isnan(lse_[row]));
    for (int d = 0; d < spec_.head_dim_v(); ++d) CHECK(std::isnan(decode(spec_.dtype, out[d])));
    return;
  }
  reference::State whole = carried.whole;
  if (spec_.sinks && token < query_len(request)) {
    whole = reference::merge(whole, {reference::Vector(spec_.head_dim_v(), 0), sinks_[head], {}});
  }
  CHECK(close(lse_[row], whole.lse));
  double largest = 1;
  for (const double x : carried.state.out) largest = std::max(largest, std::abs(x));
  for (int d = 0; d < spec_.head_dim_v(); ++d) {
    const double error = std::abs(decode(spec_.dtype, out[d]) - whole.out[d]);
    CHECK(error <= unit_roundoff(spec_.dtype) * std::abs(whole.out[d]) + 3e-5 * largest);
  }
}

// Floats are compared here and taken over, so that all of the ring can be compared bit by bit.
void CompleteCase::expect_entry(int request, int kv_head, const std::vector<Carried>& carried,
                                RingTensors& want) const {
  const int G = spec_.group_size, D = spec_.head_dim, V = spec_.head_dim_v(), S = spec_.anchors;
  const int slot = slots[request];
  const int place = std::max(stored_[group(request, kv_head)], 0) % spec_.entries;
  const Ring to = want.view(), got = ring.view();
  *to.position(slot, kv_head, place) = position(request);
  for (int g = 0; g < G; ++g) {
    const int head = kv_head * G + g;
    const float lse = got.lse(slot, kv_head, place)[g], *out = got.out(slot, kv_head, place) + g * V;
    CHECK(close(lse, carried[head].state.lse));
    CHECK(near(out, carried[head].state.out, "carried"));
    to.lse(slot, kv_head, place)[g] = lse;
    std::copy_n(out, V, to.out(slot, kv_head, place) + g * V);
    to.depth(slot, kv_head, place)[g] = carried[head].depth;
    const reference::Vector query = query_.row(request, head), rotated = rotated_.row(request, head);
    for (int d = 0; d < D; ++d) {
      to.query<uint16_t>(slot, kv_head, place)[g * D + d] = encode(spec_.dtype, query[d]);
      if (S > 0) to.rotated<uint16_t>(slot, kv_head, place)[g * D + d] = encode(spec_.dtype, rotated[d]);
    }
  }
  int32_t* anchors = to.anchors(slot, kv_head, place);
  float* weights = to.anchor_weights(slot, kv_head, place);
  if (spec_.candidates) {
    const reference::Sample sample = kept(request, kv_head);
    for (int i = 0; i < S; ++i) {
      const bool used = i < static_cast<int>(sample.tokens.size());
      anchors[i] = used ? sample.tokens[i] : kNoAnchor;
      const float a = got.anchor_weights(slot, kv_head, place)[i];
      CHECK(used ? std::abs(a - sample.a[i]) <= 1e-4 * (1 + sample.a[i]) : a == 0);
      weights[i] = a;
    }
    return;
  }
  std::copy_n(anchors_.data() + int64_t{group(request, kv_head)} * S, S, anchors);
  std::copy_n(anchor_weights_.data() + int64_t{group(request, kv_head)} * S, S, weights);
}

// Once for all query tokens, but by each of them where all heads hit. Without anchors.
int64_t CompleteCase::tokens_read(int request, int kv_head) const {
  const int n = seq_lens[request], G = spec_.group_size;
  int64_t sum = 0;
  for (int token = 0; token < query_len(request); ++token) {
    int oldest = n;
    for (int g = 0; g < G; ++g) oldest = std::min(oldest, source_[row(request, token, kv_head * G + g)]);
    if (oldest == kMiss) return n;
    sum += position(request) + token + 1 - reference::old_end(oldest, spec_.band);
  }
  return sum;
}

// What a KV head of a request adds to its slot.
void CompleteCase::expect_group(int request, int kv_head, const std::vector<Carried>& carried,
                                RingTensors& want) const {
  const int n = seq_lens[request], slot = slots[request], G = spec_.group_size, S = spec_.anchors;
  const int number = group(request, kv_head), sampled = sampled_[number * spec_.tokens];
  const int size = reference::sample_size(S, reference::old_end(position(request), spec_.band));
  const int tokens = query_len(request);
  const Ring to = want.view(), got = ring.view();
  int hits = 0;
  bool shallow = false;
  for (int head = kv_head * G; head < (kv_head + 1) * G; ++head) {
    hits += source_[row(request, 0, head)] != kMiss;
    shallow = shallow || carried[head].depth < (S > 0 ? 1 : spec_.max_reuse_depth);
    float& last_lse = to.last_lse(slot, kv_head)[head % G];
    const float lse = got.last_lse(slot, kv_head)[head % G];
    if (spec_.sinks) CHECK(close(lse, carried[head].whole.lse));      // which it is without
    last_lse = spec_.sinks ? lse : lse_[request * queries() + head];  // compared by check_head
  }
  const bool stores = reference::old_end(position(request), spec_.band) > 0 && shallow &&
                      (S == 0 || (hits == 0 && sampled >= 0 && sampled <= 4 * size));
  if (stores) expect_entry(request, kv_head, carried, want);
  const int stored = std::max(stored_[number], 0), next = stored + stores;
  *to.stored(slot, kv_head) = next < 2 * spec_.entries ? next : next - spec_.entries;
  *to.spread(slot, kv_head) = spread(request, kv_head, *to.spread(slot, kv_head));
  if (S > 0) {
    const int missed = stored_[number] == kNoHistory ? 0 : *to.missed(slot, kv_head);
    *to.missed(slot, kv_head) = hits > 0 ? 0 : missed == 39 ? 32 : missed + 1;
    const float tau = *to.tau(slot, kv_head), now = *got.tau(slot, kv_head);
    double expected = stored_[number] != kNoHistory && tau > 0 && tau <= 64 ? tau : 1. / size;
    if (hits == 0 && sampled >= 0) {
      expected *= std::min(4.0, std::max(0.25, sampled / (1.5 * size)));
      expected = std::min(64.0, std::max(1. / 64 / size, expected));
    }
    CHECK(std::abs(now - expected) <= 1e-6 * expected);
    *to.tau(slot, kv_head) = now;
  }
  int anchors = 0;
  for (int token = 0; S > 0 && hits > 0 && token < tokens; ++token) {
    anchors += sampled_[number * spec_.tokens + token];
  }
  int64_t* counters = to.counters(slot);
  counters[kKvHeadSteps] += tokens, counters[kKvHeadHits] += hits == G ? tokens : 0;
  counters[kQueryHeadHits] += hits * tokens, counters[kKvTokensRead] += tokens_read(request, kv_head) + anchors;
  for (int i = 0; i < tokens; ++i) counters[kKvTokensFull] += n - i;
  counters[kAnchorsRead] += anchors, counters[kEntriesStored] += stores;
  if (kv_head > 0) return;
  counters[kSteps] += tokens;
  *to.end(slot) = position(request) + 1, *to.reach(slot) = n;
  *to.request(slot) = spec_.request_ids ? request_ids_[request] : -1;
}

void CompleteCase::check() const {
  RingTensors want = before_;
  for (int b = 0; b < static_cast<int>(seq_lens.size()); ++b) {
    std::vector<Carried> all;
    for (int token = 0; token < spec_.tokens; ++token) {
      for (int h = 0; h < heads(); ++h) {
        all.push_back(carried(b, token, h));
        check_head(b, token, h, all.back());
      }
    }
    if (exact(b) || seq_lens[b] <= 0 || status[b] != 0) continue;
    for (int h = 0; h < spec_.num_kv_heads; ++h) expect_group(b, h, all, want);
  }
  CHECK(unchanged_.holds());
  for (size_t i = 0; i < out_.size(); ++i) {
    const int64_t in_request = static_cast<int64_t>(i) % batch_stride_;
    if (in_request >= queries() * head_stride_ || in_request % head_stride_ >= spec_.head_dim_v())
      CHECK(out_[i] == kGap);
  }
  CHECK(ring.bytes == want.bytes);
}

}  // namespace mac_attn::simt
