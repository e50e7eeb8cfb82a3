#include "complete_case.h"

#include <algorithm>
#include <cmath>

namespace mac_attn::simt {

namespace {

constexpr uint16_t kGap = 0x1234;  // between the rows of `out`

}  // namespace

std::string CompleteSpec::name() const {
  return std::string("complete ") + (dtype == DType::kBFloat16 ? "bf16" : "fp16") +
         " H=" + std::to_string(num_kv_heads) + " G=" + std::to_string(group_size) +
         " D=" + std::to_string(head_dim) + " S=" + std::to_string(anchors) + (exact ? " exact" : "") +
         (per_head ? " per head" : "") + " seed=" + std::to_string(seed);
}

CompleteCase::CompleteCase(const CompleteSpec& spec)
    : seq_lens(spec.seq_lens.begin(), spec.seq_lens.end()),
      status(spec.seq_lens.size()),
      ring([&] {
        Data data(spec.seed + 1000);
        const Shape shape{static_cast<int32_t>(spec.seq_lens.size()), spec.num_kv_heads, spec.group_size,
                          spec.head_dim};
        return RingTensors(spec.dtype, shape, shape.batch + 2, spec.window, spec.anchors, data);
      }()),
      spec_(spec),
      data_(spec.seed),
      query_(spec.dtype, static_cast<int>(spec.seq_lens.size()), heads(), spec.head_dim, 1, data_),
      head_stride_(spec.head_dim + 3),
      batch_stride_(heads() * head_stride_ + 5),
      before_(ring) {
  const int batch = static_cast<int>(seq_lens.size());
  for (int i = 0; i < ring.num_slots; ++i) slots.push_back(i);
  data_.shuffle(slots);
  slots.resize(batch);
  size_t next_age = 0;
  for (int b = 0; b < batch; ++b) {
    const int position = seq_lens[b] - 1;
    for (int h = 0; h < heads(); ++h) {
      if (h > 0 && (spec.per_head || h % spec.group_size == 0)) ++next_age;
      const int age = spec.ages[next_age % spec.ages.size()];
      const bool hits = age > 0 && age <= spec.window && position - age >= spec.band;
      source_.push_back(hits ? position - age : kMiss);
    }
    ++next_age;
    request_ids_.push_back(100 + b);
    // Requests go on where they were, in another slot's place, or as another request.
    if (position >= 0 && b % 3 < 2) ring.end[slots[b]] = position;
    ring.request[slots[b]] = !spec.request_ids ? -1 : b % 2 ? 5 : request_ids_.back();
    if (position < 0) slots[b] = kGarbage;
  }
  for (const int b : spec.without_ring) {
    slots[b] = kNoSlot;
    std::fill_n(&source_[b * heads()], heads(), kMiss);
  }
  for (int i = 0; i < batch * spec.num_kv_heads * spec.anchors; ++i) {
    anchors_.push_back(data_.below(4) ? data_.below(1000) : kNoAnchor);
  }
  const int64_t rows = int64_t{kNumSpans} * batch * heads();
  for (int64_t row = 0; row < rows; ++row) {
    const bool padding = seq_lens[row / heads() % batch] == 0;
    const bool empty = padding || data_.below(4) == 0;
    state_lse.push_back(empty ? -INFINITY
                              : static_cast<float>(data_.below(8) ? 3 * data_.normal() : 60 * data_.normal()));
    for (int d = 0; d < spec.head_dim; ++d) states.push_back(empty ? 0.f : static_cast<float>(data_.normal()));
  }
  // An entry all of whose tokens are anchors.
  for (size_t row = 0; row < ring.lse.size(); row += 5) {
    ring.lse[row] = -INFINITY;
    std::fill_n(&ring.out[row * spec.head_dim], spec.head_dim, 0.f);
  }
}

void CompleteCase::run(const Run& run) {
  const int batch = static_cast<int>(seq_lens.size());
  if (ran_) ring = before_;
  before_ = ring;
  ran_ = true;
  out_.assign((batch - 1) * batch_stride_ + (heads() - 1) * head_stride_ + spec_.head_dim, kGap);
  lse_.assign(batch * heads(), 12345.f);
  unchanged_ = {};
  unchanged_.note(query_.bits()), unchanged_.note(states), unchanged_.note(state_lse), unchanged_.note(source_);
  unchanged_.note(anchors_), unchanged_.note(seq_lens), unchanged_.note(slots), unchanged_.note(request_ids_);
  unchanged_.note(status);
  CompleteParams p{};
  p.shape = ring.shape, p.dtype = spec_.dtype;
  p.requests = {seq_lens.data(), spec_.exact ? nullptr : slots.data(),
                spec_.exact || !spec_.request_ids ? nullptr : request_ids_.data()};
  p.states = states.data(), p.state_lse = state_lse.data();
  if (!spec_.exact) {
    p.source = source_.data(), p.anchors = anchors_.data();
    p.query = query_.view(), p.ring = ring.view();
  }
  p.band = spec_.band;
  p.out = out_.data(), p.out_batch_stride = batch_stride_, p.out_head_stride = head_stride_;
  p.lse = spec_.no_lse ? nullptr : lse_.data();
  const cuda::CompleteWorkspace w{spec_.exact ? nullptr : status.data()};
  (spec_.dtype == DType::kBFloat16 ? launch_complete_bf16 : launch_complete_fp16)(p, w, run);
}

reference::State CompleteCase::state(const std::vector<float>& out, const std::vector<float>& lse,
                                     int64_t row) const {
  const float* first = &out[row * spec_.head_dim];
  return {{first, first + spec_.head_dim}, lse[row], {}};
}

// fp32: the weights' exponents are differences of numbers up to some 100, so right to 1e-5, and values are near 1.
bool CompleteCase::near(const float* got, const reference::Vector& want, const char* what) const {
  for (size_t d = 0; d < want.size(); ++d) {
    if (!(std::abs(got[d] - want[d]) <= 3e-5)) {
      std::printf("%s, element %d: %.7g, should be %.7g\n", what, static_cast<int>(d), got[d], want[d]);
      return false;
    }
  }
  return true;
}

void CompleteCase::check_head(int request, int head, RingTensors& want) const {
  const int64_t row = int64_t{request} * heads() + head, spans = static_cast<int64_t>(seq_lens.size()) * heads();
  const int D = spec_.head_dim, position = seq_lens[request] - 1;
  const uint16_t* out = &out_[request * batch_stride_ + head * head_stride_];
  const reference::State old = state(states, state_lse, row), fresh = state(states, state_lse, spans + row);
  if ((!spec_.exact && status[request] != 0) || std::isnan(old.lse) || std::isnan(fresh.lse)) {
    CHECK(spec_.no_lse || std::isnan(lse_[row]));
    for (int d = 0; d < D; ++d) CHECK(std::isnan(decode(spec_.dtype, out[d])));
    return;
  }
  reference::State carried = old;
  if (!exact(request) && position >= 0) {
    int depth = 0;
    if (source_[row] != kMiss) {
      const int64_t from = ring.row(slots[request], head, source_[row]);
      carried = reference::merge(state(before_.out, before_.lse, from), old);
      depth = before_.depth[from] + 1;
    }
    const int64_t to = ring.row(slots[request], head, position);
    CHECK(ring.lse[to] == static_cast<float>(carried.lse) || std::abs(ring.lse[to] - carried.lse) <= 2e-5);
    CHECK(near(&ring.out[to * D], carried.out, "carried"));
    const reference::Vector query = query_.row(request, head);
    for (int d = 0; d < D; ++d) want.query[to * D + d] = encode(spec_.dtype, query[d]);
    want.depth[to] = depth;
    // Compared just now; all else of the ring is compared bit by bit.
    want.lse[to] = ring.lse[to];
    std::copy_n(&ring.out[to * D], D, &want.out[to * D]);
  }
  const reference::State whole = reference::merge(carried, fresh);
  CHECK(spec_.no_lse || lse_[row] == static_cast<float>(whole.lse) || std::abs(lse_[row] - whole.lse) <= 2e-5);
  for (int d = 0; d < D; ++d) {
    const double error = std::abs(decode(spec_.dtype, out[d]) - whole.out[d]);
    CHECK(error <= unit_roundoff(spec_.dtype) * std::abs(whole.out[d]) + 3e-5);
  }
}

// What the request adds to its slot beside the states.
void CompleteCase::expect_request(int request, RingTensors& want) const {
  const int n = seq_lens[request], position = n - 1, slot = slots[request], H = spec_.num_kv_heads;
  const int G = spec_.group_size, S = spec_.anchors;
  int64_t* counters = &want.counters[slot * kNumCounters];
  ++counters[kSteps];
  counters[kKvHeadSteps] += H;
  counters[kKvTokensFull] += int64_t{n} * H;
  for (int h = 0; h < H; ++h) {
    int hits = 0, first = n;
    for (int g = 0; g < G; ++g) {
      const int source = source_[request * heads() + h * G + g];
      hits += source != kMiss;
      first = std::min(first, source == kMiss ? 0 : reference::old_end(source, spec_.band));
    }
    counters[kQueryHeadHits] += hits;
    counters[kKvHeadHits] += hits == G;
    counters[kKvTokensRead] += n - first;
    const int32_t* anchors = anchors_.data() + (request * H + h) * S;
    if (hits > 0) counters[kKvTokensRead] += S - std::count(anchors, anchors + S, kNoAnchor);
    std::copy_n(anchors, S, want.anchors.begin() + want.anchor_row(slot, h, position));
  }
  const int64_t id = spec_.request_ids ? request_ids_[request] : -1;
  if (want.end[slot] != position || want.request[slot] != id) want.begin[slot] = position;
  want.end[slot] = n;
  want.request[slot] = id;
  want.position[slot * spec_.window + position % spec_.window] = position;
}

void CompleteCase::check() const {
  RingTensors want = before_;
  for (int b = 0; b < static_cast<int>(seq_lens.size()); ++b) {
    for (int h = 0; h < heads(); ++h) check_head(b, h, want);
    if (!exact(b) && seq_lens[b] > 0 && status[b] == 0) expect_request(b, want);
  }
  CHECK(unchanged_.holds());
  for (size_t i = 0; i < out_.size(); ++i) {
    const int64_t in_request = static_cast<int64_t>(i) % batch_stride_;
    if (in_request >= heads() * head_stride_ || in_request % head_stride_ >= spec_.head_dim) CHECK(out_[i] == kGap);
  }
  CHECK(ring.query == want.query);
  CHECK(ring.out == want.out);
  CHECK(ring.lse == want.lse);
  CHECK(ring.depth == want.depth);
  CHECK(ring.anchors == want.anchors);
  CHECK(ring.position == want.position);
  CHECK(ring.begin == want.begin);
  CHECK(ring.end == want.end);
  CHECK(ring.request == want.request);
  CHECK(ring.counters == want.counters);
}

}  // namespace mac_attn::simt
