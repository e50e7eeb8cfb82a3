#include "amend_case.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>

namespace mac_attn::simt {

namespace {

constexpr int32_t kStickyBit = 1 << 20;  // of an error long ago

// Of each ring: some for each query token.
int num_entries(const AmendSpec& spec) {
  return spec.tokens + 2;
}

std::string list(const std::vector<int>& values) {
  std::string text;
  for (const int value : values) text += (text.empty() ? "" : ",") + std::to_string(value);
  return text;
}

}  // namespace

std::string AmendSpec::name() const {
  return std::string("amend ") + (dtype == DType::kBFloat16 ? "bf16" : "fp16") + (fp8 ? " on fp8" : "") +
         " H=" + std::to_string(num_kv_heads) + " G=" + std::to_string(group_size) +
         " D=" + std::to_string(head_dim) + " V=" + std::to_string(head_dim_v()) +
         " page=" + std::to_string(page_size) + (hnd ? " HND" : " NHD") + " n=" + list(seq_lens) +
         " T=" + std::to_string(tokens) + " t=" + list(query_lens) +
         (exact ? " exact" : " W=" + std::to_string(band)) + " S=" + std::to_string(anchors) +
         " ages=" + list(ages) + (per_head ? " per head" : "") + " candidates=" + std::to_string(candidates) +
         " cap=" + std::to_string(soft_cap) + " sharp=" + std::to_string(sharpness) +
         " heavy=" + std::to_string(heavy_tokens) + " ctas=" + std::to_string(ctas) +
         (batch_invariant ? " invariant" : "") + " seed=" + std::to_string(seed);
}

AmendCase::AmendCase(const AmendSpec& spec)
    : seq_lens(spec.seq_lens.begin(), spec.seq_lens.end()),
      query_lens(spec.query_lens.begin(), spec.query_lens.end()),
      status(spec.seq_lens.size()),
      errors(spec.seq_lens.size()),
      stored(spec.seq_lens.size() * spec.num_kv_heads, 1),
      ring([&] {
        Data data(spec.seed + 1000);
        const int batch = static_cast<int>(spec.seq_lens.size());
        const Shape shape{batch, spec.num_kv_heads, spec.group_size, spec.head_dim, 1, spec.head_dim_v()};
        return RingTensors(spec.dtype, shape, batch + 2, num_entries(spec), spec.anchors, data);
      }()),
      layer(spec.layer),
      spec_(spec),
      data_(spec.seed),
      softmax_{static_cast<float>(1 / std::sqrt(spec.head_dim)), static_cast<float>(spec.soft_cap)},
      query_(spec.dtype, static_cast<int>(spec.seq_lens.size()), queries(), spec.head_dim, spec.sharpness, data_),
      pages_(spec.dtype, spec.fp8, spec.seq_lens, spec.num_kv_heads, spec.head_dim, spec.head_dim_v(),
             spec.page_size, spec.hnd, data_) {
  const int batch = static_cast<int>(spec.seq_lens.size()), H = spec.num_kv_heads, G = spec.group_size;
  for (int i = 0; i < ring.num_slots; ++i) slots_.push_back(i);
  data_.shuffle(slots_);
  slots_.resize(batch);
  for (int b = 0; b < batch; ++b) {
    if (seq_lens[b] == 0) slots_[b] = kGarbage;
    const auto& without = spec.without_ring;
    if (std::find(without.begin(), without.end(), b) != without.end()) slots_[b] = kNoSlot;
    if (slots_[b] == kGarbage || slots_[b] == kNoSlot) std::fill_n(&stored[b * H], H, kNoHistory);
    match(b);
  }
  keys_.resize(batch), values_.resize(batch);
  for (int b = 0; b < batch; ++b) {
    const int n = seq_lens[b];
    for (int h = 0; h < H; ++h) {
      std::set<int> tokens;
      for (int token = 0; token < (hits(b, h) ? query_len(b) : 1); ++token) {
        if (hits(b, h) && spec.anchors > 0) {
          fill_entry(b, h, token);
          const std::vector<int> anchors = entry_sample(b, h, token).tokens;
          tokens.insert(anchors.begin(), anchors.end());
        }
        for (int i = start(b, h, token); i < n; ++i) tokens.insert(i);
      }

      std::set<int> heavy;
      for (int i = 0; i < spec.heavy_tokens && n > 0; ++i) heavy.insert(data_.below(n));
      reference::Rows k(std::max(n, 0)), v(k.size());
      for (const int token : tokens) {
        for (int d = 0; d < spec.head_dim; ++d) {
          k[token].push_back(data_.normal());
          if (d < spec.head_dim_v()) v[token].push_back(data_.normal());
        }
        if (heavy.count(token)) {
          const reference::Vector q = query_.row(b, h * G + data_.below(G));
          const double logit = 6 + data_.below(8), one = reference::logit(q, q, {softmax_.scale, 0});
          for (int d = 0; d < spec.head_dim; ++d) k[token][d] = q[d] * logit / one;
        }
        pages_.round(h, k[token], v[token]);
        pages_.set(b, token, h, k[token], v[token]);
      }
      keys_[b].push_back(std::move(k)), values_[b].push_back(std::move(v));
      if (spec.anchors > 0 && !hits(b, h) && old_end(b) > 0) prepare_miss(b, h);
    }
  }
}

// What match has answered. A head hits with all of its tokens; some share an entry.
void AmendCase::match(int request) {
  const int G = spec_.group_size, first = position(request), T = spec_.tokens;
  const auto older = [](int token) { return token * 5 % 9; };
  source_.resize(source_.size() + queries(), kMiss), place_.resize(source_.size(), kMiss);
  for (int head = 0; head < heads(); ++head) {
    const bool decides = head == 0 || spec_.per_head || head % G == 0;
    if (head > 0 && decides) ++next_age_;
    const int age = spec_.ages[next_age_ % spec_.ages.size()];
    const bool has_ring = slots_[request] != kNoSlot && slots_[request] != kGarbage;
    if (!has_ring || age == 0 || first - age - (T > 1 ? 8 : 0) < spec_.band) continue;
    const int turn = data_.below(num_entries(spec_));
    for (int token = 0; token < query_len(request); ++token) {
      const int of = token % 3 == 2 ? token - 1 : token, row = matched(request, head / G, token) + head % G;
      source_[row] = first - age - older(of);
      place_[row] = decides ? (of + turn) % num_entries(spec_) : place_[row - 1];
    }
  }
  ++next_age_;
}

// Gives the entry that a token reuses anchors and a query.
void AmendCase::fill_entry(int request, int kv_head, int token) {
  const Ring r = ring.view();
  const int place = place_[matched(request, kv_head, token)];
  if (token > 0 && place == place_[matched(request, kv_head, token - 1)]) return;
  int32_t* anchors = r.anchors(slots_[request], kv_head, place);
  float* a = r.anchor_weights(slots_[request], kv_head, place);
  const int first = start(request, kv_head, token);
  std::vector<int> all;
  for (int i = 0; i < first; ++i) all.push_back(i);
  data_.shuffle(all);
  const int most = reference::sample_size(spec_.anchors, first);
  all.resize(spec_.full_lists || data_.below(3) ? most : data_.below(most + 1));
  std::sort(all.begin(), all.end());
  for (int i = 0; i < spec_.anchors; ++i) {
    const bool used = i < static_cast<int>(all.size());
    anchors[i] = used ? all[i] : kNoAnchor;
    a[i] = used && data_.below(3) ? 3 * std::abs(static_cast<float>(data_.normal())) : 0.f;
  }
  uint16_t* rotated = r.rotated<uint16_t>(slots_[request], kv_head, place);
  for (int i = 0; i < spec_.group_size * spec_.head_dim; ++i) {
    rotated[i] = encode(spec_.dtype, spec_.sharpness * data_.normal());
  }
}

// Sets what the slot knows such that there are about as many candidates as there are to be.
void AmendCase::prepare_miss(int request, int kv_head) {
  const int end = old_end(request), G = spec_.group_size;
  const Ring r = ring.view();
  float* last_lse = r.last_lse(slots_[request], kv_head);
  for (int g = 0; g < G; ++g) last_lse[g] = static_cast<float>(3 + 0.3 * data_.normal());
  reference::Vector keys = weights(request, kv_head);
  const reference::Vector u = uniforms(request, kv_head);
  for (int i = 0; i < end; ++i) keys[i] /= u[i];
  std::sort(keys.begin(), keys.end(), std::greater<>());
  const int size = reference::sample_size(spec_.anchors, end);
  const int count = std::min(static_cast<int>(spec_.candidates * size), end);
  const double upper = count > 0 ? keys[count - 1] : 4 * keys[0], lower = count < end ? keys[count] : upper / 4;
  const double tau = std::exp(2 * data_.normal() - 3);
  const double shift = std::log(std::sqrt(upper * lower) / tau);
  *r.tau(slots_[request], kv_head) = static_cast<float>(tau);
  for (int g = 0; g < G; ++g) last_lse[g] += static_cast<float>(shift);
}

void AmendCase::set_key(int request, int token, int kv_head, double value) {
  reference::Vector& key = keys_[request][kv_head][token];
  std::fill(key.begin(), key.end(), value);
  pages_.set(request, token, kv_head, key, values_[request][kv_head][token]);
}

int AmendCase::start(int request, int kv_head, int token) const {
  int first = std::max(spec_.seq_lens[request], 0);
  for (int g = 0; g < spec_.group_size; ++g) {
    const int source = source_[matched(request, kv_head, token) + g];
    first = std::min(first, exact(request) || source == kMiss ? 0 : reference::old_end(source, spec_.band));
  }
  return first;
}

int AmendCase::old_end(int request) const {
  return seq_lens[request] > 0 && !exact(request) ? reference::old_end(position(request), spec_.band) : 0;
}

reference::Rows AmendCase::queries(int request, int kv_head) const {
  reference::Rows rows;
  for (int g = 0; g < spec_.group_size; ++g) rows.push_back(query_.row(request, kv_head * spec_.group_size + g));
  return rows;
}

reference::Vector AmendCase::entry_query(int request, int query) const {
  const int G = spec_.group_size, D = spec_.head_dim, kv_head = head_of(query) / G;
  const uint16_t* rows =
      ring.view().rotated<uint16_t>(slots_[request], kv_head, place_[request * queries() + query]);
  reference::Vector row;
  for (int d = 0; d < D; ++d) row.push_back(decode(spec_.dtype, rows[query % G * D + d]));
  return row;
}

reference::Sample AmendCase::entry_sample(int request, int kv_head, int token) const {
  const int place = place_[matched(request, kv_head, token)];
  const int32_t* anchors = ring.view().anchors(slots_[request], kv_head, place);
  const float* a = ring.view().anchor_weights(slots_[request], kv_head, place);
  reference::Sample sample{};
  for (int i = 0; i < spec_.anchors; ++i) {
    if (anchors[i] < 0 || anchors[i] >= start(request, kv_head, token)) continue;
    sample.tokens.push_back(anchors[i]), sample.a.push_back(a[i]);
  }
  return sample;
}

reference::Sample AmendCase::sample(int request, int kv_head) const {
  const int64_t first = int64_t{group(request, kv_head)} * spec_.anchors;
  reference::Sample sample{};
  sample.candidates = sampled_[group(request, kv_head) * spec_.tokens];
  for (int i = 0; i < spec_.anchors && anchors_[first + i] != kNoAnchor; ++i) {
    sample.tokens.push_back(anchors_[first + i]), sample.a.push_back(anchor_weights_[first + i]);
  }
  return sample;
}

double AmendCase::tau(int request, int kv_head) const {
  if (spec_.anchors == 0 || old_end(request) == 0 || hits(request, kv_head)) return 0;
  if (stored[group(request, kv_head)] == kNoHistory || *ring.view().missed(slots_[request], kv_head) > 32) return 0;
  const float tau = *ring.view().tau(slots_[request], kv_head);
  const float* last_lse = ring.view().last_lse(slots_[request], kv_head);
  const bool known = std::all_of(last_lse, last_lse + spec_.group_size, [](float x) { return std::isfinite(x); });
  return known && tau > 0 && tau <= 64 ? tau : 0;
}

reference::Vector AmendCase::weights(int request, int kv_head) const {
  const float* last_lse = ring.view().last_lse(slots_[request], kv_head);
  return reference::sample_weights(queries(request, kv_head), keys_[request][kv_head], old_end(request),
                                   {last_lse, last_lse + spec_.group_size}, softmax_);
}

reference::Vector AmendCase::uniforms(int request, int kv_head) const {
  reference::Vector u;
  for (int token = 0; token < old_end(request); ++token) {
    u.push_back(reference::uniform(position(request), kv_head, layer, token));
  }
  return u;
}

AmendParams AmendCase::params() {
  AmendParams p{};
  p.shape = {static_cast<int32_t>(seq_lens.size()),
             spec_.num_kv_heads,
             spec_.group_size,
             spec_.head_dim,
             spec_.tokens,
             spec_.head_dim_v()};
  p.dtype = spec_.dtype;
  p.query = query_.view(heads());
  p.kv = pages_.view();
  p.requests = {seq_lens.data(), spec_.exact ? nullptr : slots_.data(), nullptr,
                query_lens.empty() ? nullptr : query_lens.data()};
  p.band = spec_.band, p.layer = layer;
  p.sm_scale = static_cast<float>(softmax_.scale);
  p.logits_soft_cap = static_cast<float>(softmax_.soft_cap);
  p.batch_invariant = spec_.batch_invariant;
  p.out = out_.data(), p.lse = lse_.data();
  if (spec_.exact) return p;
  p.matched = {source_.data(), place_.data(), stored.data()};
  p.num_anchors = spec_.anchors;
  if (spec_.anchors > 0) p.ring = ring.view();
  p.log_ratio = log_ratio_.data(), p.sampled = sampled_.data();
  p.anchors = anchors_.data(), p.anchor_weights = anchor_weights_.data();
  return p;
}

cuda::AmendWorkspace AmendCase::workspace() {
  cuda::AmendWorkspace w{};
  CHECK(cuda::describe(params(), spec_.ctas, w));
  const size_t groups = seq_lens.size() * spec_.num_kv_heads;
  const size_t states = cuda::max_pieces(params(), w, spec_.ctas) * kNumSpans * w.tile_heads;
  done_.assign(w.num_units, 0), counts_.assign(groups, 0);
  drawn_.assign(1, 0);
  error_flag_.assign(1, kStickyBit);
  partial_out_.assign(states * cuda::padded_head_dim(params().shape), NAN);
  partial_sums_.assign(states * 4, NAN);
  candidate_.assign(groups * kCandidateRoom * params().num_anchors, {kGarbage, NAN});
  w.done = done_.data(), w.sampled = counts_.data(), w.drawn = drawn_.data();
  w.status = status.data(), w.error_flag = error_flag_.data();
  w.partial_out = partial_out_.data(), w.partial_sums = partial_sums_.data();
  w.candidate = candidate_.data();
  return w;
}

void AmendCase::run(const Run& run) {
  const size_t groups = seq_lens.size() * spec_.num_kv_heads, rows = seq_lens.size() * queries();
  out_.assign(kNumSpans * rows * spec_.head_dim_v(), 12345.f);
  lse_.assign(kNumSpans * rows, 12345.f);
  log_ratio_.assign(rows, 12345.f);
  anchors_.assign(groups * spec_.anchors, kGarbage);
  anchor_weights_.assign(groups * spec_.anchors, 12345.f);
  sampled_.assign(groups * spec_.tokens, kGarbage);
  unchanged_ = {};
  unchanged_.note(query_.bits()), unchanged_.note(pages_.k_bytes()), unchanged_.note(pages_.v_bytes());
  unchanged_.note(pages_.table()), unchanged_.note(seq_lens), unchanged_.note(slots_), unchanged_.note(source_);
  unchanged_.note(place_), unchanged_.note(stored), unchanged_.note(ring.bytes);
  unchanged_.note(query_lens);
  int32_t found = kStickyBit;
  for (size_t b = 0; b < errors.size(); ++b) found |= errors[b] & ~status[b];
  expected_flag_ = found;
  const cuda::AmendWorkspace w = workspace();
  const bool is_bf16 = spec_.dtype == DType::kBFloat16;
  const auto launch = is_bf16 ? (spec_.fp8 ? launch_amend_bf16_fp8 : launch_amend_bf16)
                              : (spec_.fp8 ? launch_amend_fp16_fp8 : launch_amend_fp16);
  launch(params(), w, spec_.ctas, run);
  if (first_anchors_.empty()) first_anchors_ = anchors_, first_weights_ = anchor_weights_;
}

void AmendCase::check() const {
  CHECK(unchanged_.holds());
  CHECK(error_flag_[0] == expected_flag_);
  CHECK(std::count(done_.begin(), done_.end(), 0) == static_cast<int64_t>(done_.size()));
  CHECK(std::count(counts_.begin(), counts_.end(), 0) == static_cast<int64_t>(counts_.size()));
  CHECK(drawn_[0] == 0);
  CHECK(anchors_ == first_anchors_ && anchor_weights_ == first_weights_);
  for (int b = 0; b < static_cast<int>(seq_lens.size()); ++b) {
    CHECK(status[b] == errors[b]);
    errors[b] ? check_nan(b) : check_request(b);
    for (int h = 0; h < spec_.num_kv_heads && !spec_.exact; ++h) check_sample(b, h);
  }
}

void AmendCase::check_nan(int request) const {
  const size_t each = queries(), rows = seq_lens.size() * each, V = spec_.head_dim_v();
  for (size_t span = 0; span < kNumSpans; ++span) {
    for (size_t row = span * rows + request * each; row < span * rows + (request + 1) * each; ++row) {
      CHECK(std::isnan(lse_[row]));
      CHECK(std::all_of(&out_[row * V], &out_[row * V] + V, [](float x) { return std::isnan(x); }));
    }
  }
}

void AmendCase::check_sample(int request, int kv_head) const {
  const int S = spec_.anchors;
  const reference::Sample got = sample(request, kv_head);
  const int64_t first = int64_t{group(request, kv_head)} * S;
  for (int i = static_cast<int>(got.tokens.size()); i < S; ++i) {
    CHECK(anchors_[first + i] == kNoAnchor && anchor_weights_[first + i] == 0.f);
  }
  const bool draws = !errors[request] && tau(request, kv_head) > 0;
  const bool attends = S > 0 && !errors[request] && hits(request, kv_head);
  for (int token = draws; token < spec_.tokens; ++token) {
    const bool reads = attends && there(request, token);
    const int read = reads ? static_cast<int>(entry_sample(request, kv_head, token).tokens.size()) : kNotSampled;
    CHECK(sampled_[group(request, kv_head) * spec_.tokens + token] == read);
  }
  if (!draws) {
    CHECK(got.tokens.empty());
    return;
  }
  const std::string complaint =
      reference::judge_sample(got, weights(request, kv_head), uniforms(request, kv_head), tau(request, kv_head),
                              reference::sample_size(S, old_end(request)), kSampleSlack);
  if (!complaint.empty()) {
    std::printf("sample of request %d, KV head %d: %s\n", request, kv_head, complaint.c_str());
  }
  CHECK(complaint.empty());
}

double AmendCase::expected_log_ratio(int request, int query) const {
  const int head = head_of(query), token = token_of(query), h = head / spec_.group_size;
  if (spec_.anchors == 0 || !hits(request, h) || !there(request, token)) return 0;
  const reference::Sample sample = entry_sample(request, h, token);
  const reference::Vector old_query = entry_query(request, query);
  const reference::Rows &keys = keys_[request][h], &values = values_[request][h];
  const double entry =
      ring.view().lse(slots_[request], h, place_[request * queries() + query])[head % spec_.group_size];
  const reference::Vector counts = reference::counts(sample, spec_.anchors, start(request, h, token));
  const reference::State replaced = reference::attend(old_query, keys, values, sample.tokens, softmax_, counts);
  if (reference::nothing_left(entry, replaced.lse, reference::light(old_query, keys, sample, softmax_))) {
    return -INFINITY;
  }
  return reference::log_ratio(query_.row(request, token * heads() + head), old_query, keys, sample, softmax_);
}

void AmendCase::check_request(int request) const {
  for (int query = 0; query < queries(); ++query) {
    check_query(request, query);
    if (spec_.exact) continue;
    const double got = log_ratio(request, query), want = expected_log_ratio(request, query);
    CHECK(got == want || std::abs(got - want) <= kSampleSlack);
  }
}

void AmendCase::check_query(int request, int query) const {
  const int head = head_of(query), token = token_of(query), row = token * heads() + head;
  const int h = head / spec_.group_size, source = source_[request * queries() + query];
  const int n = there(request, token) ? position(request) + token + 1 : 0;
  const reference::Rows &keys = keys_[request][h], &values = values_[request][h];
  const bool reuses = !exact(request) && source != kMiss;
  const int first = reuses ? reference::old_end(source, spec_.band) : 0;
  reference::Vector old_query = query_.row(request, row);
  std::vector<int> old, fresh;
  reference::Vector counts;
  int end = old_end(request);
  if (reuses && spec_.anchors > 0) {
    old = fresh = entry_sample(request, h, token).tokens;
    old_query = entry_query(request, query), end = first;
    counts = reference::counts(entry_sample(request, h, token), spec_.anchors, first);
  }
  for (int token = first; token < n; ++token) (token < end ? old : fresh).push_back(token);
  const reference::State want[kNumSpans] = {
      reference::attend(old_query, keys, values, old, softmax_, counts),
      reference::attend(query_.row(request, row), keys, values, fresh, softmax_, counts)};
  for (const Span span : {kOld, kFresh}) {
    // NaN in one state may show in both: they end up in one sum.
    if (std::isnan(want[1 - span].lse)) continue;
    check_state(request, query, span, want[span]);
  }
}

// The weights are rounded to the dtype before they meet the values, in numerator and denominator alike, so what
// State::spread says holds with the dtype's unit roundoff. Everything else is fp32, on sums of a few hundred terms.
void AmendCase::check_state(int request, int query, Span span, const reference::State& want) const {
  const size_t row = (span * seq_lens.size() + request) * queries() + query;
  const float* out = &out_[row * spec_.head_dim_v()];
  if (want.lse == -INFINITY || std::isnan(want.lse)) {
    CHECK(std::isnan(want.lse) ? std::isnan(lse_[row]) : lse_[row] == -INFINITY);
    CHECK(std::all_of(out, out + spec_.head_dim_v(),
                      [&](float x) { return std::isnan(want.lse) ? x != x : x == 0; }));
    return;
  }
  const double u = 1.01 * unit_roundoff(spec_.fp8 ? DType::kFloat16 : spec_.dtype), slack = 5e-5;
  double worst = std::abs(lse_[row] - want.lse) / (u + slack);
  for (int d = 0; d < spec_.head_dim_v(); ++d) {
    const double error = std::abs(out[d] - want.out[d]) / (u * want.spread[d] + slack);
    if (!(error <= worst)) worst = error;  // NaN too
  }
  if (!(worst <= 1)) {
    std::printf("request %d query %d %s: error %.3g times the tolerance; lse %.7g, should be %.7g\n", request,
                query, span == kOld ? "old" : "fresh", worst, lse_[row], want.lse);
  }
  CHECK(worst <= 1);
}

}  // namespace mac_attn::simt
