#include "amend_case.h"

#include <algorithm>
#include <cmath>
#include <set>

namespace mac_attn::simt {

namespace {

constexpr int32_t kStickyBit = 1 << 20;  // of an error long ago

std::string list(const std::vector<int>& values) {
  std::string text;
  for (const int value : values) text += (text.empty() ? "" : ",") + std::to_string(value);
  return text;
}

// The places of a list of anchors that are used.
std::vector<int> used_anchors(const int32_t* list, int count) {
  std::vector<int> tokens;
  for (int i = 0; i < count; ++i) {
    if (list[i] != kNoAnchor) tokens.push_back(list[i]);
  }
  return tokens;
}

}  // namespace

std::string AmendSpec::name() const {
  return std::string("amend ") + (dtype == DType::kBFloat16 ? "bf16" : "fp16") +
         " H=" + std::to_string(num_kv_heads) + " G=" + std::to_string(group_size) +
         " D=" + std::to_string(head_dim) + " page=" + std::to_string(page_size) + (hnd ? " HND" : " NHD") +
         " n=" + list(seq_lens) +
         (exact ? " exact" : " M=" + std::to_string(window) + " W=" + std::to_string(band)) +
         " S=" + std::to_string(anchors) + " ages=" + list(ages) + (per_head ? " per head" : "") +
         " cap=" + std::to_string(soft_cap) + " sharp=" + std::to_string(sharpness) +
         " heavy=" + std::to_string(heavy_tokens) + " ctas=" + std::to_string(ctas) +
         " seed=" + std::to_string(seed);
}

AmendCase::AmendCase(const AmendSpec& spec)
    : seq_lens(spec.seq_lens.begin(), spec.seq_lens.end()),
      status(spec.seq_lens.size()),
      errors(spec.seq_lens.size()),
      spec_(spec),
      data_(spec.seed),
      softmax_{static_cast<float>(1 / std::sqrt(spec.head_dim)), static_cast<float>(spec.soft_cap)},
      query_(spec.dtype, static_cast<int>(spec.seq_lens.size()), heads(), spec.head_dim, spec.sharpness, data_),
      pages_(spec.dtype, spec.seq_lens, spec.num_kv_heads, spec.head_dim, spec.page_size, spec.hnd, data_),
      num_slots_(static_cast<int>(spec.seq_lens.size()) + 2) {
  const int batch = static_cast<int>(spec.seq_lens.size()), H = spec.num_kv_heads, G = spec.group_size;
  for (int i = 0; i < num_slots_; ++i) slots_.push_back(i);
  data_.shuffle(slots_);
  slots_.resize(batch);
  size_t next_age = 0;
  for (int b = 0; b < batch; ++b) {
    const int position = seq_lens[b] - 1;
    if (position < 0) slots_[b] = kGarbage;
    const auto& without = spec.without_ring;
    if (std::find(without.begin(), without.end(), b) != without.end()) slots_[b] = kNoSlot;
    for (int h = 0; h < heads(); ++h) {
      if (h > 0 && (spec.per_head || h % G == 0)) ++next_age;
      const int age = spec.ages[next_age % spec.ages.size()];
      const bool hits = age > 0 && age <= spec.window && position - age >= spec.band && slots_[b] != kNoSlot;
      source_.push_back(hits ? position - age : kMiss);
    }
    ++next_age;
  }
  ring_anchors_.assign(size_t{1} * num_slots_ * H * spec.window * spec.anchors, kGarbage);
  keys_.resize(batch), values_.resize(batch);
  for (int b = 0; b < batch; ++b) {
    const int n = seq_lens[b];
    for (int h = 0; h < H; ++h) {
      const int first = start(b, h);
      std::vector<int> tokens;
      for (int token = 0; token < first; ++token) tokens.push_back(token);
      data_.shuffle(tokens);
      if (first > 0 && spec.anchors > 0) {
        int32_t* anchors = &ring_anchors_[entry(b, h) * spec.anchors];
        for (int i = 0; i < spec.anchors; ++i) {
          const bool used = i < static_cast<int>(tokens.size()) && !(spec.anchor_holes && data_.below(5) == 0);
          anchors[i] = used ? tokens[i] : kNoAnchor;
        }
        tokens = used_anchors(anchors, spec.anchors);
      } else {
        tokens.clear();
      }
      for (int token = first; token < n; ++token) tokens.push_back(token);

      std::set<int> heavy;
      for (int i = 0; i < spec.heavy_tokens && n > 0; ++i) heavy.insert(data_.below(n));
      reference::Rows k(std::max(n, 0)), v(k.size());
      for (const int token : tokens) {
        for (int d = 0; d < spec.head_dim; ++d) {
          k[token].push_back(data_.normal());
          v[token].push_back(data_.normal());
        }
        if (heavy.count(token)) {
          const reference::Vector q = query_.row(b, h * G + data_.below(G));
          const double logit = 6 + data_.below(8), one = reference::logit(q, q, {softmax_.scale, 0});
          for (int d = 0; d < spec.head_dim; ++d) k[token][d] = q[d] * logit / one;
        }
        for (reference::Vector* row : {&k[token], &v[token]}) {
          for (double& x : *row) x = decode(spec.dtype, encode(spec.dtype, x));
        }
        pages_.set(b, token, h, k[token], v[token]);
      }
      keys_[b].push_back(std::move(k)), values_[b].push_back(std::move(v));
    }
  }
}

int AmendCase::start(int request, int kv_head) const {
  int first = std::max(spec_.seq_lens[request], 0);
  for (int g = 0; g < spec_.group_size; ++g) {
    const int source = source_[request * heads() + kv_head * spec_.group_size + g];
    first = std::min(first, exact(request) || source == kMiss ? 0 : reference::old_end(source, spec_.band));
  }
  return first;
}

int64_t AmendCase::entry(int request, int kv_head) const {
  const int source = source_[request * heads() + kv_head * spec_.group_size];
  return (int64_t{slots_[request]} * spec_.num_kv_heads + kv_head) * spec_.window + source % spec_.window;
}

AmendParams AmendCase::params() {
  AmendParams p{};
  p.shape = {static_cast<int32_t>(seq_lens.size()), spec_.num_kv_heads, spec_.group_size, spec_.head_dim};
  p.dtype = spec_.dtype;
  p.query = query_.view();
  p.kv = pages_.view();
  p.requests = {seq_lens.data(), spec_.exact ? nullptr : slots_.data(), nullptr};
  p.source = spec_.exact ? nullptr : source_.data();
  p.ring_anchors = spec_.exact || spec_.anchors == 0 ? nullptr : ring_anchors_.data();
  p.window = spec_.window, p.band = spec_.band, p.num_anchors = spec_.exact ? 0 : spec_.anchors;
  p.sm_scale = static_cast<float>(softmax_.scale);
  p.logits_soft_cap = static_cast<float>(softmax_.soft_cap);
  p.out = out_.data(), p.lse = lse_.data(), p.anchors = anchors_.data();
  return p;
}

cuda::AmendWorkspace AmendCase::workspace() {
  const int batch = static_cast<int>(seq_lens.size()), G = spec_.group_size;
  cuda::AmendWorkspace w{};
  CHECK(cuda::describe(params(), pages_.num_pages(), pages_.max_pages(), spec_.ctas, w));
  const size_t groups = size_t{1} * batch * spec_.num_kv_heads;
  const size_t states = cuda::max_pieces(spec_.ctas, groups * w.head_tiles) * kNumSpans * w.tile_heads;
  done_.assign(groups, 0);
  drawn_.assign(1, 0);
  error_flag_.assign(1, kStickyBit);
  partial_out_.assign(states * spec_.head_dim, NAN);
  partial_max_.assign(states, NAN);
  partial_sum_.assign(states, NAN);
  if (spec_.anchors > 0) {
    w.max_strips = cuda::max_strips(w.max_tokens);
    const size_t strips = groups * w.max_strips;
    strip_logit_.assign(strips * cuda::strip_row(G), NAN);
    strip_max_.assign(strips * cuda::strip_row(G), NAN);
    token_weight_.assign(strips * cuda::kWarpTokens * cuda::weight_row(G), 0x7fff);  // NaN
    strip_bin_.assign(strips, 77);
  }
  w.done = done_.data(), w.drawn = drawn_.data(), w.status = status.data(), w.error_flag = error_flag_.data();
  w.partial_out = partial_out_.data(), w.partial_max = partial_max_.data(), w.partial_sum = partial_sum_.data();
  w.strip_logit = strip_logit_.data(), w.strip_max = strip_max_.data(), w.strip_bin = strip_bin_.data();
  w.token_weight = token_weight_.data();
  return w;
}

void AmendCase::run(const Run& run) {
  const size_t rows = kNumSpans * seq_lens.size() * heads();
  out_.assign(rows * spec_.head_dim, 12345.f);
  lse_.assign(rows, 12345.f);
  anchors_.assign(spec_.exact ? 0 : seq_lens.size() * spec_.num_kv_heads * spec_.anchors, kGarbage);
  unchanged_ = {};
  unchanged_.note(query_.bits()), unchanged_.note(pages_.k_bits()), unchanged_.note(pages_.v_bits());
  unchanged_.note(pages_.table()), unchanged_.note(seq_lens), unchanged_.note(slots_), unchanged_.note(source_);
  unchanged_.note(ring_anchors_);
  int32_t found = kStickyBit;
  for (size_t b = 0; b < errors.size(); ++b) found |= errors[b] & ~status[b];
  expected_flag_ = found;
  const cuda::AmendWorkspace w = workspace();
  (spec_.dtype == DType::kBFloat16 ? launch_amend_bf16 : launch_amend_fp16)(params(), w, spec_.ctas, run);
}

void AmendCase::check() const {
  CHECK(unchanged_.holds());
  CHECK(error_flag_[0] == expected_flag_);
  CHECK(std::count(done_.begin(), done_.end(), 0) == static_cast<int64_t>(done_.size()));
  CHECK(drawn_[0] == 0);
  for (int b = 0; b < static_cast<int>(seq_lens.size()); ++b) {
    CHECK(status[b] == errors[b]);
    errors[b] ? check_nan(b) : check_request(b);
  }
}

void AmendCase::check_nan(int request) const {
  const size_t rows = seq_lens.size() * heads(), D = spec_.head_dim;
  for (size_t span = 0; span < kNumSpans; ++span) {
    for (size_t row = span * rows + request * heads(); row < span * rows + (request + 1) * heads(); ++row) {
      CHECK(std::isnan(lse_[row]));
      CHECK(std::all_of(&out_[row * D], &out_[row * D] + D, [](float x) { return std::isnan(x); }));
    }
  }
  if (anchors_.empty()) return;
  const int count = spec_.num_kv_heads * spec_.anchors;
  CHECK(std::count(&anchors_[request * count], &anchors_[request * count] + count, kNoAnchor) == count);
}

void AmendCase::check_request(int request) const {
  const int n = seq_lens[request], G = spec_.group_size;
  for (int h = 0; h < spec_.num_kv_heads; ++h) {
    std::vector<int> tokens;
    if (!anchors_.empty()) {
      const int32_t* chosen = &anchors_[(request * spec_.num_kv_heads + h) * spec_.anchors];
      tokens = used_anchors(chosen, spec_.anchors);
      const int end = n > 0 && !exact(request) ? reference::old_end(n - 1, spec_.band) : 0;
      if (n > 0 && start(request, h) > 0) {
        CHECK(std::equal(chosen, chosen + spec_.anchors, &ring_anchors_[entry(request, h) * spec_.anchors]));
      } else if (end == 0) {
        CHECK(tokens.empty());
      } else {
        reference::Rows queries;
        for (int g = 0; g < G; ++g) queries.push_back(query_.row(request, h * G + g));
        // Strips with a token within 12 log2 of the largest so far count; they and the tokens are ordered by bins
        // of 1/8 log2 that end 32 log2 below 1, the tokens by weights rounded to 8 bits.
        const reference::ChoiceRules rules{end, spec_.anchors, -11.9, 0.26, -31.8};
        const std::string complaint =
            reference::judge_choice(tokens, queries, keys_[request][h], n, softmax_, rules);
        if (!complaint.empty()) std::printf("anchors of KV head %d: %s\n", h, complaint.c_str());
        CHECK(complaint.empty());
        if (!complaint.empty()) continue;
      }
    }
    for (int g = 0; g < G; ++g) check_head(request, h * G + g, tokens);
  }
}

// The weights are rounded to the dtype before they meet the values, in numerator and denominator alike, so what
// State::spread says holds with the dtype's unit roundoff. Everything else is fp32, on sums of a few hundred terms.
// Where anchors leave the old state by subtraction, fp32's rounding of the whole weighs as much more as the whole
// is heavier than what is left. An fp16 weight is off by up to 2^-25 of the largest one, however small it is
// itself: nothing in the sum of all, but the part that is taken out of it may have only small ones.
void AmendCase::check_head(int request, int head, const std::vector<int>& anchors) const {
  const int h = head / spec_.group_size, source = source_[request * heads() + head];
  const reference::Vector query = query_.row(request, head);
  const reference::Rows &keys = keys_[request][h], &values = values_[request][h];
  const reference::Spans spans = reference::spans(seq_lens[request], source, spec_.band, exact(request), anchors);
  std::vector<int> all_old = spans.old;
  all_old.insert(all_old.end(), anchors.begin(), anchors.end());
  const double u = 1.01 * unit_roundoff(spec_.dtype);
  for (int span = 0; span < kNumSpans; ++span) {
    const reference::State want =
        reference::attend(query, keys, values, span == kOld ? spans.old : spans.fresh, softmax_);
    const size_t row = (span * seq_lens.size() + request) * heads() + head;
    const float* out = &out_[row * spec_.head_dim];
    if (want.lse == -INFINITY) {
      CHECK(lse_[row] == -INFINITY);
      CHECK(std::all_of(out, out + spec_.head_dim, [](float x) { return x == 0; }));
      continue;
    }
    double slack = 5e-5;
    if (!anchors.empty() && source == kMiss) {
      const reference::State whole = reference::attend(query, keys, values, all_old, softmax_);
      const double whole_by_rest = std::exp(whole.lse - want.lse);
      if (span == kOld && whole_by_rest > 1e6) continue;  // may count as empty
      if (span == kOld) slack += 2e-6 * whole_by_rest;
      const size_t small = span == kOld ? spans.old.size() : anchors.size();
      if (spec_.dtype == DType::kFloat16) slack += 5 * std::ldexp(whole_by_rest, -25) * static_cast<double>(small);
    }
    double worst = std::abs(lse_[row] - want.lse) / (u + slack);
    for (int d = 0; d < spec_.head_dim; ++d) {
      const double error = std::abs(out[d] - want.out[d]) / (u * want.spread[d] + slack);
      if (!(error <= worst)) worst = error;  // NaN too
    }
    if (!(worst <= 1)) {
      std::printf("request %d head %d %s: error %.3g times the tolerance; lse %.7g, should be %.7g\n", request,
                  head, span == kOld ? "old" : "fresh", worst, lse_[row], want.lse);
    }
    CHECK(worst <= 1);
  }
}

}  // namespace mac_attn::simt
